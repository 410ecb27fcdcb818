"""Pictures of which a part is given and the rest made anew: completions and inpainting on the grid of codes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vqgan_jax import storage
from vqgan_jax.config import UserError, suggest
from vqgan_jax.images import to_uint8
from vqgan_jax.request.files import KINDS, Expected
from vqgan_jax.request.sources import ConditionSource, FileConditions, Row, centre_transform
from vqgan_jax.transformer import ImageTransformer

# Where a share of a picture lies that is made anew: slices of rows and columns, from the share and an axis' length.
_WHOLE, _FIRST = (lambda share, n: slice(n)), (lambda share, n: slice(round(share * n)))
_LAST = lambda share, n: slice(n - round(share * n), n)  # noqa: E731
_MIDDLE = lambda share, n: slice((n - round(share * n)) // 2, (n + round(share * n)) // 2)  # noqa: E731
REGIONS = {
    "upper": (_FIRST, _WHOLE),
    "lower": (_LAST, _WHOLE),
    "left": (_WHOLE, _FIRST),
    "right": (_WHOLE, _LAST),
    "center": (_MIDDLE, _MIDDLE),
}
_HALF = 0.5  # of the height or the width, or of both in the center
_CACHED = 16  # masks in pixels


@dataclasses.dataclass(frozen=True)
class Masks:
    """What of pictures is made anew.

    Attributes:
      given: the codes that are kept, bool [m, h / factor, w / factor].
      anew: the pixels that mask j makes anew, bool [h, w].
      record: what tells these masks from others.
    """

    given: np.ndarray
    anew: Callable[[int], np.ndarray]
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Completion:
    """Given pictures and what of them is made anew, each in turn.

    Attributes:
      pictures: rows with `image`.
      masks: what is made anew.
      factor: pixels a code.
      paste: whether given pixels are put back over a result.
    """

    pictures: ConditionSource
    masks: Masks
    factor: int
    paste: bool

    @property
    def given(self) -> np.ndarray:
        """The codes that are kept, bool [m, h / factor, w / factor]."""
        return self.masks.given

    def row(self, j: int) -> Row:
        """`image` float [h, w, 3], and `given` bool on the grid of codes."""
        image = self.pictures.row(j % len(self.pictures))["image"]
        return {"image": image, "given": self.given[j % len(self.given)]}

    def __len__(self) -> int:
        return math.lcm(len(self.pictures), len(self.given))

    @property
    def record(self) -> Mapping[str, Any]:
        """That of the pictures."""
        return self.pictures.record

    def pasted(self, j: int, picture: np.ndarray) -> np.ndarray:
        """A result uint8 [h, w, 3] with the given pixels over it, if that is asked for."""
        if not self.paste:
            return picture
        anew = self.masks.anew(j % len(self.given))[..., None]
        return np.where(anew, picture, to_uint8(self.pictures.row(j % len(self.pictures))["image"]))

    def masked(self, j: int) -> np.ndarray:
        """The picture as the model sees it, uint8 [h, w, 3]: codes that are made anew are grey."""
        row = self.row(j)
        kept = row["given"].repeat(self.factor, axis=0).repeat(self.factor, axis=1)[..., None]
        return np.where(kept, to_uint8(row["image"]), np.uint8(128))


def kept_codes(anew: np.ndarray, factor: int) -> np.ndarray:
    """Of pixels bool [h, w] that are made anew the codes bool [h / factor, w / factor] of which none is."""
    h, w = anew.shape
    return ~anew.reshape(h // factor, factor, w // factor, factor).any(axis=(1, 3))


def open_masks(text: str, model: ImageTransformer, size: tuple[int, int]) -> Masks:
    """What --mask asks to make anew. Of files the codes are held, pixels are read again when they are asked for.

    Args:
      text: a region with or without its share, or files.
      model: whose codes are kept.
      size: of the pictures in pixels.

    Raises:
      UserError: no such region or file, or one that leaves nothing to keep or nothing to make.
    """
    name, _, share = text.partition(":")
    if name in REGIONS:
        region = _region(text, name, share or str(_HALF), size)
        count, anew, record = 1, lambda j: region, {"region": text}
    elif not set(text) & set("./*?") and not storage.path(text).exists():
        raise UserError(f"--mask={text}: no file, and no region{suggest(name, REGIONS)}")
    else:
        kind, transform = KINDS["mask"], centre_transform(None, ("image",), 0, size)
        files = FileConditions(text, "mask", kind, Expected(size), transform, flag="--mask")
        count, anew, record = len(files), lambda j: files.row(j)["mask"], files.record
    factor = model.first_stage.factor
    given = np.stack([kept_codes(anew(j), factor) for j in range(count)])
    kept = given.any(axis=(1, 2))
    for j in np.flatnonzero(~kept | given.all(axis=(1, 2))):
        what = "is black: nothing of the picture is made anew" if kept[j] else "keeps no code"
        raise UserError(
            f"--mask={text}: {f'mask {j} of it ' * (count > 1)}{what}; a code is kept if none of its "
            f"{factor}x{factor} pixels is white"
        )
    return Masks(given, functools.lru_cache(_CACHED)(anew), record)


def _region(text: str, name: str, share: str, size: tuple[int, int]) -> np.ndarray:
    try:
        part = float(share)
    except ValueError:
        part = 0.0
    if not 0 < part < 1:
        raise UserError(f"--mask={text}: the share is above 0 and below 1, such as {name}:0.25")
    anew = np.zeros(size, bool)
    anew[tuple(where(part, n) for where, n in zip(REGIONS[name], size, strict=True))] = True
    return anew
