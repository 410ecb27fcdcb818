"""Conditional fidelity: is what was asked for in the pictures?

One check a batch key. `low_res` and `edges` follow from a picture alone, so the data's own transform derives them.
Segmentation, depth, key points and boxes are read off colours, by tables fitted to real images. Labels: classifier.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter
from scipy.spatial import cKDTree

from vqgan_jax import drawing
from vqgan_jax.evals.pixels import EXACT_PSNR
from vqgan_jax.images import to_uint8

Batch = Mapping[str, np.ndarray]
Derive = Callable[[np.ndarray], np.ndarray]  # pictures uint8 [n, h, w, 3] -> a batch key
Check = Callable[[np.ndarray, Batch], Mapping[str, np.ndarray]]
"""(pictures uint8 [n, h, w, 3], what was asked for) -> measures [n], NaN where nothing was asked of a picture."""

_BITS, _BANDS = 4, 4  # of each colour channel in the table; of the height
_LEVELS = 1 << _BITS
_ROWS = 64  # pictures that are counted at once: thousands of 256 x 256 pixels would take gigabytes by the temporary
_DEPTH_STEP = 0.1  # of two depths in [-1, 1] whose order counts
_ALIKE = 8  # crops that tell a position
_NEAR = 1 / 32  # of the height: so far off a key point's thing may be


def pixel_agreement(derived: np.ndarray, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Segmentations int [n, h, w] each: the share of pixels with the label asked for."""
    return {"agreement": (derived == asked).mean(axis=(1, 2))}


def picture_consistency(derived: np.ndarray, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures float [n, h, w, c] in [-1, 1] each: `l1`, and `psnr` in dB, at most 100."""
    squares = np.square(derived - asked, dtype=np.float64).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        psnr = 10 * np.log10(4 / squares)
    return {"l1": np.abs(derived - asked).mean(axis=(1, 2, 3)), "psnr": np.minimum(psnr, EXACT_PSNR)}


def edge_overlap(derived: np.ndarray, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Edge maps float [n, h, w, 1] in [-1, 1], above 0 on an edge: `f1`, the harmonic mean of precision and recall of
    edge pixels (1 where neither has one), and `f1_near`, where the next pixel is as good."""
    a, b = (x[..., 0] > 0 for x in (derived, asked))
    found = {}
    for name, size in (("f1", 1), ("f1_near", 3)):
        window = (1, size, size)
        both = (a & maximum_filter(b, window)).sum((1, 2)), (b & maximum_filter(a, window)).sum((1, 2))
        precision, recall = (x / np.maximum(y.sum((1, 2)), 1) for x, y in zip(both, (a, b), strict=True))
        either = a.any((1, 2)) | b.any((1, 2))
        found[name] = np.where(either, 2 * precision * recall / np.maximum(precision + recall, 1e-9), 1.0)
    return found


def depth_order(estimated: np.ndarray, asked: np.ndarray) -> dict[str, np.ndarray]:
    """Depth float [n, h, w] each: `order`, the share of pairs of pixels that come in the order asked for; equal ones
    count half. Pairs are of one row, where height in the picture, which goes with depth, says nothing."""
    width = asked.shape[2]
    right, pairs = np.zeros(len(asked)), np.zeros(len(asked))
    for shift in {max(1, width // part) for part in (8, 4, 2)}:
        steps, guesses = (x[:, :, shift:] - x[:, :, :-shift] for x in (asked, estimated))
        counted = np.abs(steps) > _DEPTH_STEP
        same = np.where(guesses == 0, 0.5, np.sign(guesses) == np.sign(steps))
        right, pairs = right + (counted * same).sum((1, 2)), pairs + counted.sum((1, 2))
    return {"order": _share(right, pairs)}


def filled_colour(pictures: np.ndarray, originals: np.ndarray, given: np.ndarray) -> np.ndarray:
    """How far the mean colour of what was filled in is from that of the original's part: [n] in [0, 255].

    Args:
      pictures: uint8 [n, h, w, 3].
      originals: uint8 [n, h, w, 3].
      given: bool [n, h, w], what was not filled in.
    """
    hole = ~given[..., None]
    means = [(x * hole).sum((1, 2)) / np.maximum(hole.sum((1, 2)), 1) for x in (pictures, originals)]
    return np.abs(means[0] - means[1]).mean(-1)


class ColourTable:
    """What a pixel shows, by its colour: for each of 16^3 colours, in each quarter of the height, what it has in real
    images; a colour never seen takes that of the nearest seen one. Right where things differ in colour, as in the
    embedded scenes."""

    def __init__(self, values: np.ndarray, seen: np.ndarray):
        """`values` by cell, and bool `seen`: which of them mean something."""
        shape = (_BANDS, *(_LEVELS,) * 3)
        places = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
        self._values = values[np.flatnonzero(seen)[cKDTree(places[seen]).query(places)[1]]]

    @classmethod
    def of_labels(cls, pictures: np.ndarray, labels: np.ndarray) -> "ColourTable":
        """The commonest label. Pictures uint8 [n, h, w, 3], labels int [n, h, w] >= 0."""
        classes = int(labels.max()) + 1
        counts = np.zeros(_BANDS * _LEVELS**3 * classes, np.int64)
        for part in _parts(len(pictures)):
            cells = _cells(pictures[part]) * classes + labels[part]
            counts += np.bincount(cells.ravel(), minlength=len(counts))
        counts = counts.reshape(-1, classes)
        return cls(counts.argmax(1), counts.sum(1) > 0)

    @classmethod
    def of_means(cls, pictures: np.ndarray, values: np.ndarray) -> "ColourTable":
        """The mean value. Pictures uint8 [n, h, w, 3], values float [n, h, w]."""
        length = _BANDS * _LEVELS**3
        counts, sums = np.zeros(length, np.int64), np.zeros(length)
        for part in _parts(len(pictures)):
            cells = _cells(pictures[part]).ravel()
            counts += np.bincount(cells, minlength=length)
            sums += np.bincount(cells, values[part].ravel(), length)
        return cls(sums / np.maximum(counts, 1), counts > 0)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """What pictures uint8 [n, h, w, 3] show: [n, h, w]."""
        return self._values[_cells(pictures)]


class SegmentationCheck:
    """The share of pixels whose colour shows the label asked for."""

    def __init__(self, real: Batch):
        self._table = ColourTable.of_labels(real["image"], real["segmentation"])

    def __call__(self, pictures: np.ndarray, asked: Batch) -> dict[str, np.ndarray]:
        return pixel_agreement(self._table(pictures), asked["segmentation"])


class DepthCheck:
    """Depth order, of the mean depth that a colour has."""

    def __init__(self, real: Batch):
        self._table = ColourTable.of_means(real["image"], real["depth"][..., 0])

    def __call__(self, pictures: np.ndarray, asked: Batch) -> dict[str, np.ndarray]:
        return depth_order(self._table(pictures), asked["depth"][..., 0])


class BoxCheck:
    """`found`: the share of boxes that hold at least half as much of their class as real ones do.

    Which label of the segmentation a class of boxes is, is the one that its real boxes hold the most of, against what
    the pictures hold of it.
    """

    def __init__(self, real: Batch):
        self._table = ColourTable.of_labels(real["image"], real["segmentation"])
        overall = _label_shares(real["segmentation"])
        labels = len(overall)
        shares = [
            (name, np.bincount(inside.ravel(), minlength=labels) / inside.size)
            for k in range(len(real["image"]))
            for name, inside in _inside_boxes(real["segmentation"][k], real, k)
        ]
        self._label, self._enough = {}, {}
        for name in {name for name, _ in shares}:
            mean = np.mean([share for other, share in shares if other == name], axis=0)
            self._label[name] = int((mean / np.maximum(overall, 1e-3)).argmax())
            self._enough[name] = mean[self._label[name]] / 2

    def __call__(self, pictures: np.ndarray, asked: Batch) -> dict[str, np.ndarray]:
        seen = self._table(pictures)
        found = np.zeros((2, len(pictures)))
        for k, picture in enumerate(seen):
            for name, inside in _inside_boxes(picture, asked, k):
                if name in self._label:
                    found[:, k] += (inside == self._label[name]).mean() >= self._enough[name], 1
        return {"found": _share(*found)}


class KeypointCheck:
    """`found`: the share of points, of a picture drawn by `drawing.keypoints`, near which there is what they stand for.

    That is read off real images: the labels that a point's pixels have far more often than all pixels.
    """

    def __init__(self, real: Batch):
        self._table = ColourTable.of_labels(real["image"], real["segmentation"])
        overall = _label_shares(real["segmentation"])
        labels = len(overall)
        counts = np.zeros(len(_COLOURS) * labels, np.int64)
        for part in _parts(len(real["keypoints"])):
            points = _points(real["keypoints"][part])
            marked = points >= 0
            cells = points[marked] * labels + real["segmentation"][part][marked]
            counts += np.bincount(cells, minlength=len(counts))
        counts = counts.reshape(-1, labels)
        lift = counts / np.maximum(counts.sum(1, keepdims=True), 1) / np.maximum(overall, 1e-3)
        self._stands_for = (lift > 0) & (lift >= lift.max(1, keepdims=True) / 2)

    def __call__(self, pictures: np.ndarray, asked: Batch) -> dict[str, np.ndarray]:
        seen, points = self._table(pictures), _points(asked["keypoints"])
        reach = max(1, round(_NEAR * pictures.shape[1]))
        found = np.zeros((2, len(pictures)))
        for k in range(len(pictures)):
            for point in np.unique(points[k][points[k] >= 0]):
                y, x = (round(float(n.mean())) for n in np.nonzero(points[k] == point))
                around = seen[k, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
                labels = around[around < self._stands_for.shape[1]]
                found[:, k] += self._stands_for[point, labels].any(), 1
        return {"found": _share(*found)}


class PositionReader:
    """Where in a larger picture a crop was cut out: the mean of the real crops that look most like it, by their mean
    colours over 8 x 8 blocks."""

    def __init__(self, crops: np.ndarray, centres: np.ndarray):
        """Knows crops uint8 [n, h, w, 3] whose centres (y, x) are float [n, 2] in [0, 1]."""
        self._tree, self._centres = cKDTree(self._features(crops)), centres

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        """The centres (y, x) of crops uint8 [n, h, w, 3]: [n, 2]."""
        return self._centres[self._tree.query(self._features(crops), k=_ALIKE)[1]].mean(axis=1)

    def _features(self, crops: np.ndarray) -> np.ndarray:
        n, h, w, c = crops.shape
        blocks = crops[:, : h // 8 * 8, : w // 8 * 8].reshape(n, 8, h // 8, 8, w // 8, c)
        return blocks.mean((2, 4)).reshape(n, -1)


class Learnt(NamedTuple):
    """A check that is made of real examples: `make(examples)`, arrays by the batch keys `image` and `keys`."""

    keys: Sequence[str]
    make: Callable[[Batch], Check]


LEARNT = {
    "segmentation": Learnt(("segmentation",), SegmentationCheck),
    "depth": Learnt(("depth",), DepthCheck),
    "keypoints": Learnt(("segmentation", "keypoints"), KeypointCheck),
    "boxes": Learnt(("segmentation", "boxes", "box_classes"), BoxCheck),
}
FROM_PICTURE = {"low_res": picture_consistency, "edges": edge_overlap}
CHECKS = (*LEARNT, *FROM_PICTURE)


def check_of_picture(key: str, derive: Derive) -> Check:
    """The check of a key that follows from a picture alone, one of FROM_PICTURE."""
    return lambda pictures, asked: FROM_PICTURE[key](derive(pictures), asked[key])


def from_transform(transform: Callable[[Batch, np.random.Generator], Batch], key: str) -> Derive:
    """Derives `key` from each picture as the data's transform does from a real one."""

    def derive(pictures: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.stack([transform({"image": picture}, rng)[key] for picture in pictures])

    return derive


_COLOURS = drawing.palette(64)  # of the first points; a point's colour does not depend on how many there are


def _points(drawn: np.ndarray) -> np.ndarray:
    """Pictures of key points float [n, h, w, 3] in [-1, 1] to the point at each pixel int [n, h, w], -1 for none."""
    places = np.array([1 << 16, 1 << 8, 1], np.int32)
    codes, known = to_uint8(drawn) @ places, _COLOURS @ places
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, codes, sorter=order), len(known) - 1)
    return np.where(known[order[place]] == codes, order[place], -1)


def _inside_boxes(labels: np.ndarray, batch: Batch, k: int) -> list[tuple[int, np.ndarray]]:
    """Class and what is inside, int [., .], of each box of example k, in its labels int [h, w]."""
    height, width = labels.shape
    found = []
    for (x, y, w, h), name in zip(batch["boxes"][k], batch["box_classes"][k], strict=True):
        if "crop_box" in batch:  # boxes are relative to the whole picture
            left, top, across, down = batch["crop_box"][k]
            x, y, w, h = (x - left) / across, (y - top) / down, w / across, h / down
        columns = slice(max(0, int(x * width)), max(0, int(np.ceil((x + w) * width - 1e-4))))
        rows = slice(max(0, int(y * height)), max(0, int(np.ceil((y + h) * height - 1e-4))))
        if name >= 0 and (inside := labels[rows, columns]).size:
            found.append((int(name), inside))
    return found


def _parts(count: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]


def _label_shares(labels: np.ndarray) -> np.ndarray:
    """Of all pixels int [n, h, w] the share that has each label, [highest label + 1]."""
    count = int(labels.max()) + 1
    return sum(np.bincount(labels[part].ravel(), minlength=count) for part in _parts(len(labels))) / labels.size


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _cells(pictures: np.ndarray) -> np.ndarray:
    """Which of the table's cells each pixel of pictures uint8 [n, h, w, 3] is in: int32 [n, h, w]."""
    r, g, b = np.moveaxis(pictures >> (8 - _BITS), -1, 0)
    height = pictures.shape[1]
    band = (np.arange(height, dtype=np.int32) * _BANDS // height)[:, None]
    return ((band * _LEVELS + r) * _LEVELS + g) * _LEVELS + b
