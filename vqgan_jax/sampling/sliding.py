"""Pictures larger than the trained grid: the sliding attention window (arXiv 2012.09841, section 3.2).

Token (i, j) sees the row above only as far as its window's right edge, so a row may start as soon as the one above is
a window's width ahead: rows that lag by that much run as one batch of windows, and every token is the one that it
would be if all were drawn one after the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.config import UserError
from vqgan_jax.sampling.strategies import Strategy, next_token

Given = tuple[jax.Array, jax.Array]
WindowLogits = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
CENTRES = {"upper": lambda size: size // 2, "lower": lambda size: (size - 1) // 2}


def window_start(position: jax.Array | int, size: int, window: int, centre: str = "upper") -> jax.Array:
    """Where the window of a token at `position` starts on an axis of `size`: clip(position - centre, 0, size - window).

    `centre` is "upper" (window // 2: 8 of 16, the reference's picture sampler) or "lower" ((window - 1) // 2: 7, its
    scene sampler).
    """
    return jnp.clip(position - CENTRES[centre](window), 0, size - window)


def check_grid(grid: tuple[int, int], window: tuple[int, int]) -> None:
    """Raises UserError for a grid that the window does not fit into."""
    (height, width), (h, w) = grid, window
    if height < h or width < w:
        raise UserError(f"a grid of {height}x{width} codes is smaller than the window of {h}x{w}")


@dataclasses.dataclass(frozen=True)
class Wavefront:
    """In which order the tokens of a grid are drawn: at step s, slot k draws token (s // lag - k, s % lag + k * lag),
    where that lies in the grid.

    Attributes:
      grid: height and width of the whole grid, each at least the window's.
      window: height and width of the window, as trained.
      centre: see `window_start`.
      serial: one token after the other, in raster order, as the reference.
      multiple: the number of slots is one of this, so that they divide over devices; some may be idle.

    Raises:
      UserError: a grid smaller than the window.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    centre: str = "upper"
    serial: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        check_grid(self.grid, self.window)

    @property
    def lag(self) -> int:
        """Columns by which a row stays behind the one above: at its left edge a token sees a window's width of it."""
        return self.grid[1] if self.serial else self.window[1]

    @property
    def slots(self) -> int:
        """Windows of one picture that run at once."""
        return -(-self.grid[1] // (self.lag * self.multiple)) * self.multiple

    @property
    def steps(self) -> int:
        """Of the whole grid."""
        return self.grid[1] + (self.grid[0] - 1) * self.lag

    @functools.cached_property
    def needed(self) -> np.ndarray:
        """How many first tokens of its window a step looks at, int [steps], never falling: in the middle of the grid
        no more than up to the window's centre, at the lower edge all."""
        (height, width), (h, w) = self.grid, self.window
        i, j = np.arange(height)[:, None], np.arange(width)[None]
        top, left = (np.clip(x - CENTRES[self.centre](m), 0, n - m) for x, n, m in ((i, height, h), (j, width, w)))
        inside = (i - top) * w + j - left + 1
        needed = np.zeros(self.steps, int)
        np.maximum.at(needed, (i * self.lag + j).ravel(), inside.ravel())
        middle = min(h * w, (CENTRES[self.centre](h) + 1) * w)
        return np.maximum.accumulate(np.where(needed <= middle, middle, h * w))

    def segments(self, most: int) -> Iterator[tuple[int, int, int]]:
        """All steps as (first, last + 1, tokens of a window that are looked at), at most `most` at a time."""
        first = 0
        while first < self.steps:
            same = int(np.searchsorted(self.needed, self.needed[first], side="right"))
            last = min(same, first + most)
            yield first, last, int(self.needed[first])
            first = last

    def drawn(self, steps: int) -> np.ndarray:
        """Which tokens there are after so many steps: bool [H, W]."""
        i, j = np.indices(self.grid)
        return i * self.lag + j < steps


def advance(
    wavefront: Wavefront,
    window_logits: WindowLogits,
    ids: jax.Array,
    keys: jax.Array,
    strategy: Strategy,
    first: jax.Array | int,
    last: jax.Array | int,
    length: int,
    given: Given | None = None,
) -> jax.Array:
    """Draws the tokens of the steps first..last - 1.

    Args:
      wavefront: the order.
      window_logits: `(first tokens of the windows [s, b, length], top [s], left [s], index of the token in the window
        [s]) -> logits [s, b, v]`, for s windows of b pictures; what stands after the token must not matter. Guided: of
        `interleave`'s rows, [s, 2b, v].
      ids: int32 [b, H, W], the tokens so far.
      keys: one key a picture [b].
      strategy: how to draw.
      first, last: steps, may be traced.
      length: static, of `segments`.
      given: (ids int32 [b, H, W], mask bool [b, H, W]): kept as given where the mask is set.

    Returns:
      int32 [b, H, W].
    """
    b, (height, width), (h, w) = ids.shape[0], wavefront.grid, wavefront.window
    slot = jnp.arange(wavefront.slots)
    start = functools.partial(window_start, centre=wavefront.centre)
    given = given and tuple(map(jnp.asarray, given))

    def step(s: jax.Array, ids: jax.Array) -> jax.Array:
        row, column = s // wavefront.lag - slot, s % wavefront.lag + slot * wavefront.lag
        drawn_here = (row >= 0) & (row < height) & (column < width)
        i, j = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
        top, left = start(i, height, h), start(j, width, w)
        windows = jax.vmap(lambda t, u: jax.lax.dynamic_slice(ids, (0, t, u), (b, h, w)))(top, left)
        at = jnp.minimum((i - top) * w + j - left, length - 1)
        logits = window_logits(windows.reshape(-1, b, h * w)[..., :length], top, left, at)

        def draw(logits: jax.Array, n: jax.Array) -> jax.Array:
            return next_token(keys, logits, strategy, ids.reshape(b, -1), n, height * width)

        drawn = jax.vmap(draw)(logits, i * width + j).T
        if given is not None:
            drawn = jnp.where(given[1][:, i, j], given[0][:, i, j], drawn)
        return ids.at[:, jnp.where(drawn_here, i, height), j].set(drawn, mode="drop")

    return jax.lax.fori_loop(first, last, step, ids)
