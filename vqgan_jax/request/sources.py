"""Where the conditions of pictures come from: classes in turn, places in the picture, examples of a data set, files.

A source of conditions has `len`, `row(j)`: the batch arrays of one picture without a batch axis (with `image`, where
there is an original), `name(j)` for people, and `record`, what tells it from others.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.config import UserError
from vqgan_jax.coordinates import pixel_coordinates
from vqgan_jax.data.pipeline import example_index
from vqgan_jax.data.source import CorruptExample, readable
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.transforms import Transform, sides
from vqgan_jax.request.files import Expected, Files, Row


class ConditionSource(Protocol):
    """See above."""

    record: dict[str, Any]

    def __len__(self) -> int: ...

    def row(self, j: int) -> Row: ...

    def name(self, j: int) -> str: ...


class Classes:
    """Labels in turn."""

    def __init__(self, labels: np.ndarray, names: list[str]):
        self._labels, self._names, self.record = labels, names, {}

    def __len__(self) -> int:
        return len(self._labels)

    def row(self, j: int) -> Row:
        return {"label": self._labels[j]}

    def name(self, j: int) -> str:
        return self._names[self._labels[j]] if self._names else f"class {self._labels[j]}"


class Places:
    """Where pixels stand in the picture: in the whole one, or where it is smaller than the pictures that the data is
    cut from, in the middle of such a one."""

    record: dict[str, Any] = {}

    def __init__(self, size: tuple[int, int], resize_to: int):
        """`size` in pixels; `resize_to` of the data, 0 where its pictures are not cut."""
        whole, (top, left) = _middle(size, resize_to)
        self._coords = pixel_coordinates(*whole)[top : top + size[0], left : left + size[1]]

    def __len__(self) -> int:
        return 1

    def row(self, j: int) -> Row:
        return {"coords": self._coords}

    def name(self, j: int) -> str:
        return ""


def middle_window(size: tuple[int, int], resize_to: int) -> tuple[float, float, float, float]:
    """What `Places` tells by coordinates, as x, y, width and height relative to the whole picture."""
    whole, (top, left) = _middle(size, resize_to)
    return left / whole[1], top / whole[0], size[1] / whole[1], size[0] / whole[0]


def _middle(size: tuple[int, int], resize_to: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Height and width of the whole picture, and where in it the picture of `size` begins."""
    whole = tuple(max(n, resize_to) for n in size)
    return whole, tuple((n - m) // 2 for n, m in zip(whole, size, strict=True))


class Examples:
    """Conditions and originals of a data set's examples, of a split in a fixed shuffled order, or those that are named.

    An example that cannot be read is replaced by the next readable one.
    """

    def __init__(self, data: ConfigDict, split: str, chosen: tuple[int, ...], transform: Transform):
        """Opens the split that `data` describes; `chosen` are indices of examples, () means all. Raises UserError."""
        self._source = open_source(data, split)
        count = len(self._source)
        if wrong := [index for index in chosen if index >= count]:
            raise UserError(f"--condition={split}:{wrong[0]}: the split has the examples 0 to {count - 1}")
        self._split, self._chosen, self._transform = split, chosen, transform
        self._count = len(chosen) or count
        self.tables = getattr(self._source, "tables", {})
        self.record = {"split": split, "examples": list(chosen) or count, "source": data.source}

    def __len__(self) -> int:
        return self._count

    def _index(self, j: int) -> int:
        return self._chosen[j] if self._chosen else example_index(j, self._count, 0)

    def row(self, j: int) -> Row:
        try:
            example = readable(self._source, self._index(j))
        except CorruptExample as error:
            raise UserError(f"--condition={self._split}: nothing of it can be read, such as {error}") from None
        made = self._transform(example, np.random.default_rng(0))
        # What is drawn beyond the trained size is the whole picture of its layout.
        whole = {} if "crop_box" in made else {"crop_box": np.array([0, 0, 1, 1], np.float32)}
        return made | whole

    def name(self, j: int) -> str:
        return f"{self._split} {self._index(j)}"


class FileConditions:
    """Conditions of one batch key in files."""

    def __init__(self, text: str, key: str, kind: Any, expected: Expected, transform: Transform, *, flag: str):
        """As of `Files`; `transform` is the data's, whose filters are used."""
        self._files, self._kind, self._expected = Files(text, key, kind, expected, flag=flag), kind, expected
        own = {"resize": kind.resize} if kind.resize else {}
        # A file of the right size is taken as it is, whatever the data cuts its pictures from.
        self._transform = dataclasses.replace(transform, keys=kind.keys, size=expected.size, resize_to=0, **own)
        self.record = {"files": len(self._files), "sha256": self._files.sha256}

    def __len__(self) -> int:
        return len(self._files)

    def row(self, j: int) -> Row:
        example = self._files[j]
        made = self._transform(example, np.random.default_rng(0)) if "image" in example else example
        return self._kind.finish(made, self._expected)

    def name(self, j: int) -> str:
        return self._files.names[j]


def centre_transform(data: ConfigDict | None, keys: tuple[str, ...], classes: int, size: tuple[int, int]) -> Transform:
    """The data's own transform of held-out pictures, to another size; of a model that names no data one that resizes
    bilinearly."""
    if data is None:
        return Transform(
            keys=keys,
            size=size,
            resize="bilinear",
            crop="center",
            crop_scale=(1.0, 1.0),
            flip=False,
            max_boxes=0,
            classes=classes,
            resize_to=0,
            low_res_factor=8,  # the paper's
        )
    transform = Transform.from_config(data, keys=keys, classes=classes, train=False)
    return dataclasses.replace(
        transform, size=size, resize_to=transform.resize_to * (data.resize_to >= min(sides(size)))
    )
