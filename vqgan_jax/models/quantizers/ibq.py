"""Index backpropagation (arXiv 2412.02692): every code gets a gradient, by the softmax of z's products with all."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.quantizers.contract import (
    Aux,
    Sizes,
    check_sizes,
    count_codes,
    dots,
    entropy,
    pull_together,
    start_small,
)


@dataclasses.dataclass(frozen=True)
class IBQConfig:
    """The code of the largest product with z, straight through from all products' softmax."""

    codebook_size: int
    dim: int
    commitment_weight: float  # pulls z towards its code
    codebook_weight: float  # pulls the code towards z
    index_weight: float  # pulls both together through the index too: the double quantization loss
    entropy_weight: float
    entropy_temperature: float

    def __post_init__(self) -> None:
        check_sizes(self.codebook_size, self.dim)
        if self.entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature {self.entropy_temperature} is not positive")


class IndexBackpropagationQuantizer(Sizes, nn.Module):
    """One-hot of the arg max forwards, softmax backwards; the codebook is a parameter."""

    config: IBQConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        self.codebook = self.param("codebook", start_small, (q, e))

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.codebook[ids]

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, z = self.config, z.astype(jnp.float32)
        scores = dots(z, self.codebook)
        ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        hard = self.codes(ids)
        # The value of the one-hot times the codebook, and its two gradients: to the code, and through the softmax.
        mixed = dots(jax.nn.softmax(scores), jax.lax.stop_gradient(self.codebook).T)
        z_q = hard + mixed - jax.lax.stop_gradient(mixed)
        commitment, codebook = pull_together(z, hard)
        loss = c.commitment_weight * commitment + c.codebook_weight * codebook
        loss = loss + c.index_weight * jnp.mean((z_q - z) ** 2)
        metrics = {"commitment": commitment}
        if c.entropy_weight:
            p = jax.nn.softmax(scores / c.entropy_temperature).reshape(-1, c.codebook_size)
            metrics |= {"entropy": entropy(p).mean(), "mean_entropy": entropy(p.mean(axis=0))}
            loss = loss + c.entropy_weight * (metrics["entropy"] - metrics["mean_entropy"])
        return z_q, ids, Aux(loss, metrics, count_codes(ids, c.codebook_size))
