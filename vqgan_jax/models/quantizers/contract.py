"""What every quantizer promises, and what they share: distances, counts, straight-through gradients, restarts."""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Aux:
    """What a quantizer says beside its codes.

    `loss`: weighted sum, a scalar. `metrics`: its named parts. `counts` float32 [q]: how often each code was used in
    this batch. `restart`: None, or (mask bool [q], vectors [q, e]) for a codebook that is a parameter.
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]
    counts: jax.Array
    restart: tuple[jax.Array, jax.Array] | None = None


class Quantizer(Protocol):
    """The contract. `input_dim` is the width of z; `dim` that of a code (they differ for Gumbel alone)."""

    codebook_size: int
    dim: int
    input_dim: int

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        """z [b, h, w, input_dim] -> (z_q [b, h, w, dim], ids int32 [b, h, w], aux)."""

    def codes(self, ids: jax.Array) -> jax.Array:
        """ids int32 [...] -> code vectors [..., dim]."""


class Sizes:
    """The sizes of the contract, read off a quantizer's `config`."""

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def input_dim(self) -> int:
        return getattr(self.config, "input_dim", self.dim)


def check_sizes(codebook_size: int, dim: int) -> None:
    """Raises ValueError unless there are two codes or more, of one number or more."""
    if codebook_size < 2:
        raise ValueError(f"codebook_size {codebook_size}: two codes are the fewest")
    if dim < 1:
        raise ValueError(f"dim {dim}: a code has one number or more")


def annealed(step: jax.Array | int, steps: str) -> jax.Array:
    """How much of an annealing over so many steps (a number as text, as `with_steps` makes it) is done: in [0, 1]."""
    return jnp.clip(jnp.asarray(step, jnp.float32) / max(int(steps), 1), 0, 1)


def dots(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Products of z [..., e] with every code [q, e]: float32 [..., q], in full precision on every platform."""
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    return jnp.einsum("...e,qe->...q", z, codebook, precision=jax.lax.Precision.HIGHEST)


def distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances of z [..., e] to every code [q, e] but for the squared norm of z, which ranks none before
    another: float32 [..., q]."""
    return jnp.sum(codebook.astype(jnp.float32) ** 2, axis=1) - 2 * dots(z, codebook)


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Ids int32 [...] of the codes [q, e] nearest to z [..., e]."""
    return jnp.argmin(distances(z, codebook), axis=-1).astype(jnp.int32)


def start_small(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A codebook [q, e] as published: U(-1/q, 1/q)."""
    return jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0])


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., e] on the unit sphere. Zero stays zero, and its gradient finite."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))


def straight_through(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """The values of z_q with the gradient of z."""
    return z + jax.lax.stop_gradient(z_q - z)


def pull_together(z: jax.Array, z_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean squared distance of z and its codes twice: once it moves z (commitment), once the codes (codebook)."""
    fixed_z, fixed_q = jax.lax.stop_gradient(z), jax.lax.stop_gradient(z_q)
    return jnp.mean((fixed_q - z) ** 2), jnp.mean((z_q - fixed_z) ** 2)


def entropy(p: jax.Array) -> jax.Array:
    """Entropy in nats of distributions [..., q] over their last axis."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)), axis=-1)


def count_codes(ids: jax.Array, codebook_size: int) -> jax.Array:
    """How often each id occurs: float32 [q]."""
    return jnp.zeros(codebook_size, jnp.float32).at[ids.reshape(-1)].add(1.0)


def perplexity(counts: jax.Array) -> jax.Array:
    """exp(entropy) of a histogram [q]: the number of codes in effective use, 1..q."""
    p = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10)))


def draw_vectors(key: jax.Array, n: int, z: jax.Array) -> jax.Array:
    """n vectors [n, e] drawn from a batch z [..., e], to start or restart codes from."""
    return z.reshape(-1, z.shape[-1])[jax.random.randint(key, (n,), 0, math.prod(z.shape[:-1]))]


def apply_restart(params: dict[str, Any], restart: tuple[jax.Array, jax.Array]) -> dict[str, Any]:
    """Writes restarted codes (mask [q], vectors [q, e]) into a quantizer's parameters."""
    mask, vectors = restart
    return params | {"codebook": jnp.where(mask[:, None], vectors, params["codebook"])}
