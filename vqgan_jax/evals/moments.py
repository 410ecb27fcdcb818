"""Means and covariances of many vectors: float64 sums on the host, exact to merge, over batches and over hosts."""

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils

from vqgan_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A mean [d] and a covariance [d, d], float64: what the Frechet distance compares."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Count, sum [d] and sum of outer products [d, d] of vectors, in float64."""

    def __init__(self, count: int, total: np.ndarray, outer: np.ndarray):
        self.count, self.total, self.outer = count, total, outer

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """Of no vectors of `dim` numbers yet."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, vectors: np.ndarray) -> None:
        """Adds vectors [n, d]."""
        vectors = np.asarray(vectors, np.float64)
        self.count += len(vectors)
        self.total += vectors.sum(axis=0)
        self.outer += vectors.T @ vectors

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> np.ndarray:
        """[d]."""
        return self.total / self.count

    def covariance(self, ddof: int = 1) -> np.ndarray:
        """[d, d]. Raises UserError: no more vectors than `ddof`."""
        if self.count <= ddof:
            raise UserError(f"statistics of {self.count} images: a covariance needs at least {ddof + 1}")
        return (self.outer - np.outer(self.total, self.mean)) / (self.count - ddof)

    def gaussian(self) -> Gaussian:
        """The mean and the covariance that every tool takes (ddof 1)."""
        return Gaussian(self.mean, self.covariance())


def all_hosts(moments: Moments) -> Moments:
    """The moments of the vectors of all hosts, the same to the bit on each."""
    if jax.process_count() == 1:
        return moments
    count, total, outer = (gather(np.asarray(x)).sum(0) for x in (moments.count, moments.total, moments.outer))
    return Moments(int(count), total, outer)


def gather(array: np.ndarray) -> np.ndarray:
    """An array that every host has in the same shape, of all hosts: [hosts, ...], exact.

    As 32-bit words, because JAX cuts float64 and int64 to half when it sends them.
    """
    if jax.process_count() == 1:
        return array[None]
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    gathered = np.ascontiguousarray(multihost_utils.process_allgather(words))
    return gathered.view(array.dtype).reshape(-1, *array.shape)
