"""What a condition is: the contract, and the two ways in which a condition meets windows of larger pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

Frozen = Mapping[str, Any]
Grid = tuple[int, int]
Batch = Mapping[str, jax.Array]
Names = Mapping[str, Sequence[str]] | Sequence[str]


class Condition(Protocol):
    """The contract. Ids are local to the kind: the layout alone adds offsets."""

    length: int  # tokens
    vocab_size: int
    spatial: bool  # whether some of it has a token a code, so that whole pictures of larger grids have more tokens
    keys: tuple[str, ...]  # what it needs of a batch
    labels: int  # classes that it tells apart, where it reads `label`; else 0
    parts: tuple["Condition", ...]  # itself, unless it is several at once

    def tokens(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """Condition ids int32 [b, length]; of pictures larger than the trained ones [b, length_on(their grid)]."""

    def whole(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """Of pictures larger than the trained ones, what `window` cuts: as `tokens`, and all that windows need."""

    def invert(self, frozen: Frozen, tokens: jax.Array, grid: Grid | None = None) -> dict[str, jax.Array]:
        """What the tokens say, as batch keys and in the form of the data, as far as they hold it.

        Args:
          frozen: variables of the frozen networks by name.
          tokens: ids int32 [b, length_on(grid)].
          grid: of the pictures in codes; None for the trained one.
        """

    def draw(self, batch: Mapping[str, np.ndarray], size: Grid, names: Names = ()) -> np.ndarray:
        """Batch arrays, given or inverted, as a person sees them: uint8 [b, h, w, 3], on the host.

        Args:
          batch: its keys.
          size: height and width of a picture in pixels.
          names: of classes: by batch key ("label", "box_classes"), or one list for all.
        """

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """Of `whole` pictures of `grid` codes, or of their `tokens`, those for their window of `size` at (top, left),
        which may be traced: int32 [b, length]."""

    def length_on(self, grid: Grid) -> int:
        """Tokens of a whole picture of `grid` codes; `length` on the trained one."""


class _Alone:
    """A condition that is not several at once."""

    labels = 0

    @property
    def parts(self) -> tuple[Condition, ...]:
        return (self,)

    def whole(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """See `Condition.whole`."""
        return self.tokens(frozen, batch)


class Whole(_Alone):
    """A condition that says the same of every window."""

    spatial = False
    length: int

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """See `Condition.window`."""
        return tokens

    def length_on(self, grid: Grid) -> int:
        """See `Condition.length_on`."""
        return self.length


class Spatial(_Alone):
    """A condition with a token a code, in raster order; `grid` is the trained one."""

    spatial = True
    grid: Grid

    @property
    def length(self) -> int:
        return self.length_on(self.grid)

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """See `Condition.window`."""
        b = tokens.shape[0]
        cut = jax.lax.dynamic_slice(tokens.reshape(b, *grid), (0, top, left), (b, *size))
        return cut.reshape(b, -1)

    def length_on(self, grid: Grid) -> int:
        """See `Condition.length_on`."""
        return grid[0] * grid[1]


def names_of(names: Names, key: str) -> Sequence[str]:
    """The names of one batch key's classes."""
    return names.get(key, ()) if isinstance(names, Mapping) else names
