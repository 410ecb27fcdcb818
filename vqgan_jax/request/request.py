"""What a job is asked for, opened: condition and given part of picture i, and the record that tells jobs apart."""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.conditioning import Condition, EncodedImage, Objects
from vqgan_jax.config import UserError, choose
from vqgan_jax.data.sources import open_source
from vqgan_jax.object_tokens import FLAGS
from vqgan_jax.request.completion import Completion, open_masks
from vqgan_jax.request.files import DERIVED, KINDS, Expected
from vqgan_jax.request.flags import Asked
from vqgan_jax.request.sources import (
    Classes,
    ConditionSource,
    Examples,
    FileConditions,
    Places,
    Row,
    centre_transform,
    middle_window,
)
from vqgan_jax.sampling.sampler import leading_given
from vqgan_jax.trained_transformer import TrainedTransformer

_SPLIT = re.compile(r"(val|train)(?::(\d+(?:,\d+)*))?")
_NUMBER = 16  # of pictures, where neither a flag nor files say it
_KEPT_BYTES = 1 << 28  # of one key in samples.npz
_READ_AGAIN = 4096  # pictures of a condition, for samples.npz
_CACHED = 16  # rows


class Request:
    """Opened; pictures are those of a whole grid of codes.

    Attributes:
      number: pictures in all.
      size: of a picture in pixels.
      parts: the condition's parts that need something, each with its source.
      completion: what of pictures is given, or None.
      count: different rows; picture i has row i // each % count.
      leading: first codes that are given in every picture, as of `leading_given`.
      encodes: whether pictures beyond the trained size are encoded, of conditions or where parts are given.
      record: plain data that tells this request from others; empty where nothing but classes is asked for.
    """

    def __init__(self, asked: Asked, trained: TrainedTransformer, grid: tuple[int, int]):
        """Opens it.

        Args:
          asked: the flags.
          trained: the model.
          grid: of the pictures in codes.

        Raises:
          UserError: something asked for is not there, or does not fit the model.
        """
        self._asked, self._trained, self._model = asked, trained, trained.model
        self.size = tuple(self._model.first_stage.factor * n for n in grid)
        self._beyond = tuple(grid) != self._model.config.grid
        texts = self._texts()
        self._examples = self._open_examples([*texts.items(), ("image", asked.given)])
        parts = [part for part in self._model.condition.parts if part.keys]
        self.parts = [(part, self._open(part, texts[part.keys[0]])) for part in parts]
        self.completion, completed = self._open_completion()
        sources = [source for _, source in self.parts]
        sources += [self.completion] if self.completion else []
        self.count = math.lcm(*map(len, sources))
        encoded = any(isinstance(part, EncodedImage) for part, _ in self.parts)
        self.encodes = self._beyond and (encoded or self.completion is not None)
        self.leading = leading_given(self._model, self.completion.given) if self.completion and not self._beyond else 0

        files = [len(source) for source in sources if "files" in source.record]
        self.number = asked.number or (asked.each * max(files) if files else _NUMBER)
        records = {part.keys[0]: source.record for part, source in self.parts if source.record}
        told = {"condition": records, "given": completed, "each": asked.each if asked.each > 1 else 0}
        self.record = {name: value for name, value in told.items() if value}
        self.row = functools.lru_cache(_CACHED)(self._row)

    @functools.cached_property
    def names(self) -> Mapping[str, list[str]]:
        """Of ids, by batch key, as far as they are known."""
        record = self._trained.record
        found = dict(record.get("tables") or {})
        for examples in self._examples.values():
            found |= examples.tables
        named = {"box_classes", "keypoints"} & set(self._model.condition.keys)
        if named - set(found) and self._data is not None:
            try:  # a run that did not record them
                found |= getattr(open_source(self._data, "val"), "tables", {})
            except UserError:
                pass
        return {"label": record.get("classes") or [], **{key: list(names) for key, names in found.items()}}

    @functools.cached_property
    def _data(self) -> ConfigDict | None:
        """`config.data` of the run; None for an imported model."""
        recorded = self._trained.record["config"].get("data")
        moved = {"path": self._asked.data} if self._asked.data else {}
        return ConfigDict({**recorded, **moved}) if recorded else None

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Batch arrays of the pictures `indices` [n]: the condition's, and `image` and `given` of completions."""
        keys = [*self._model.condition.keys, *(("image", "given") if self.completion else ())]
        return _stacked((self.row(self.row_of(index)) for index in indices), keys)

    def row_of(self, index: int) -> int:
        """The row of a picture."""
        return int(index) // self._asked.each % self.count

    def _row(self, j: int) -> Row:
        """All of one row, also `image` where there is an original."""
        found: dict[str, np.ndarray] = {}
        for part, source in self.parts:
            made = source.row(j % len(source))
            found |= {key: made[key] for key in (*part.keys, "image") if key in made}
        return found | (self.completion.row(j % len(self.completion)) if self.completion else {})

    def finished(self, index: int, picture: np.ndarray) -> np.ndarray:
        """A picture uint8 [h, w, 3] as it is written: with what was given pasted over it, where that is asked for."""
        return (
            self.completion.pasted(self.row_of(index) % len(self.completion), picture) if self.completion else picture
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """What each picture was asked for, by batch key, as far as it is small; `given` on the grid of codes.

        Left out are keys that take more than 256 MiB, and pictures, such as masks and edges, of which more than 4096
        different ones would have to be read again.
        """
        order = np.array([self.row_of(index) for index in range(self.number)])
        found: dict[str, np.ndarray] = {}
        for part, source in self.parts:
            rows, place = np.unique(order % len(source), return_inverse=True)
            first = source.row(int(rows[0]))
            keys = [key for key in part.keys if first[key].nbytes * self.number <= _KEPT_BYTES]
            if len(rows) > _READ_AGAIN:
                keys = [key for key in keys if first[key].shape[:2] != self.size]
            if keys:
                found |= {key: x[place] for key, x in _stacked(map(source.row, rows.tolist()), keys).items()}
        if self.completion:
            found["given"] = self.completion.given[order % len(self.completion.given)]
        return found

    def _texts(self) -> dict[str, str]:
        """Where each part of the condition comes from, by its first key: what the flags say; "" is in turn or in place.

        Raises:
          UserError: a part that the model does not have, or one that is said twice or not clearly.
        """
        asked, names = self._asked, [part.keys[0] for part in self._model.condition.parts if part.keys]
        if not names and (asked.condition or asked.classes):
            flag = "--condition" if asked.condition else "--classes"
            raise UserError(f"{flag}: this model is unconditional")
        if asked.classes and "label" not in names:
            raise UserError(f"--classes: this model has no classes, its condition is {', '.join(names)}")
        found: dict[str, str] = {}
        for text in asked.condition:
            name, equals, source = text.partition("=")
            if not (equals and name.isidentifier()):
                name, source = "", text
            if name:
                choose("--condition", name, dict.fromkeys(names))
            if not source:
                raise UserError(f"--condition={text}: says no source; name 'val' or 'train', or files")
            if name in found or (name == "label" and asked.classes):
                raise UserError(f"--condition={text}: says a second time where {name or 'conditions'} come from")
            found[name] = source
        rest, picked = found.pop("", ""), [name for name in names if name not in found]
        if rest and not _SPLIT.fullmatch(rest):
            picked = [name for name in picked if name not in ("label", "coords")]
            if len(picked) != 1:
                raise UserError(
                    f"--condition={rest}: say for which part, of {', '.join(names)}: --condition=PART={rest}"
                )
        if rest:
            found |= {name: rest for name in picked if not (name == "label" and asked.classes)}
        found = {name: "" if name in ("label", "coords") else "val" for name in names} | found
        splits = [text for text in (*found.values(), asked.given) if _SPLIT.fullmatch(text)]
        if splits and not found.get("label", "-") and not asked.classes:
            found["label"] = splits[0]  # of the example that the rest is of
        return found

    def _open_examples(self, texts: list[tuple[str, str]]) -> dict[str, Examples]:
        """The examples that some sources are of, by the source's text."""
        found = {}
        for text in dict.fromkeys(text for _, text in texts if _SPLIT.fullmatch(text)):
            if self._data is None:
                raise UserError(f"--condition={text}: an imported model names no data set; give files")
            used = {name for name, other in texts if other == text}
            keys = [key for part in self._model.condition.parts if used & set(part.keys) for key in part.keys]
            if self._beyond:  # the picture is the whole that layouts are of
                keys = [key for key in keys if key != "crop_box"]
            transform = centre_transform(self._data, ("image", *keys), self._model.condition.labels, self.size)
            split, chosen = _SPLIT.fullmatch(text).groups()
            chosen = tuple(map(int, chosen.split(","))) if chosen else ()
            found[text] = Examples(self._data, split, chosen, transform)
            if self._asked.data:
                found[text].record["data"] = self._asked.data
        return found

    def _open(self, part: Condition, text: str) -> ConditionSource:
        """The source of one part."""
        key = part.keys[0]
        if text in self._examples:
            return self._examples[text]
        if not text and key == "label":
            return Classes(self._labels(), self.names["label"])
        if not text and key == "coords":
            return Places(self.size, 0 if self._data is None else self._data.resize_to)
        if key not in KINDS:
            raise UserError(f"--condition={key}={text}: takes 'val' or 'train'; classes are named with --classes")
        kind = (DERIVED if self._asked.derive and key in DERIVED else KINDS)[key]
        transform = centre_transform(self._data, (), 0, self.size)
        source = FileConditions(text, key, kind, self._expected(part), transform, flag=f"--condition={key}")
        if kind is not KINDS[key]:
            source.record["derived"] = True
        return source

    def _open_completion(self) -> tuple[Completion | None, dict[str, Any]]:
        """What is given of pictures, and what tells it from other requests."""
        asked, model = self._asked, self._model
        if not asked.given:
            if asked.mask or asked.paste:
                raise UserError("--mask, --paste: are of pictures that --given names")
            return None, {}
        if (key := model.first_stage.config.input_key) != "image":
            raise UserError(f"--given: this model makes '{key}', no pictures")
        pictures = self._examples.get(asked.given)
        if pictures is None:
            transform = centre_transform(self._data, (), 0, self.size)
            kind = KINDS["image"]
            pictures = FileConditions(asked.given, "image", kind, Expected(self.size), transform, flag="--given")
        masks = open_masks(asked.mask or "lower", model, self.size)
        completion = Completion(pictures, masks, model.first_stage.factor, asked.paste)
        return completion, {"pictures": pictures.record, "mask": masks.record, "paste": asked.paste}

    def _labels(self) -> np.ndarray:
        """The classes asked for, or all of them, int32."""
        names, ids = self.names["label"], []
        count = len(names) or self._model.condition.labels  # a data set may have fewer classes than its model
        for text in self._asked.classes:
            if text not in names and not (text.isdigit() and int(text) < count):
                raise UserError(f"--classes: no class '{text}'; there are 0 to {count - 1}: {', '.join(names)}")
            ids.append(names.index(text) if text in names else int(text))
        return np.asarray(ids or range(count), np.int32)

    def _expected(self, part: Condition) -> Expected:
        """What files of a part may hold."""
        match part:
            case EncodedImage():
                coco = self._data is not None and self._data.source == "coco_stuff"
                segments = part.stage.config.autoencoder.in_channels
                # A picture beyond the trained size may show more things than the data's.
                points = 0 if self._beyond else len(self.names.get("keypoints", ()))
                return Expected(self.size, segments=segments, unlabelled=coco, points=points)
            case Objects(config):
                flags = [flag for flag in FLAGS if flag in config.flags]
                names = self.names.get("box_classes", [])
                # A model of crops draws the middle of one, as `Places` has it; beyond the trained size the whole.
                cut = "crop_box" in part.keys and not self._beyond and self._data is not None
                return Expected(
                    self.size,
                    objects=config.max_objects,
                    names=names,
                    box_classes=config.classes,
                    flags=flags,
                    window=middle_window(self.size, self._data.resize_to if cut else 0),
                )
        return Expected(self.size)


def _stacked(rows: Iterable[Row], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Some keys of rows; of a row no more is held."""
    picked = [[row[key] for key in keys] for row in rows]
    return {key: np.stack(values) for key, values in zip(keys, zip(*picked, strict=True), strict=False)}
