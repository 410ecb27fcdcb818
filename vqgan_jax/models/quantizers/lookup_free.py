"""Codes of bits: LFQ takes signs (arXiv 2310.05737), BSQ signs on the unit sphere (arXiv 2406.07548).

The soft assignment of z to all 2^bits corners factorises over the bits, so that no score of a corner is ever computed:
the entropy of one assignment is a sum over bits, and the mean assignment of n tokens is a product of matrices,
[2^(bits/2), n] by [n, 2^(bits/2)].
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.quantizers.contract import Aux, Sizes, annealed, count_codes, entropy, straight_through, unit


@dataclasses.dataclass(frozen=True)
class LFQConfig:
    """A bit for each number of z: its sign."""

    bits: int
    commitment_weight: float
    entropy_start: float  # weight of the entropy term at step 0
    entropy_end: float  # and from `entropy_steps` on, in a straight line between
    entropy_steps: str  # a duration
    diversity_weight: float  # of the mean assignment's entropy, in units of the single ones'
    temperature: float  # of the soft assignment exp(-distance^2 / temperature)
    group_bits: int  # the mean assignment's entropy is that of groups of so many bits, summed; bits: exact

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 24:
            raise ValueError(f"bits {self.bits}: 1 to 24")
        if not 1 <= self.group_bits <= self.bits:
            raise ValueError(f"group_bits {self.group_bits}: 1 to bits, which are {self.bits}")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} is not positive")

    @property
    def codebook_size(self) -> int:
        return 1 << self.bits

    @property
    def dim(self) -> int:
        return self.bits


@dataclasses.dataclass(frozen=True)
class BSQConfig(LFQConfig):
    """A bit for each number of z, which lies on the unit sphere."""


def assignments(p: jax.Array) -> jax.Array:
    """Probabilities [n, k] of bits to be set -> of all 2^k patterns [n, 2^k]; bit 0 counts fastest."""
    joint = jnp.ones((p.shape[0], 1))
    for bit in range(p.shape[1]):
        set_ = p[:, bit : bit + 1]
        joint = jnp.concatenate([joint * (1 - set_), joint * set_], axis=1)
    return joint


def mean_assignment(p: jax.Array) -> jax.Array:
    """The mean over n tokens of `assignments(p)`, [2^k], through arrays of [n, 2^(k/2)] alone."""
    low, high = (assignments(part) for part in jnp.split(p, [p.shape[1] // 2], axis=1))
    joint = jnp.einsum("nh,nl->hl", high, low, precision=jax.lax.Precision.HIGHEST)
    return joint.reshape(-1) / p.shape[0]


class LookupFreeQuantizer(Sizes, nn.Module):
    """Signs of z, straight through; codes are the corners of a cube. Bit i of an id is the sign of number i."""

    config: LFQConfig

    @property
    def corner(self) -> float:
        """The size of every number of a code."""
        return 1.0

    def placed(self, z: jax.Array) -> jax.Array:
        """z where it is compared with the corners."""
        return z

    def codes(self, ids: jax.Array) -> jax.Array:
        bits = ids[..., None] >> np.arange(self.config.bits) & 1
        return self.corner * (2 * bits - 1).astype(jnp.float32)

    def entropy_weight(self, step: jax.Array | int) -> jax.Array:
        """The entropy term's weight at a step."""
        c = self.config
        return c.entropy_start + (c.entropy_end - c.entropy_start) * annealed(step, c.entropy_steps)

    def entropies(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of placed z [..., bits] in nats: the mean entropy of its soft assignments, and that of their mean."""
        c = self.config
        logits = (4 * self.corner / c.temperature) * z.reshape(-1, c.bits)
        p, not_p = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
        # -p log p - (1 - p) log(1 - p), by log-sigmoids, whose gradients are finite where a bit is certain.
        single = -jnp.sum(p * jax.nn.log_sigmoid(logits) + not_p * jax.nn.log_sigmoid(-logits), axis=-1)
        groups = np.arange(c.group_bits, c.bits, c.group_bits)
        return single.mean(), sum(entropy(mean_assignment(part)) for part in jnp.split(p, groups, axis=1))

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, z = self.config, self.placed(z.astype(jnp.float32))
        ids = jnp.sum((z > 0).astype(jnp.int32) << np.arange(c.bits), axis=-1).astype(jnp.int32)
        z_q = self.codes(ids)
        commitment = jnp.mean((z_q - z) ** 2)
        single, mean = self.entropies(z)
        weight = self.entropy_weight(step) if train else c.entropy_end
        loss = c.commitment_weight * commitment + weight * (single - c.diversity_weight * mean)
        metrics = {"commitment": commitment, "entropy": single, "mean_entropy": mean, "entropy_weight": weight}
        return straight_through(z, z_q), ids, Aux(loss, metrics, count_codes(ids, c.codebook_size))


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """Signs of z on the unit sphere; codes are the corners of the cube inside it."""

    config: BSQConfig

    @property
    def corner(self) -> float:
        return 1 / math.sqrt(self.config.bits)

    def placed(self, z: jax.Array) -> jax.Array:
        return unit(z)
