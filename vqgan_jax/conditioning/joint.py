"""Several conditions at once: class + segmentation, boxes + coordinates, ..."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.conditioning.contract import Batch, Condition, Frozen, Grid, Names


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """The configs of the parts, in the order of their tokens."""

    parts: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Joint:
    """The parts' tokens one after the other, the ids of later parts shifted by the vocabularies before them."""

    parts: tuple[Condition, ...]

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    @property
    def vocab_size(self) -> int:
        return sum(part.vocab_size for part in self.parts)

    @property
    def spatial(self) -> bool:
        return any(part.spatial for part in self.parts)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for part in self.parts for key in part.keys)

    @property
    def labels(self) -> int:
        return max(part.labels for part in self.parts)

    def tokens(self, frozen: Frozen, batch: Batch) -> jax.Array:
        return self._join([part.tokens(frozen, batch) for part in self.parts])

    def whole(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """See `Condition.whole`."""
        return self._join([part.whole(frozen, batch) for part in self.parts])

    def invert(self, frozen: Frozen, tokens: jax.Array, grid: Grid | None = None) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for part, own in zip(self.parts, self._split(tokens, grid), strict=True):
            found |= part.invert(frozen, own, grid)
        return found

    def draw(self, batch: Mapping[str, np.ndarray], size: Grid, names: Names = ()) -> np.ndarray:
        """The parts side by side, each of `size`: uint8 [b, h, parts * w, 3]."""
        return np.concatenate([part.draw(batch, size, names) for part in self.parts], axis=2)

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """See `Condition.window`."""
        split = zip(self.parts, self._split(tokens, grid), strict=True)
        return self._join([part.window(own, grid, top, left, size) for part, own in split])

    def length_on(self, grid: Grid) -> int:
        """See `Condition.length_on`."""
        return sum(part.length_on(grid) for part in self.parts)

    @property
    def _offsets(self) -> list[int]:
        return [sum(part.vocab_size for part in self.parts[:k]) for k in range(len(self.parts))]

    def _join(self, tokens: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([own + n for own, n in zip(tokens, self._offsets, strict=True)], axis=1)

    def _split(self, tokens: jax.Array, grid: Grid | None) -> list[jax.Array]:
        """The local ids of each part."""
        lengths = [part.length_on(grid) if grid else part.length for part in self.parts]
        split = jnp.split(tokens, np.cumsum(lengths)[:-1], axis=1)
        return [own - n for own, n in zip(split, self._offsets, strict=True)]
