"""Tokens of a scene's layout, objects as boxes or as centre points (arXiv 2105.06458), and the layout of such tokens.

An object is its class token (class and flags) and two corners, or its class token and its centre. Arrays of numpy or
JAX (inside jit as well) go in, with any leading batch axes, and the same kind comes out.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from vqgan_jax.config import UserError, suggest

Array = Any  # numpy or JAX: both give their namespace by __array_namespace__

FLAGS = ("group", "occluded", "depiction", "inside")  # bit k of box_flags says FLAGS[k]


@dataclasses.dataclass(frozen=True)
class ObjectTokens:
    """How layouts are written as tokens. The released COCO model: boxes, 30 objects, 8192 tokens, crop, ("group",).

    Attributes:
      kind: "boxes" (class, top left, bottom right) or "centres" (class, centre).
      max_objects: slots; unused ones hold the token `none`.
      vocab: number of tokens. Points lie on a lattice of floor(sqrt(vocab)) sections an axis; the last token is `none`.
        Where vocab is a square, the last lattice point is this token too; slots stay unambiguous by their class token.
      classes: number of object classes.
      crop: True appends the crop as two tokens and leaves boxes relative to the whole picture, so that a model can draw
        windows of a larger picture; False makes boxes relative to the crop.
      flags: which of `FLAGS` the class token tells.
      trim: for crop=False, True ends a box at the crop's edges; False is the released code, which keeps the width and
        height of a box whose left or top side is cut off, as far as the crop reaches.
    """

    kind: Literal["boxes", "centres"]
    max_objects: int
    vocab: int
    classes: int
    crop: bool
    flags: tuple[str, ...]
    trim: bool

    def __post_init__(self) -> None:
        if self.kind not in ("boxes", "centres"):
            raise ValueError(f"kind: unknown name '{self.kind}'{suggest(self.kind, ('boxes', 'centres'))}")
        for flag in self.flags:
            if flag not in FLAGS:
                raise ValueError(f"flags: unknown name '{flag}'{suggest(flag, FLAGS)}")
        if min(self.max_objects, self.classes) < 1:
            raise ValueError("max_objects and classes must be at least 1")
        if self._class_tokens > self.none:
            raise ValueError(
                f"vocab: {self.classes} classes with flags {self.flags} take {self._class_tokens} tokens, and one more "
                f"says 'none'; set vocab to {self._class_tokens + 1} or more"
            )

    @property
    def sections(self) -> int:
        """Lattice points an axis."""
        return math.isqrt(self.vocab)

    @property
    def none(self) -> int:
        """The token of an empty slot."""
        return self.vocab - 1

    @property
    def slot(self) -> int:
        """Tokens an object."""
        return 3 if self.kind == "boxes" else 2

    @property
    def length(self) -> int:
        """Tokens a layout."""
        return self.max_objects * self.slot + 2 * self.crop

    @property
    def _size_steps(self) -> int:
        """Widths, and heights, that a centre with its size tells apart; a layout's ids stay below 2**30."""
        return math.isqrt(2**30 // self.vocab)

    @property
    def _flag_mask(self) -> int:
        return sum(1 << FLAGS.index(flag) for flag in set(self.flags))

    @property
    def _class_tokens(self) -> int:
        return self.classes * (self._flag_mask + 1)

    def tokens(
        self,
        boxes: Array,
        box_classes: Array,
        box_flags: Array,
        crop_box: Array | None = None,
        flip: Array | bool = False,
        sizes: bool = False,
    ) -> Array:
        """Writes layouts as tokens: the objects that the crop touches, in the given order, the first `max_objects`.

        The released code shuffles the objects at each use; here the order is the caller's.

        Args:
          boxes: float [..., n, 4], (x, y, width, height) relative to the whole picture. A box without area (a point)
            counts as touched where it lies in the crop.
          box_classes: int [..., n], -1 for padding.
          box_flags: int [..., n], bits by `FLAGS`.
          crop_box: float [..., 4] or [4], as a box; None is the whole picture.
          flip: bool [...] or one bool: whether the cropped picture is mirrored left to right.
          sizes: whether the token of a centre also says how large its object is, for `invert`; no model reads such.

        Returns:
          int32 [..., length] in [0, vocab), with sizes in [0, 2**30).

        Raises:
          UserError: a class at or above `classes` (numpy only: under jit values are unknown).
        """
        xp = boxes.__array_namespace__()
        if xp is np and np.any(box_classes >= self.classes):
            raise UserError(
                f"box_classes: class {box_classes.max()} in the data, but classes is {self.classes}; raise it"
            )
        batch = box_classes.shape[:-1]
        crop_box = xp.asarray([0, 0, 1, 1] if crop_box is None else crop_box, dtype=boxes.dtype)
        crop_start, crop_end = _corners(xp.broadcast_to(crop_box, (*batch, 4))[..., None, :])
        start, end = _corners(boxes)

        overlap = xp.minimum(end, crop_end) - xp.maximum(start, crop_start)
        touched = xp.all((overlap > 0) | ((overlap == 0) & (start == end)), axis=-1)
        kept = touched & (box_classes >= 0)

        if not self.crop:
            start, end = self._within(start, end, crop_start, crop_end)
        mirrored = xp.asarray(flip)[..., None, None]
        start, end = _mirror(start, end, mirrored)
        points = [start, end] if self.kind == "boxes" else [(start + end) / 2]
        written = list(map(self._point_tokens, points))
        if sizes and self.kind == "centres":
            steps = xp.round(xp.clip(end - start, 0, 1) * (self._size_steps - 1)).astype(xp.int32)
            written[0] = written[0] + self.vocab * (steps[..., 1] * self._size_steps + steps[..., 0])
        names = box_classes + self.classes * (box_flags & self._flag_mask)
        slots = xp.stack([names, *written], axis=-1)

        kept_first = xp.argsort(~kept, axis=-1, stable=True)
        slots = xp.where(kept[..., None], slots, self.none)
        slots = xp.take_along_axis(slots, kept_first[..., None], axis=-2)
        empty = xp.full((*batch, self.max_objects, self.slot), self.none, dtype=slots.dtype)
        slots = xp.concatenate([slots, empty], axis=-2)[..., : self.max_objects, :]
        parts = [slots.reshape(*batch, self.max_objects * self.slot)]
        if self.crop:
            parts += map(self._point_tokens, _mirror(crop_start, crop_end, mirrored))
        return xp.concatenate(parts, axis=-1).astype(xp.int32)

    def invert(self, tokens: Array) -> dict[str, Array]:
        """Reads tokens as layouts, exact to half a lattice step. What was mirrored stays mirrored.

        Args:
          tokens: int [..., length]; sampled ones may be any: a class token that no class has leaves the slot empty,
            points off the lattice move to its edge, and a box that ends before it starts gets no extent.

        Returns:
          "boxes" float32 [..., max_objects, 4], of no extent for centres without sizes, zeros in empty slots;
          "box_classes" int32 [..., max_objects], -1 in empty slots; "box_flags" int32 [..., max_objects]; "crop_box"
          float32 [..., 4], the whole (0, 0, 1, 1) where `crop` is False.
        """
        xp = tokens.__array_namespace__()
        batch = tokens.shape[:-1]
        slots = tokens[..., : self.max_objects * self.slot].reshape(*batch, self.max_objects, self.slot)
        names = slots[..., 0]
        known = (names >= 0) & (names < self._class_tokens)
        if self.kind == "boxes":
            boxes = self._box(slots[..., 1], slots[..., 2])
        else:
            boxes = self._around(slots[..., 1])
        if self.crop:
            crop_box = self._box(tokens[..., -2], tokens[..., -1])
        else:
            crop_box = xp.broadcast_to(xp.asarray([0, 0, 1, 1], dtype=xp.float32), (*batch, 4))
        return {
            "boxes": xp.where(known[..., None], boxes, xp.zeros_like(boxes)),
            "box_classes": xp.where(known, names % self.classes, -1).astype(xp.int32),
            "box_flags": xp.where(known, names // self.classes, 0).astype(xp.int32),
            "crop_box": crop_box,
        }

    def _within(self, start: Array, end: Array, crop_start: Array, crop_end: Array) -> tuple[Array, Array]:
        """Corners relative to the crop, held inside it."""
        xp = start.__array_namespace__()
        size = (end - start) / (crop_end - crop_start)
        start = (start - crop_start) / (crop_end - crop_start)
        inside = xp.clip(start, 0, 1)
        return inside, xp.clip((start if self.trim else inside) + size, 0, 1)

    def _point_tokens(self, points: Array) -> Array:
        """(x, y) in [0, 1] to the token of the nearest lattice point: [..., 2] -> int32 [...]."""
        xp = points.__array_namespace__()
        steps = xp.round(xp.clip(points, 0, 1) * (self.sections - 1)).astype(xp.int32)
        return steps[..., 1] * self.sections + steps[..., 0]

    def _around(self, tokens: Array) -> Array:
        """Boxes float32 [..., 4] around centres int [...], which may hold sizes."""
        xp = tokens.__array_namespace__()
        sizes, centre = xp.maximum(tokens, 0) // self.vocab, tokens % self.vocab
        steps = xp.stack([sizes % self._size_steps, sizes // self._size_steps], axis=-1)
        size = steps.astype(xp.float32) / (self._size_steps - 1)
        return xp.concatenate([self._box(centre, centre)[..., :2] - size / 2, size], axis=-1)

    def _box(self, start: Array, end: Array) -> Array:
        """The box between two lattice points: tokens int [...] twice -> float32 [..., 4]."""
        xp = start.__array_namespace__()

        def point(tokens: Array) -> Array:
            rows = xp.clip(tokens // self.sections, 0, self.sections - 1)
            steps = xp.stack([tokens % self.sections, rows], axis=-1)
            return steps.astype(xp.float32) / max(1, self.sections - 1)

        top_left = point(start)
        return xp.concatenate([top_left, xp.maximum(point(end) - top_left, 0)], axis=-1)


def _corners(boxes: Array) -> tuple[Array, Array]:
    return boxes[..., :2], boxes[..., :2] + boxes[..., 2:]


def _mirror(start: Array, end: Array, mirrored: Array) -> tuple[Array, Array]:
    """Mirrors corners (x, y) left to right where `mirrored`, in coordinates where the picture spans [0, 1]."""
    xp = start.__array_namespace__()

    def beside(a: Array, b: Array) -> Array:
        return xp.where(mirrored, xp.concatenate([1 - b[..., :1], a[..., 1:]], axis=-1), a)

    return beside(start, end), beside(end, start)
