"""Latent perturbation (RobustTok, arXiv 2503.08354): codes replaced by near ones between quantizer and decoder, so that
the decoder learns to bear what a sampler gets wrong. Of training alone."""

import dataclasses

import jax
import jax.numpy as jnp

from vqgan_jax.models.quantizers.contract import distances


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """How much is replaced. Durations are optimizer steps."""

    share: float  # of a perturbed picture's codes (alpha); 0: none
    pictures: float  # share of the pictures that are perturbed (beta)
    nearest: int  # among so many nearest other codes (delta)
    anneal_start: int
    anneal_end: int
    final_share: float  # of `share` and `nearest`, from `anneal_end` on

    def __post_init__(self) -> None:
        for name in ("share", "pictures", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is no share, from 0 to 1")
        if self.nearest < 1:
            raise ValueError(f"nearest {self.nearest}: at least one other code")
        if self.anneal_end < self.anneal_start:
            raise ValueError(f"anneal_end {self.anneal_end} comes before anneal_start {self.anneal_start}")

    def level(self, step: jax.Array | int) -> jax.Array:
        """1 up to `anneal_start`, then a line to `final_share`."""
        progress = (jnp.asarray(step, jnp.float32) - self.anneal_start) / max(self.anneal_end - self.anneal_start, 1)
        return 1 - (1 - self.final_share) * jnp.clip(progress, 0, 1)


def perturbed(
    key: jax.Array, ids: jax.Array, codebook: jax.Array, perturbation: Perturbation, step: jax.Array | int
) -> jax.Array:
    """Ids int32 [b, h, w] with some replaced by one of their nearest other codes of the codebook [q, e].

    Distances to all codes are held at once: 4 b h w q bytes, on each device those of its own rows.
    """
    level, (b, q) = perturbation.level(step), (ids.shape[0], codebook.shape[0])
    key_pictures, key_codes, key_rank = jax.random.split(key, 3)
    codebook = jax.lax.stop_gradient(codebook)
    closeness = jnp.where(ids[..., None] == jnp.arange(q), -jnp.inf, -distances(codebook[ids], codebook))
    _, neighbours = jax.lax.top_k(closeness, min(perturbation.nearest, q - 1))
    count = jnp.maximum(neighbours.shape[-1] * level, 1).astype(jnp.int32)
    rank = jax.random.randint(key_rank, (*ids.shape, 1), 0, count)
    other = jnp.take_along_axis(neighbours, rank, axis=-1)[..., 0]
    chosen = jax.random.bernoulli(key_pictures, perturbation.pictures, (b, 1, 1))
    chosen &= jax.random.bernoulli(key_codes, perturbation.share * level, ids.shape)
    return jnp.where(chosen, other, ids)
