"""Pictures larger than the trained grid: the sliding attention window (arXiv 2012.09841, section 3.2), serial."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vqgan_jax.config import UserError
from vqgan_jax.sampling.strategies import Strategy, draw

WindowLogits = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
CENTRES = {"upper": lambda size: size // 2, "lower": lambda size: (size - 1) // 2}


def window_start(position: jax.Array | int, size: int, window: int, centre: str = "upper") -> jax.Array:
    """Where the window of a token at `position` starts on an axis of `size`: clip(position - centre, 0, size - window).

    `centre` is "upper" (window // 2: 8 of 16, the reference's picture sampler) or "lower" ((window - 1) // 2: 7, its
    scene sampler).
    """
    return jnp.clip(position - CENTRES[centre](window), 0, size - window)


def slide(
    window_logits: WindowLogits,
    grid: tuple[int, int],
    window: tuple[int, int],
    keys: jax.Array,
    strategy: Strategy,
    *,
    centre: str = "upper",
    given: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Draws every token of a grid in raster order, each from the tokens of its own window before it.

    Args:
      window_logits: `(window ids [b, h * w], top, left, index of the token in the window) -> logits [b, v]`; what
        stands after the token must not matter.
      grid: height and width of the whole grid, each at least the window's.
      window: height and width of the window, as trained.
      keys: one key a row [b].
      strategy: how to draw.
      centre: see `window_start`.
      given: (ids int32 [b, H, W], mask bool [b, H, W]): kept as given where the mask is set.

    Returns:
      int32 [b, H, W].

    Raises:
      UserError: a grid smaller than the window.
    """
    if grid[0] < window[0] or grid[1] < window[1]:
        raise UserError(f"a grid of {grid[0]}x{grid[1]} codes is smaller than the window of {window[0]}x{window[1]}")
    b, (height, width), (h, w) = keys.shape[0], grid, window
    empty = jnp.zeros((b, height, width), jnp.int32)
    fixed_ids, fixed = given or (empty, jnp.zeros(empty.shape, bool))

    def token(n: jax.Array, ids: jax.Array) -> jax.Array:
        i, j = n // width, n % width
        top, left = window_start(i, height, h, centre), window_start(j, width, w, centre)
        patch = jax.lax.dynamic_slice(ids, (0, top, left), (b, h, w)).reshape(b, h * w)
        logits = window_logits(patch, top, left, (i - top) * w + (j - left))
        drawn = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, n), logits, strategy)
        drawn = jnp.where(fixed[:, i, j], fixed_ids[:, i, j], drawn)
        return ids.at[:, i, j].set(drawn)

    return jax.lax.fori_loop(0, height * width, token, empty)
