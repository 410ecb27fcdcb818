"""One sampler a grid size for a stage-2 model: the cached decoder at the trained size, the sliding window beyond it."""

from collections.abc import Callable
from typing import Any

import jax

from vqgan_jax.config import UserError
from vqgan_jax.sampling.decoder import decode
from vqgan_jax.sampling.sliding import slide
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.transformer import ImageTransformer

Given = tuple[jax.Array, jax.Array]
Sampler = Callable[[Any, jax.Array, jax.Array, Strategy, Given | None], jax.Array]


def make_sampler(model: ImageTransformer, grid: tuple[int, int], centre: str = "upper") -> Sampler:
    """Returns the jitted `sample(split_params, condition_bt, keys, strategy, given) -> ids int32 [b, H, W]`.

    `split_params` are those of `gpt.split_layers`; `condition_bt` local condition ids, of the whole grid [b, H * W]
    where the condition is spatial; `keys` one a row; `given` None or (ids, mask), both [b, H, W].

    Args:
      model: the stage-2 model.
      grid: height and width in codes.
      centre: of the sliding window, see `sliding.window_start`.

    Raises:
      UserError: a grid below the trained one, or above it for an order that is not raster.
    """
    h, w = model.config.grid
    if grid == (h, w):
        return jax.jit(lambda *args: _plain(model, *args))
    if grid[0] < h or grid[1] < w:
        raise UserError(f"a grid of {grid[0]}x{grid[1]} codes is below the {h}x{w} that the model is trained on")
    if model.config.order != "row_major":
        raise UserError(f"the sliding window needs tokens in row-major order, this model's is '{model.config.order}'")
    return jax.jit(lambda *args: _sliding(model, grid, centre, *args))


def _plain(
    model: ImageTransformer, params: Any, condition: jax.Array, keys: jax.Array, strategy: Strategy, given: Given | None
) -> jax.Array:
    apply, empty = model.decoder(params)
    if given is not None:
        given = tuple(model.from_grid(x) for x in given)
    codes = decode(apply, empty, model.layout.condition(condition), len(model.order), keys, strategy, given)
    return model.to_grid(codes)


def _sliding(
    model: ImageTransformer,
    grid: tuple[int, int],
    centre: str,
    params: Any,
    condition: jax.Array,
    keys: jax.Array,
    strategy: Strategy,
    given: Given | None,
) -> jax.Array:
    b, (h, w) = condition.shape[0], model.config.grid

    def window_logits(patch: jax.Array, top: jax.Array, left: jax.Array, at: jax.Array) -> jax.Array:
        window = condition
        if model.condition.spatial:
            whole = condition.reshape(b, *grid)
            window = jax.lax.dynamic_slice(whole, (0, top, left), (b, h, w)).reshape(b, h * w)
        return model.window_logits(params, window, patch, at)

    return slide(window_logits, grid, (h, w), keys, strategy, centre=centre, given=given)
