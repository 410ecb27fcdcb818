"""One sampler a grid size for a stage-2 model: the cached decoder at the trained size, the sliding window beyond it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vqgan_jax.sampling.decoder import decode
from vqgan_jax.sampling.large import LargeSampler
from vqgan_jax.sampling.sliding import Given
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.transformer import ImageTransformer

Sampler = Callable[..., jax.Array]


def make_sampler(model: ImageTransformer, grid: tuple[int, int]) -> Sampler:
    """Returns `sample(split_params, condition_bt, keys, strategy, given, leading=0) -> ids int32 [b, H, W]`.

    `split_params` are those of `gpt.split_layers`; `condition_bt` local condition ids, of the whole grid [b, H * W]
    where the condition is spatial; `keys` one a row; `given` None or (ids, mask), both [b, H, W]; `leading` (static)
    from `leading_given`. For the trained grid it is one jitted program; beyond it, it is `LargeSampler.whole`, which
    knows no `leading`.

    Args:
      model: the stage-2 model.
      grid: height and width in codes.

    Raises:
      UserError: what `LargeSampler` refuses; when called, a guided strategy for a model without null condition.
    """
    if tuple(grid) == model.config.grid:
        return jax.jit(functools.partial(sample_grid, model), static_argnames="leading")
    return LargeSampler(model, grid).whole


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
