"""Gumbel-softmax over the scores of a 1x1 convolution (arXiv 1611.01144)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import Conv
from vqgan_jax.models.quantizers.contract import Aux, Sizes, annealed, check_sizes, count_codes, dots


@dataclasses.dataclass(frozen=True)
class GumbelConfig:
    """Gumbel-softmax over a 1x1 convolution's logits; hard and straight-through by option; arg max in evaluation."""

    codebook_size: int
    dim: int
    input_dim: int
    kl_weight: float
    straight_through: bool
    temperature_start: float
    temperature_end: float
    temperature_steps: str  # a duration: half a cosine from start to end

    def __post_init__(self) -> None:
        check_sizes(self.codebook_size, self.dim)


class GumbelQuantizer(Sizes, nn.Module):
    """Gumbel-softmax; deterministic (arg max, no noise) in evaluation, where the reference still adds noise."""

    config: GumbelConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        self.logits_layer = Conv(q, 1, padding=(0, 0), name="logits", precision=jax.lax.Precision.HIGHEST)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (q, e))

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.codebook[ids]

    def logits(self, z: jax.Array) -> jax.Array:
        """Scores of every code: z [b, h, w, input_dim] -> float32 [b, h, w, q]."""
        return self.logits_layer(z.astype(jnp.float32))

    def temperature(self, step: jax.Array | int) -> jax.Array:
        """Half a cosine from the start temperature to the end one, constant afterwards."""
        c = self.config
        share = annealed(step, c.temperature_steps)
        return c.temperature_end + 0.5 * (c.temperature_start - c.temperature_end) * (1 + jnp.cos(jnp.pi * share))

    def soft_codes(self, logits: jax.Array, noise: jax.Array, temperature: jax.Array | float) -> jax.Array:
        """Relaxed one-hot [b, h, w, q] of logits and standard Gumbel noise of the same shape."""
        return jax.nn.softmax((logits + noise) / temperature, axis=-1)

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, logits = self.config, self.logits(z)
        probabilities = jax.nn.softmax(logits, axis=-1)
        kl = jnp.mean(jnp.sum(probabilities * jnp.log(probabilities * c.codebook_size + 1e-10), axis=-1))
        metrics = {"kl": kl}
        if train:
            noise = jax.random.gumbel(self.make_rng("quantizer"), logits.shape)
            metrics["temperature"] = self.temperature(step)
            soft = self.soft_codes(logits, noise, metrics["temperature"])
            ids = jnp.argmax(soft, axis=-1).astype(jnp.int32)
            if c.straight_through:
                soft = soft + jax.lax.stop_gradient(jax.nn.one_hot(ids, c.codebook_size) - soft)
            z_q = dots(soft, self.codebook.T)
        else:
            ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            z_q = self.codes(ids)
        return z_q, ids, Aux(c.kl_weight * kl, metrics, count_codes(ids, c.codebook_size))
