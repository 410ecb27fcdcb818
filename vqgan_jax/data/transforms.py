"""From a raw example to arrays of one size: resize, crop and flip, together on the image and all that describes it.

One `View` (a rectangle of the source picture, perhaps mirrored) is drawn for each example, and every kind of data is
sampled through it; `size` is (height, width) in pixels, or the side of a square. The reference resizes without
antialiasing and blends segmentation ids; the first is an option here (`bilinear_no_antialias`), the second is not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax import drawing
from vqgan_jax.config import UserError, choose, suggest
from vqgan_jax.data import derived
from vqgan_jax.data.source import Example
from vqgan_jax.images import from_uint8

try:
    import cv2
except ImportError:  # the extra in requirements-fast.txt
    cv2 = None
else:
    cv2.setNumThreads(1)  # the pipeline reads in threads of its own

Array = np.ndarray
Size = int | tuple[int, int]

ANTIALIASED = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
NO_ANTIALIAS = "bilinear_no_antialias"
FILTERS = (*ANTIALIASED, NO_ANTIALIAS)
CROPS = ("random", "center", "random_resized")


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


class View(NamedTuple):
    """The part of a picture that is kept: top left corner and extent in source pixels, and whether it is mirrored."""

    x: float
    y: float
    width: float
    height: float
    flip: bool = False


def choose_view(
    height: int,
    width: int,
    size: Size,
    crop: str,
    crop_scale: tuple[float, ...],
    flip: bool,
    rng: np.random.Generator,
    *,
    resize_to: int = 0,
) -> View:
    """Draws the view of a picture [height, width] that becomes one of `size`.

    "random" and "center" are the crop that follows a resize, to where the picture just covers `size` and its short side
    has at least `resize_to`: the corner lies on the grid of the resized picture. "random_resized" takes a rectangle of
    the size's proportions whose area is a share, uniform in `crop_scale`, of that of the largest one, anywhere in the
    picture. `flip` mirrors half of the pictures.
    """
    h, w = sides(size)
    if crop == "random_resized":
        scale = min(height / h, width / w) * math.sqrt(rng.uniform(*crop_scale))
        extent = max(1.0, w * scale), max(1.0, h * scale)
        x, y = rng.uniform(0, width - extent[0]), rng.uniform(0, height - extent[1])
    else:
        asked = (h, height), (w, width), (resize_to, min(height, width))
        target, of = max(asked, key=lambda pair: pair[0] / pair[1])
        resized_height, resized_width = max(h, round(height * target / of)), max(w, round(width * target / of))
        spare = resized_height - h, resized_width - w
        top, left = (int(rng.integers(n + 1)) for n in spare) if crop == "random" else (n // 2 for n in spare)
        x_scale, y_scale = width / resized_width, height / resized_height
        x, y = left * x_scale, top * y_scale
        extent = w * x_scale, h * y_scale
    return View(x, y, *extent, flip=bool(flip and rng.random() < 0.5))


def sample_image(image: Array, view: View, size: Size, resize: str) -> Array:
    """uint8 [h, w, 3] seen through `view` as uint8 [*size, 3]; `resize` is one of FILTERS."""
    x, y, width, height, flip = view
    h, w = sides(size)
    if (height, width) == (h, w) and x == int(x) and y == int(y):  # nothing to resample
        out = image[int(y) : int(y) + h, int(x) : int(x) + w]
    elif resize == NO_ANTIALIAS:
        out = _crop_of_resized(image, view, size) if cv2 else None
        if out is None:
            out = np.rint(_bilinear(image, view, size)).astype(np.uint8)
    else:
        corners = (x, y, min(x + width, image.shape[1]), min(y + height, image.shape[0]))
        out = np.asarray(Image.fromarray(image).resize((w, h), ANTIALIASED[resize], box=corners))
    return out[:, ::-1] if flip else out


def on_grid_of(view: View, height: int, width: int, other: Array) -> View:
    """The view of a picture [height, width] on a map of the same scene that has other sides, such as a mask."""
    if other.shape[:2] == (height, width):
        return view
    y, x = other.shape[0] / height, other.shape[1] / width
    return View(view.x * x, view.y * y, view.width * x, view.height * y, view.flip)


def sample_segmentation(segmentation: Array, view: View, size: Size) -> Array:
    """Integer ids [h, w] seen through `view` as int32 of `size`: the nearest id, never a blend."""
    spans = (view.y, view.height), (view.x, view.width)
    rows, columns = (
        np.clip(np.floor(start + (np.arange(m) + 0.5) * extent / m).astype(np.intp), 0, n - 1)
        for (start, extent), n, m in zip(spans, segmentation.shape, sides(size), strict=True)
    )
    out = segmentation[rows[:, None], columns[None]].astype(np.int32)
    return out[:, ::-1] if view.flip else out


def sample_depth(depth: Array, view: View, size: Size) -> Array:
    """Depth float32 [h, w] in [0, 1] seen through `view` as float32 [*size, 1] in [-1, 1]."""
    x, y, width, height, flip = view
    corners = (x, y, min(x + width, depth.shape[1]), min(y + height, depth.shape[0]))
    picture = Image.fromarray(np.ascontiguousarray(depth, np.float32))
    out = np.asarray(picture.resize(sides(size)[::-1], Image.Resampling.BILINEAR, box=corners))[..., None] * 2 - 1
    return out[:, ::-1] if flip else out


def sample_boxes(boxes: Array, view: View, height: int, width: int) -> tuple[Array, Array]:
    """Boxes float32 [n, 4] (x, y, w, h, relative to a picture [height, width]) relative to `view` and clipped to it.

    Returns:
      the boxes [n, 4], and visible bool [n]: False for a box of which nothing is left.
    """
    scale = np.array([width / view.width, height / view.height], np.float32)
    shift = np.array([view.x / width, view.y / height], np.float32)
    low = np.clip((boxes[:, :2] - shift) * scale, 0, 1)
    high = np.clip((boxes[:, :2] + boxes[:, 2:] - shift) * scale, 0, 1)
    extent = high - low
    if view.flip:
        low = np.stack([1 - high[:, 0], low[:, 1]], axis=1)
    return np.concatenate([low, extent], axis=1).astype(np.float32), (extent > 0).all(axis=1)


def sample_keypoints(points: Array, mirrored: Array, view: View, height: int, width: int) -> Array:
    """Points float32 [n, 3] (x, y relative to a picture [height, width], seen) relative to `view`.

    Args:
      points: in the picture.
      mirrored: int [n], which point each is in a mirrored picture, where left and right change places.
      view: what is seen.
      height: of the picture.
      width: of the picture.

    Returns:
      [n, 3], all zeros for a point that is not seen.
    """
    x = (points[:, 0] * width - view.x) / view.width
    y = (points[:, 1] * height - view.y) / view.height
    seen = (points[:, 2] > 0) & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    moved = np.stack([1 - x if view.flip else x, y, np.ones_like(x)], axis=1) * seen[:, None]
    return (moved[mirrored] if view.flip else moved).astype(np.float32)


def sample_coords(view: View, height: int, width: int, size: Size) -> Array:
    """Where the view's pixels stand in the picture (mirrored where the view is): (y, x) in [0, 1], [*size, 2]."""
    x, y, w, h = crop_box(view, height, width)
    down, across = ((np.arange(n, dtype=np.float32) + np.float32(0.5)) / np.float32(n) for n in sides(size))
    return np.stack(np.meshgrid(y + down * h, x + across * w, indexing="ij"), axis=-1)


def crop_box(view: View, height: int, width: int) -> Array:
    """The view as a box float32 [4] (x, y, w, h) relative to the picture, which is mirrored where the view is."""
    x = width - view.x - view.width if view.flip else view.x
    box = np.array([x / width, view.y / height, view.width / width, view.height / height], np.float32)
    return np.clip(box, 0, 1)


def _crop_of_resized(image: Array, view: View, size: Size) -> Array | None:
    """`_bilinear` by OpenCV as uint8, within one level of it; None unless the view is a crop of the resized picture."""
    ends, starts, (h, w) = [], [], sides(size)
    for start, extent, n, m in ((view.y, view.height, image.shape[0], h), (view.x, view.width, image.shape[1], w)):
        end = round(m * n / extent)
        offset = round(start * end / n)
        if abs(m * n / end - extent) > 1e-6 or abs(offset * n / end - start) > 1e-6:
            return None
        ends.append(end)
        starts.append(offset)
    resized = cv2.resize(image, tuple(ends[::-1]), interpolation=cv2.INTER_LINEAR)
    return resized[starts[0] : starts[0] + h, starts[1] : starts[1] + w]


def _bilinear(image: Array, view: View, size: Size) -> Array:
    """Bilinear samples at half-pixel centres without antialiasing, as OpenCV resizes: float32 [*size, c]."""
    h, w = sides(size)
    (top, bottom, fy), (left, right, fx) = (
        _neighbours(start + (np.arange(m) + 0.5) * extent / m - 0.5, n)
        for start, extent, n, m in ((view.y, view.height, image.shape[0], h), (view.x, view.width, image.shape[1], w))
    )
    rows = image[top] * (1 - fy[:, None, None]) + image[bottom] * fy[:, None, None]
    return rows[:, left] * (1 - fx[:, None]) + rows[:, right] * fx[:, None]


def _neighbours(position: Array, n: int) -> tuple[Array, Array, Array]:
    position = np.clip(position, 0, n - 1)
    before = np.floor(position).astype(np.intp)
    return before, np.minimum(before + 1, n - 1), (position - before).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Transform:
    """Turns a raw example of a `Source` into the arrays of one batch row.

    Fields:
      keys: the batch keys to make, of KEYS.
      size: of the result.
      resize: the filter for images, one of FILTERS.
      crop: one of CROPS.
      crop_scale: (low, high) share of the area for "random_resized".
      flip: mirror half of the examples.
      max_boxes: rows of `boxes`; of more boxes those of which most is seen are kept. Boxes are relative to what is
        seen and clipped to it; with `crop_box` among the keys they are relative to the whole picture that it is cut
        from, mirrored as it is, and those that it touches stay.
      classes: number of labels.
      resize_to: what the short side is resized to before the crop; 0 is `size`.
      low_res_factor: by how much `low_res` is coarser than the picture.
    """

    keys: tuple[str, ...]
    size: Size
    resize: Literal["box", "bilinear", "bicubic", "lanczos", "bilinear_no_antialias"]
    crop: Literal["random", "center", "random_resized"]
    crop_scale: tuple[float, ...]
    flip: bool
    max_boxes: int
    classes: int
    resize_to: int
    low_res_factor: int

    def __post_init__(self):
        for key in self.keys:
            choose("data key", key, KEYS)
        choose("config.data.resize", self.resize, dict.fromkeys(FILTERS))
        choose("config.data.crop", self.crop, dict.fromkeys(CROPS))
        if self.crop == "random_resized" and not (
            len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        ):
            raise UserError(f"config.data.crop_scale: takes 0 < low <= high <= 1, got {self.crop_scale}")
        if "low_res" in self.keys and not 1 <= self.low_res_factor <= min(sides(self.size)):
            raise UserError(
                f"config.data.low_res_factor: {self.low_res_factor}; it is 1 or more, and at most the picture's size"
            )
        if self.resize_to and self.resize_to < min(sides(self.size)):
            raise UserError(
                f"config.data.resize_to: {self.resize_to} is less than config.data.image_size={self.size}, which is "
                "cut out afterwards; 0 resizes to that"
            )

    @classmethod
    def from_config(cls, data: ConfigDict, *, keys: tuple[str, ...], classes: int, train: bool) -> "Transform":
        """The transform that `config.data` describes; with `train=False` the centre crop, never mirrored."""
        return cls(
            keys=tuple(keys),
            size=data.image_size if isinstance(data.image_size, int) else tuple(data.image_size),
            resize=data.resize,
            crop=data.crop if train else "center",
            crop_scale=tuple(data.crop_scale),
            flip=bool(data.flip and train),
            max_boxes=data.max_boxes,
            classes=classes,
            resize_to=data.resize_to,
            low_res_factor=data.low_res_factor,
        )

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Array]:
        """Makes the row's arrays, without a batch axis.

        Args:
          example: as `Source` describes it.
          rng: where crop and mirroring come from.

        Raises:
          UserError: the source has no such data, or a label is no class.
        """
        return self.through(self.view(example, rng), example)

    def view(self, example: Example, rng: np.random.Generator) -> View:
        """The view of this example that `rng` draws."""
        height, width = example["image"].shape[:2]
        return choose_view(
            height, width, self.size, self.crop, self.crop_scale, self.flip, rng, resize_to=self.resize_to
        )

    def through(self, view: View, example: Example) -> dict[str, Array]:
        """The row's arrays, all seen through one view. Raises as `__call__` does."""
        return {key: KEYS[key](self, example, view) for key in self.keys}

    def _image(self, example: Example, view: View) -> Array:
        return from_uint8(sample_image(example["image"], view, self.size, self.resize))

    def _label(self, example: Example, view: View) -> Array:
        label = _take(example, "label")
        if not 0 <= label < self.classes:
            raise UserError(
                f"config.data.source: an example has the label {label}, the classes are 0 to {self.classes - 1}"
            )
        return np.int32(label)

    def _segmentation(self, example: Example, view: View) -> Array:
        segmentation = _take(example, "segmentation")
        view = on_grid_of(view, *example["image"].shape[:2], segmentation)
        return sample_segmentation(segmentation, view, self.size)

    def _depth(self, example: Example, view: View) -> Array:
        depth = _take(example, "depth")
        return sample_depth(depth, on_grid_of(view, *example["image"].shape[:2], depth), self.size)

    def _keypoints(self, example: Example, view: View) -> Array:
        points = _take(example, "keypoints")
        mirrored = example.get("keypoints_mirrored", np.arange(len(points)))
        moved = sample_keypoints(points, mirrored, view, *example["image"].shape[:2])
        return from_uint8(drawing.keypoints(moved, *sides(self.size)))

    def _edges(self, example: Example, view: View) -> Array:
        return derived.canny_edges(sample_image(example["image"], view, self.size, self.resize))

    def _low_res(self, example: Example, view: View) -> Array:
        pixels = sample_image(example["image"], view, self.size, self.resize)
        return from_uint8(derived.low_resolution(pixels, self.low_res_factor))

    def _coords(self, example: Example, view: View) -> Array:
        return sample_coords(view, *example["image"].shape[:2], self.size)

    def _crop_box(self, example: Example, view: View) -> Array:
        return crop_box(view, *example["image"].shape[:2])

    def _boxes(self, example: Example, view: View) -> Array:
        boxes, kept = self._kept_boxes(example, view)
        return _padded(boxes[kept], self.max_boxes, 0)

    def _box_classes(self, example: Example, view: View) -> Array:
        _, kept = self._kept_boxes(example, view)
        return _padded(_take(example, "box_classes")[kept].astype(np.int32), self.max_boxes, -1)

    def _box_flags(self, example: Example, view: View) -> Array:
        _, kept = self._kept_boxes(example, view)
        flags = example.get("box_flags", np.zeros(len(example["boxes"]), np.int32))
        return _padded(flags[kept].astype(np.int32), self.max_boxes, 0)

    def _kept_boxes(self, example: Example, view: View) -> tuple[Array, Array]:
        """All boxes as the batch has them, and the indices of those that stay, in the source's order."""
        height, width = example["image"].shape[:2]
        boxes, visible = sample_boxes(_take(example, "boxes"), view, height, width)
        kept = np.flatnonzero(visible & (_take(example, "box_classes") >= 0))
        areas = boxes[kept, 2] * boxes[kept, 3]
        kept = np.sort(kept[np.argsort(-areas, kind="stable")[: self.max_boxes]])
        if "crop_box" in self.keys:
            boxes, _ = sample_boxes(example["boxes"], View(0, 0, width, height, view.flip), height, width)
        return boxes, kept


def _take(example: Example, key: str) -> Any:
    if key not in example:
        raise UserError(f"config.data.source: its examples have no '{key}'{suggest(key, example)}")
    return example[key]


def _padded(rows: Array, length: int, value: int) -> Array:
    padding = np.full((length - len(rows), *rows.shape[1:]), value, rows.dtype)
    return np.concatenate([rows, padding])


KEYS: dict[str, Callable[[Transform, Example, View], Array]] = {
    "image": Transform._image,
    "label": Transform._label,
    "segmentation": Transform._segmentation,
    "depth": Transform._depth,
    "boxes": Transform._boxes,
    "box_classes": Transform._box_classes,
    "box_flags": Transform._box_flags,
    "crop_box": Transform._crop_box,
    "coords": Transform._coords,
    "keypoints": Transform._keypoints,
    "edges": Transform._edges,
    "low_res": Transform._low_res,
}
