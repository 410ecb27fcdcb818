"""Nearest code by running means (arXiv 1711.00937, appendix A.1), with dead codes restarted from the batch."""

import dataclasses

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
    straight_through,
)


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """Nearest code, learned by exponential moving averages of what is assigned to it."""

    codebook_size: int
    dim: int
    commitment_weight: float
    decay: float
    restart_below: float

    def __post_init__(self) -> None:
        check_sizes(self.codebook_size, self.dim)


class EMAVectorQuantizer(Sizes, nn.Module):
    """Nearest code; the codebook is a running mean. Starts from the first batch; sums are global over a mesh."""

    config: EMAConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        self.book = self.variable("codebook", "codes", lambda: jax.random.normal(self.make_rng("params"), (q, e)))
        self.count = self.variable("codebook", "count", lambda: jnp.ones(q))
        self.sum = self.variable("codebook", "sum", lambda: jnp.zeros((q, e)))
        self.started = self.variable("codebook", "started", lambda: jnp.zeros((), bool))

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.book.value[ids]

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, z = self.config, z.astype(jnp.float32)
        fixed = jax.lax.stop_gradient(z)
        if train and not self.is_initializing():
            key_start, key_restart = jax.random.split(self.make_rng("quantizer"))
            vectors = draw_vectors(key_start, c.codebook_size, fixed)
            self.book.value = jnp.where(self.started.value, self.book.value, vectors)
            self.sum.value = jnp.where(self.started.value, self.sum.value, vectors)
            self.started.value = jnp.ones((), bool)
        ids = nearest(fixed, self.book.value)
        z_q, counts = self.codes(ids), count_codes(ids, c.codebook_size)
        commitment = jnp.mean((z_q - z) ** 2)
        metrics = {"commitment": commitment}
        if train and not self.is_initializing():
            sums = jnp.zeros_like(self.sum.value).at[ids.reshape(-1)].add(fixed.reshape(-1, c.dim))
            # In units of a code's mean share, so that the start (one each) does not depend on the batch size.
            share = counts.mean()
            count = c.decay * self.count.value + (1 - c.decay) * counts / share
            total = c.decay * self.sum.value + (1 - c.decay) * sums / share
            mask = count < c.restart_below * count.mean()
            vectors = draw_vectors(key_restart, c.codebook_size, fixed)
            self.count.value = jnp.where(mask, 1.0, count)
            self.sum.value = jnp.where(mask[:, None], vectors, total)
            self.book.value = self.sum.value / jnp.maximum(self.count.value, 1e-5)[:, None]
            metrics["restarts"] = mask.sum().astype(jnp.float32)
        return straight_through(z, z_q), ids, Aux(c.commitment_weight * commitment, metrics, counts)
