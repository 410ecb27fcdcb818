"""How far two sets of feature vectors lie apart, in NumPy and float64: Frechet distance (arXiv 1706.08500), KID (arXiv
1801.01401), precision and recall (arXiv 1904.06991); and the Inception Score (arXiv 1606.03498) of one set."""

from collections.abc import Iterator

import numpy as np

from vqgan_jax.evals.moments import Gaussian, gather

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
_BLOCK_BYTES = 64 << 20  # of distances that are looked at together


def frechet(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The last trace is the nuclear norm of L_a^T L_b, where S = L L^T: no root of a matrix that rounding has made
    asymmetric or indefinite, so nothing is added to the diagonal, and equal sets are 0 apart at any rank.
    """
    gap = a.mean - b.mean
    overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    return max(0.0, float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


def _root(covariance: np.ndarray) -> np.ndarray:
    """L [d, d] with L L^T the covariance; eigenvalues that rounding has made negative are 0."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def rank_deficient(gaussian: Gaussian, count: int | None) -> bool:
    """Whether a covariance cannot be of full rank for want of vectors, which biases every distance to it.

    Args:
      gaussian: the statistics.
      count: of the vectors, None where it is not known and the covariance has to tell.
    """
    if count is not None:
        return count <= len(gaussian.mean)
    return int(np.linalg.matrix_rank(gaussian.covariance, hermitian=True)) < len(gaussian.mean)


def kid(
    a: np.ndarray, b: np.ndarray, *, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE, seed: int = 2020
) -> tuple[float, float]:
    """Kernel distance: mean and standard deviation over random subsets of the unbiased squared MMD under the kernel
    (x.y / d + 1)^3. Subsets as torch-fidelity draws them.

    Args:
      a: [n, d].
      b: [m, d].
      subsets: how many are drawn.
      size: vectors in each, at most what there are.
      seed: of the drawing.
    """
    rng = np.random.RandomState(seed)
    size = min(size, len(a), len(b))
    values = []
    for _ in range(subsets):
        x, y = (np.asarray(z[rng.choice(len(z), size, replace=False)], np.float64) for z in (a, b))
        values.append(_within(x) + _within(y) - 2 * _kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: np.ndarray) -> float:
    """The kernel's mean over pairs of different vectors."""
    kernel = _kernel(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision, the share of samples [m, d] that lie in a ball around some reference vector [n, d] as wide as the way
    to its k-th neighbour; and recall, the same with the sets exchanged. Both sets need more than k vectors."""
    return _share_inside(samples, reference, _radii(reference, k)), _share_inside(
        reference, samples, _radii(samples, k)
    )


def _radii(vectors: np.ndarray, k: int) -> np.ndarray:
    """Squared distance [n] of each vector to its k-th neighbour."""
    # At place 0 stands the vector itself.
    return np.concatenate([np.partition(squares, k, axis=1)[:, k] for squares in _blocks(vectors, vectors)])


def _share_inside(vectors: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    inside = [(squares <= radii).any(axis=1) for squares in _blocks(vectors, centres)]
    return float(np.concatenate(inside).mean())


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances of a [n, d] to b [m, d], some rows [., m] at a time."""
    b = np.asarray(b, np.float64)
    norms = np.square(b).sum(axis=1)
    rows = max(1, _BLOCK_BYTES // (8 * len(b)))
    for start in range(0, len(a), rows):
        block = np.asarray(a[start : start + rows], np.float64)
        squares = block @ b.T
        squares *= -2
        squares += norms
        squares += np.square(block).sum(axis=1)[:, None]
        yield np.maximum(squares, 0, out=squares)


class InceptionScore:
    """exp of the mean divergence of p(class | picture) from p(class), split by split, from running sums."""

    def __init__(self, splits: np.ndarray, classes: int):
        """`splits`: int [count], the split of each picture by its index; `classes`: how many logits there are."""
        self._splits = splits
        n = int(splits.max()) + 1
        self._counts, self._negentropy, self._shares = np.zeros(n), np.zeros(n), np.zeros((n, classes))

    def add(self, logits: np.ndarray, indices: np.ndarray) -> None:
        """Adds logits [n, classes] of the pictures `indices` [n]."""
        logits = np.asarray(logits, np.float64)
        log_p = logits - logits.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p, split = np.exp(log_p), self._splits[indices]
        np.add.at(self._counts, split, 1)
        np.add.at(self._negentropy, split, (p * log_p).sum(axis=1))
        np.add.at(self._shares, split, p)

    def all_hosts(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits, of the pictures of all hosts."""
        counts, negentropy, shares = (gather(x).sum(axis=0) for x in (self._counts, self._negentropy, self._shares))
        there = counts > 0
        mean = shares[there] / counts[there, None]
        log_mean = np.log(np.where(mean > 0, mean, 1))
        scores = np.exp(negentropy[there] / counts[there] - (mean * log_mean).sum(axis=1))
        return float(scores.mean()), float(scores.std())
