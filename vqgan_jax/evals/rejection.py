"""Rejection sampling by a classifier (arXiv 2012.09841, Table 4, after arXiv 1906.00446): of the pictures drawn of each
class, the share that the classifier takes for that class most surely is kept."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vqgan_jax.config import UserError
from vqgan_jax.evals.features import Images


def labels_to_draw(labels: np.ndarray, rate: float) -> np.ndarray:
    """The classes to draw so that `labels` [n] are left: ceil(count / rate) of each, in order of class, int32 [m].

    Raises:
      UserError: a rate outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise UserError(f"acceptance: {rate:g} is no share; write a number above 0 and at most 1")
    classes, counts = np.unique(np.asarray(labels, np.int32), return_counts=True)
    # Rounded first: 50 / 0.05 is above 1000 by the last bit of a float.
    return np.repeat(classes, [int(np.ceil(round(count / rate, 6))) for count in counts])


def best(probabilities: np.ndarray, keep: int) -> np.ndarray:
    """Positions of the `keep` highest of [n], ascending; of equals the first ones."""
    return np.sort(np.argsort(-probabilities, kind="stable")[:keep])


def accepted(
    drawn: Iterable[tuple[np.ndarray, np.ndarray]],
    probabilities: Callable[[np.ndarray], np.ndarray],
    asked: np.ndarray,
    labels: np.ndarray,
) -> Images:
    """Keeps, class by class, as many of the drawn pictures as `labels` has of it.

    It holds no more pictures than one class keeps, and a batch. On several hosts each hands in classes of its own.

    Args:
      drawn: pictures uint8 [n, h, w, 3] and their indices [n] into `asked`, ascending, all those of a class.
      probabilities: pictures -> [n, classes].
      asked: from `labels_to_draw`, [m].
      labels: [n], the classes to be left.

    Yields:
      Pictures of one class and the positions in `labels` that they fill.
    """
    label, kept, scores = -1, np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0)

    def settled() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if len(kept):
            yield kept, np.flatnonzero(labels == label)

    for pictures, indices in drawn:
        classes = asked[indices]
        surely = np.asarray(probabilities(pictures))[np.arange(len(pictures)), classes]
        for k in np.unique(classes):
            rows = classes == k
            if k != label:
                yield from settled()
                label, kept, scores = k, pictures[:0], surely[:0]
            kept, scores = np.concatenate([kept, pictures[rows]]), np.concatenate([scores, surely[rows]])
            stay = best(scores, int((labels == k).sum()))
            kept, scores = kept[stay], scores[stay]
    yield from settled()
