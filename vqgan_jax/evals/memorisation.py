"""Does a model repeat its training set? The nearest training image of each sample, in the features of the FID and then
by LPIPS, measured against how near held-out images come (FID cannot see it: arXiv 2012.09841, appendix E)."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from vqgan_jax.images import grid

_BLOCK = 4096  # rows of the training set compared at once


class Nearest:
    """The nearest neighbours of a few queries in a stream of many features; memory does not grow with the stream."""

    def __init__(self, queries: np.ndarray, neighbours: int = 1):
        """`queries` [n, d], the same on all hosts; `neighbours`: how many of each are kept."""
        self._queries = np.asarray(queries, np.float64)
        self._norms = np.square(self._queries).sum(1)
        self._k = neighbours
        self._squares = np.full((len(queries), neighbours), np.inf)
        self._indices = np.full((len(queries), neighbours), -1, np.int64)

    def add(self, features: np.ndarray, indices: np.ndarray) -> None:
        """Compares with features [m, d] of the training images `indices` [m]; on several hosts each with its own."""
        for start in range(0, len(features), _BLOCK):
            block = np.asarray(features[start : start + _BLOCK], np.float64)
            squares = self._norms[:, None] - 2 * self._queries @ block.T + np.square(block).sum(1)
            self._merge(np.maximum(squares, 0), np.broadcast_to(indices[start : start + _BLOCK], squares.shape))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(Euclidean distances, indices) [n, neighbours], nearest first, over all hosts."""
        if jax.process_count() > 1:
            gathered = multihost_utils.process_allgather((self._squares.view(np.uint32), self._indices))
            squares, indices = (np.ascontiguousarray(np.concatenate(list(x), axis=1)) for x in gathered)
            self._squares[:], self._indices[:] = np.inf, -1
            self._merge(squares.view(np.float64), indices.astype(np.int64))
        return np.sqrt(self._squares), self._indices

    def _merge(self, squares: np.ndarray, indices: np.ndarray) -> None:
        squares = np.concatenate([self._squares, squares], axis=1)
        indices = np.concatenate([self._indices, indices], axis=1)
        order = np.lexsort((indices, squares), axis=1)[:, : self._k]  # of equals the first, in any order of arrival
        self._squares, self._indices = (np.take_along_axis(x, order, axis=1) for x in (squares, indices))


def nearest_by(
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
    pictures: np.ndarray,
    candidates: np.ndarray,
    read: Callable[[int], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses among a few candidates each the nearest by another distance: (distances [n], indices [n]).

    Args:
      distance: two batches uint8 [m, h, w, 3] -> [m].
      pictures: uint8 [n, h, w, 3].
      candidates: int [n, k], indices of training images, -1 for none.
      read: index -> uint8 [h, w, 3].
    """
    distances, chosen = np.full(len(pictures), np.inf), np.full(len(pictures), -1, np.int64)
    for row, (picture, indices) in enumerate(zip(pictures, candidates, strict=True)):
        indices = indices[indices >= 0]
        if len(indices):
            theirs = np.stack([read(int(index)) for index in indices])
            found = np.asarray(distance(np.broadcast_to(picture, theirs.shape), theirs))
            distances[row], chosen[row] = found.min(), indices[found.argmin()]
    return distances, chosen


def closer_share(samples: np.ndarray, held_out: np.ndarray) -> float:
    """How often a sample lies closer to the training set than a held-out image does, over all pairs of the distances
    [n] and [m]; ties count half. 0.5: as far as new images are; 1: copies; below 0.5: unlike the training set."""
    ordered = np.sort(held_out)
    above = len(ordered) - np.searchsorted(ordered, samples, side="right")
    ties = np.searchsorted(ordered, samples, side="right") - np.searchsorted(ordered, samples, side="left")
    return float((above + ties / 2).mean() / len(ordered))


def copy_share(samples: np.ndarray, held_out: np.ndarray, percentile: float = 1.0) -> float:
    """The share of samples closer to the training set than all but `percentile` % of the held-out images: about that
    share is expected of a model that does not copy."""
    return float((samples < np.percentile(held_out, percentile)).mean())


def sheet(samples: np.ndarray, nearest: np.ndarray, pairs: int = 4) -> np.ndarray:
    """Samples uint8 [n, h, w, 3], each with its nearest training image on its right, `pairs` of them a row."""
    return grid(np.stack([samples, nearest], axis=1).reshape(-1, *samples.shape[1:]), columns=2 * pairs)
