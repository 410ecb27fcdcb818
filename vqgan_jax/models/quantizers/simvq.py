"""SimVQ (arXiv 2411.02038): a frozen random codebook, moved as a whole by one learned linear layer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.quantizers.contract import (
    Aux,
    Sizes,
    check_sizes,
    count_codes,
    nearest,
    pull_together,
    straight_through,
)


@dataclasses.dataclass(frozen=True)
class SimVQConfig:
    """Nearest of the codes that a linear layer makes of a random codebook."""

    codebook_size: int
    dim: int
    commitment_weight: float
    codebook_weight: float

    def __post_init__(self) -> None:
        check_sizes(self.codebook_size, self.dim)


class SimVQQuantizer(Sizes, nn.Module):
    """Nearest code; the random vectors are state without gradient, the layer over them is what learns."""

    config: SimVQConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        start = nn.initializers.normal(e**-0.5)
        self.book = self.variable("codebook", "codes", lambda: start(self.make_rng("params"), (q, e)))
        # Starts as a rotation, which leaves the codes as evenly spread as they were drawn.
        rotation = nn.initializers.orthogonal()
        self.projection = nn.Dense(e, kernel_init=rotation, precision=jax.lax.Precision.HIGHEST)

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.projection(self.book.value[ids])

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, z = self.config, z.astype(jnp.float32)
        codebook = self.projection(self.book.value)
        ids = nearest(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
        z_q = codebook[ids]
        commitment, moved = pull_together(z, z_q)
        loss = c.commitment_weight * commitment + c.codebook_weight * moved
        return straight_through(z, z_q), ids, Aux(loss, {"commitment": commitment}, count_codes(ids, c.codebook_size))
