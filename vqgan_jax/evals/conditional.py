"""Conditional fidelity: the condition is derived again from the sample and compared with what was asked for.

CHECKS holds one measure a batch key. `low_res` and `edges` follow from a picture alone, so the data's own transform
derives them; a segmentation is read off colours, by a table fitted to real images. Labels: see classifier.py.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.spatial import cKDTree

from vqgan_jax.evals.pixels import EXACT_PSNR

Derive = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # pictures uint8 [n, h, w, 3] -> batch keys
Check = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]  # (derived, asked) -> measures [n]

_LEVELS, _BANDS = 16, 4  # of each colour channel in the table, and of the height


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
    edge pixels (1 where neither has one)."""
    a, b = (x.reshape(len(x), -1) > 0 for x in (derived, asked))
    both, either = (a & b).sum(1), a.sum(1) + b.sum(1)
    return {"f1": np.where(either > 0, 2 * both / np.maximum(either, 1), 1.0)}


CHECKS: dict[str, Check] = {
    "segmentation": pixel_agreement,
    "low_res": picture_consistency,
    "edges": edge_overlap,
}
FROM_PICTURE = ("low_res", "edges")  # what the data's transform makes of a picture alone


class ColourTable:
    """Labels pixels by their colour: for each of 16^3 colours, in each quarter of the height, the label it most often
    has in real images; one never seen takes that of the nearest seen one. Right where classes differ in colour, as in
    the embedded scenes."""

    def __init__(self) -> None:
        self._counts: np.ndarray | None = None
        self._labels: np.ndarray | None = None

    def add(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        """Counts real pictures uint8 [n, h, w, 3] with their labels int [n, h, w] >= 0."""
        classes = int(labels.max()) + 1
        cells = _cells(pictures).ravel() * classes + labels.ravel()
        counts = np.bincount(cells, minlength=_BANDS * _LEVELS**3 * classes).reshape(-1, classes)
        if self._counts is None:
            self._counts = counts
        else:
            wide = max(classes, self._counts.shape[1])
            pad = [np.pad(x, ((0, 0), (0, wide - x.shape[1]))) for x in (self._counts, counts)]
            self._counts = pad[0] + pad[1]
        self._labels = None

    def __call__(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """Labels int [n, h, w] of pictures uint8 [n, h, w, 3], under the key `segmentation`."""
        if self._counts is None:
            raise ValueError("the colour table has seen no labelled picture")
        if self._labels is None:
            seen = self._counts.sum(1) > 0
            shape = (_BANDS, *(_LEVELS,) * 3)
            places = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
            nearest = cKDTree(places[seen]).query(places)[1]
            self._labels = self._counts.argmax(1)[np.flatnonzero(seen)[nearest]]
        return {"segmentation": self._labels[_cells(pictures)]}


def from_transform(transform: Callable[[Mapping[str, np.ndarray], np.random.Generator], Mapping], key: str) -> Derive:
    """Derives `key` from each picture as the data's transform does from a real one."""

    def derive(pictures: np.ndarray) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        return {key: np.stack([transform({"image": picture}, rng)[key] for picture in pictures])}

    return derive


def _cells(pictures: np.ndarray) -> np.ndarray:
    r, g, b = np.moveaxis(pictures.astype(np.int64) * _LEVELS // 256, -1, 0)
    height = pictures.shape[1]
    band = (np.arange(height) * _BANDS // height)[:, None]
    return ((band * _LEVELS + r) * _LEVELS + g) * _LEVELS + b
