"""Finite scalar quantization (arXiv 2309.15505): each number of z is bounded and rounded; there is no codebook."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.quantizers.contract import Aux, Sizes, count_codes, straight_through

_MARGIN = 1e-3  # the bound stays so far inside the outermost rounding, relatively, as published
_MOST_CODES = 1 << 24  # counts are float32 [q]


@dataclasses.dataclass(frozen=True)
class FSQConfig:
    """Rounded numbers: `levels[i]` values of the i-th; (8, 5, 5, 5) are 1000 codes, (8, 8, 8, 5, 5, 5) 64000."""

    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels {self.levels}: each takes 3 values or more; two-valued codes are lfq and bsq")
        if self.codebook_size > _MOST_CODES:
            raise ValueError(f"levels {self.levels} are {self.codebook_size} codes; {_MOST_CODES} are the most")

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        return len(self.levels)


class FiniteScalarQuantizer(Sizes, nn.Module):
    """Bounded by tanh, rounded straight through; codes in [-1, 1]; no loss. An id's first level counts fastest."""

    config: FSQConfig

    @property
    def strides(self) -> np.ndarray:
        """What a step of each number adds to the id."""
        return np.cumprod([1, *self.config.levels[:-1]])

    def bounded(self, z: jax.Array) -> jax.Array:
        """z [..., e] in the range of its levels; an even number of them stands half a step off, and zero stays zero."""
        levels = np.asarray(self.config.levels)
        half = (levels - 1) * (1 - _MARGIN) / 2
        offset = np.where(levels % 2, 0.0, 0.5)
        return jnp.tanh(z + np.arctanh(offset / half, dtype=np.float32)) * np.float32(half) - np.float32(offset)

    def codes(self, ids: jax.Array) -> jax.Array:
        levels = np.asarray(self.config.levels)
        half = levels // 2
        return ((ids[..., None] // self.strides % levels - half) / half).astype(jnp.float32)

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        levels = np.asarray(self.config.levels)
        bounded = self.bounded(z.astype(jnp.float32))
        rounded = jnp.round(bounded)
        ids = jnp.sum((rounded.astype(jnp.int32) + levels // 2) * self.strides, axis=-1).astype(jnp.int32)
        z_q = straight_through(bounded, rounded) / (levels // 2)
        return z_q, ids, Aux(jnp.zeros(()), {}, count_codes(ids, self.config.codebook_size))
