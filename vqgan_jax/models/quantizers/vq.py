"""Nearest code by gradient (arXiv 2012.09841, equation 4), plain or on the unit sphere (arXiv 2110.04627, LlamaGen)."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.quantizers.contract import (
    Aux,
    Sizes,
    check_sizes,
    count_codes,
    draw_vectors,
    nearest,
    pull_together,
    start_small,
    straight_through,
    unit,
)


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Nearest code, learned by gradient."""

    codebook_size: int
    dim: int
    commitment_weight: float  # pulls z towards its code: 0.25 as published, 1.0 in the reference (its beta bug)
    codebook_weight: float  # pulls the code towards z: 1.0 as published, 0.25 in the reference
    restart_below: float  # a code used under this share of the mean is restarted from the batch; 0 = never
    usage_decay: float  # of the running usage that decides restarts
    normalize: bool  # z and codes on the unit sphere, for codes of few numbers (8 to 12)
    start: Literal["uniform", "sphere"]  # codes from +-1/q as published, or all over the unit sphere

    def __post_init__(self) -> None:
        check_sizes(self.codebook_size, self.dim)
        if self.normalize and self.dim < 2:
            raise ValueError("normalize needs a dim of 2 or more: on a line the unit sphere has two points")


class VectorQuantizer(Sizes, nn.Module):
    """Nearest code; the codebook is a parameter."""

    config: VQConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        starts = {
            "uniform": start_small,
            "sphere": lambda key, shape: unit(jax.random.normal(key, shape)),
        }
        self.codebook = self.param("codebook", starts[self.config.start], (q, e))
        if self.config.restart_below:
            self.usage = self.variable("codebook", "usage", lambda: jnp.ones(q))

    def placed(self, vectors: jax.Array) -> jax.Array:
        """Vectors [..., e] as they are compared: on the unit sphere where the config says so."""
        return unit(vectors) if self.config.normalize else vectors

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.placed(self.codebook[ids])

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, z = self.config, self.placed(z.astype(jnp.float32))
        fixed = jax.lax.stop_gradient(z)
        ids = nearest(fixed, jax.lax.stop_gradient(self.placed(self.codebook)))
        z_q = self.codes(ids)
        commitment, codebook = pull_together(z, z_q)
        counts, metrics, restart = count_codes(ids, c.codebook_size), {"commitment": commitment}, None
        if train and c.restart_below and not self.is_initializing():
            usage = c.usage_decay * self.usage.value + (1 - c.usage_decay) * counts / counts.mean()
            mask = usage < c.restart_below * usage.mean()
            self.usage.value = jnp.where(mask, 1.0, usage)
            restart = (mask, draw_vectors(self.make_rng("quantizer"), c.codebook_size, fixed))
            metrics["restarts"] = mask.sum().astype(jnp.float32)
        loss = c.commitment_weight * commitment + c.codebook_weight * codebook
        return straight_through(z, z_q), ids, Aux(loss, metrics, counts, restart)
