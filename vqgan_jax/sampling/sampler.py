"""One sampler a grid size for a stage-2 model: the cached decoder at the trained size, the sliding window beyond it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vqgan_jax.config import UserError
from vqgan_jax.sampling.decoder import decode
from vqgan_jax.sampling.large import window_logits
from vqgan_jax.sampling.sliding import Given, Wavefront, slide
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.transformer import ImageTransformer

Sampler = Callable[..., jax.Array]


def make_sampler(model: ImageTransformer, grid: tuple[int, int], centre: str = "upper") -> Sampler:
    """Returns the jitted `sample(split_params, condition_bt, keys, strategy, given, leading=0) -> ids int32 [b, H, W]`.

    `split_params` are those of `gpt.split_layers`; `condition_bt` local condition ids, of the whole grid [b, H * W]
    where the condition is spatial; `keys` one a row; `given` None or (ids, mask), both [b, H, W]; `leading` (static)
    from `leading_given`; beyond the trained grid there is no such argument.

    Args:
      model: the stage-2 model.
      grid: height and width in codes.
      centre: of the sliding window, see `sliding.window_start`.

    Raises:
      UserError: a grid below the trained one, or above it for an order that is not raster; when called, a guided
        strategy for a model without null condition.
    """
    h, w = model.config.grid
    if grid == (h, w):
        return jax.jit(functools.partial(sample_grid, model), static_argnames="leading")
    if grid[0] < h or grid[1] < w:
        raise UserError(f"a grid of {grid[0]}x{grid[1]} codes is below the {h}x{w} that the model is trained on")
    if model.config.order != "row_major":
        raise UserError(f"the sliding window needs tokens in row-major order, this model's is '{model.config.order}'")
    return jax.jit(lambda *args: slide_grid(model, grid, centre, *args))


def leading_given(model: ImageTransformer, mask_bhw: np.ndarray) -> int:
    """How many first tokens, in order of generation, are given in every row, in whole rows of the grid: these are
    prefilled at once, and each number of them is a program of its own."""
    given = np.asarray(model.from_grid(mask_bhw)).all(0)
    run = len(given) if given.all() else int(given.argmin())
    return run // model.config.grid[1] * model.config.grid[1]


def sample_grid(
    model: ImageTransformer,
    params: Any,
    condition: jax.Array,
    keys: jax.Array,
    strategy: Strategy,
    given: Given | None = None,
    *,
    leading: int = 0,
) -> jax.Array:
    """What `make_sampler` jits for the trained grid, to be used inside a program; arguments as there."""
    apply, empty = model.decoder(params)
    if given is not None:
        given = tuple(model.from_grid(x) for x in given)
    prefix = model.layout.condition(condition)
    null = model.layout.condition(model.null_condition) if strategy.guided else None
    codes = decode(apply, empty, prefix, len(model.order), keys, strategy, given, leading=leading, null_bt=null)
    return model.to_grid(codes)


def slide_grid(
    model: ImageTransformer,
    grid: tuple[int, int],
    centre: str,
    params: Any,
    condition: jax.Array,
    keys: jax.Array,
    strategy: Strategy,
    given: Given | None = None,
) -> jax.Array:
    """What `make_sampler` jits for a larger grid; arguments as there."""
    wavefront = Wavefront(grid, model.config.grid, centre)
    return slide(wavefront, window_logits(model, params, condition, grid, strategy), keys, strategy, given)
