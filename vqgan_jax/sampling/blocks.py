"""Pictures larger than the trained grid, block by block: windows advance by a stride, and each is prefilled once.

The part of a window that earlier windows have not drawn, its lower right block, is drawn with the cache: far fewer
operations a token than a window a token (`sliding.py`). The price is context: in a block's first column a token sees
nothing to the right of its window in the rows above, and how much of the picture it sees depends on where in the block
it lies. Windows on an anti-diagonal do not see each other and run as one batch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.config import UserError
from vqgan_jax.sampling.decoder import Apply, Cache
from vqgan_jax.sampling.sliding import check_grid
from vqgan_jax.sampling.strategies import Strategy, interleave, next_token


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where the windows of a grid stand.

    Attributes:
      grid: height and width of the whole grid, each at least the window's.
      window: height and width of the window, as trained.
      stride: codes by which windows advance, at most the window's sides; the last advance may be shorter.

    Raises:
      UserError: a grid smaller than the window, or a stride that would leave a hole.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    stride: int

    def __post_init__(self) -> None:
        check_grid(self.grid, self.window)
        h, w = self.window
        if not 1 <= self.stride <= min(h, w):
            raise UserError(f"--stride: {self.stride} codes; a window of {h}x{w} advances by 1 to {min(h, w)}")

    @functools.cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """Tops and lefts of the windows."""
        return tuple(
            [*range(0, size - window, self.stride), size - window]
            for size, window in zip(self.grid, self.window, strict=True)
        )

    def batches(self) -> Iterator[tuple[list[tuple[int, int]], tuple[int, int]]]:
        """In order: windows (top, left) that may run together, and row and column of each where its block starts."""
        tops, lefts = self.starts
        for diagonal in range(len(tops) + len(lefts) - 1):
            kinds: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for a in range(max(0, diagonal - len(lefts) + 1), min(diagonal + 1, len(tops))):
                b = diagonal - a
                block = self._known(tops, a, self.window[0]), self._known(lefts, b, self.window[1])
                kinds.setdefault(block, []).append((tops[a], lefts[b]))
            for block, windows in kinds.items():
                yield windows, block

    def drawn(self, batches: int) -> np.ndarray:
        """Which tokens there are after so many batches: bool [H, W]."""
        mask, (h, w) = np.zeros(self.grid, bool), self.window
        for windows, _ in itertools.islice(self.batches(), batches):
            for top, left in windows:
                mask[top : top + h, left : left + w] = True
        return mask

    @staticmethod
    def _known(starts: list[int], index: int, window: int) -> int:
        """How much of a window the one before it has covered."""
        return window - (starts[index] - starts[index - 1]) if index else 0


def fill_window(
    apply: Apply,
    empty: Callable[[int], Cache],
    prefix_bt: jax.Array,
    ids_bhw: jax.Array,
    block: tuple[int, int],
    keys: jax.Array,
    numbers_bhw: jax.Array,
    length: int,
    strategy: Strategy,
    given: tuple[jax.Array, jax.Array] | None = None,
    *,
    null_bt: jax.Array | None = None,
) -> jax.Array:
    """Draws the lower right block of windows from what stands above it and to its left.

    Args:
      apply, empty, prefix_bt, keys, null_bt: as of `decoder.decode`.
      ids_bhw: int32 [b, h, w], known outside the block.
      block: row and column where it starts (static).
      numbers_bhw: of each token in the whole picture; it is drawn with fold_in(key, number).
      length: tokens of the whole picture.
      strategy: how to draw.
      given: (ids int32 [b, h, w], mask bool [b, h, w]): kept as given where the mask is set.

    Returns:
      int32 [b, h, w].
    """
    b, h, w = ids_bhw.shape
    row, column = block
    rows = (lambda x: interleave(x, x)) if strategy.guided else (lambda x: x)
    prefix_bt = interleave(prefix_bt, null_bt) if strategy.guided else prefix_bt
    span = prefix_bt.shape[1] + h * w - 1  # the last token is never looked at
    known = ids_bhw.reshape(b, h * w)[:, : row * w + column]
    prefix_bt = jnp.concatenate([prefix_bt, rows(known)], axis=1)
    logits, cache = apply(prefix_bt, empty(prefix_bt.shape[0]), prefix_bt.shape[1])

    def draw(logits: jax.Array, ids: jax.Array, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = next_token(keys, logits, strategy, ids.reshape(b, -1), numbers_bhw[:, i, j], length)
        if given is not None:
            drawn = jnp.where(given[1][:, i, j], given[0][:, i, j], drawn)
        return drawn[:, None], ids.at[:, i, j].set(drawn)

    def draw_row(carry: Any, i: jax.Array) -> tuple[Any, None]:
        def token(carry: Any, j: jax.Array) -> tuple[Any, None]:
            logits, cache, ids = carry
            drawn, ids = draw(logits, ids, i, j)
            logits, cache = apply(rows(drawn), cache, span)
            return (logits, cache, ids), None

        (logits, cache, ids), _ = jax.lax.scan(token, carry, jnp.arange(column, w - 1))
        drawn, ids = draw(logits, ids, i, jnp.asarray(w - 1))
        # With the row's last token goes what is known of the next row; after the last row it does not matter.
        begun = jax.lax.dynamic_index_in_dim(ids, jnp.minimum(i + 1, h - 1), axis=1, keepdims=False)[:, :column]
        logits, cache = apply(rows(jnp.concatenate([drawn, begun], axis=1)), cache, span)
        return (logits, cache, ids), None

    (_, _, ids), _ = jax.lax.scan(draw_row, (logits, cache, ids_bhw), jnp.arange(row, h))
    return ids
