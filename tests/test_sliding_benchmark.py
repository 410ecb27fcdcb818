"""The benchmark of larger pictures counts what drawing needs."""

import jax.numpy as jnp
import pytest

from benchmarks.sliding import build, flops


def test_operations_are_counted():
    model = build("307M", jnp.bfloat16)
    exact = flops(model, (64, 64), 0)
    assert exact == pytest.approx(1e15, rel=0.02)
    assert flops(model, (64, 64), 4) > 3 * flops(model, (64, 64), 8) and exact > 50 * flops(model, (64, 64), 8)
    # A grid of the window itself, in blocks: one pass over its tokens, and the head for each.
    c = model.gpt
    once = 2 * 511 * (12 * c.layers * c.width**2 + c.layers * c.width * 512) + 2 * 256 * c.width * c.head_size
    assert flops(model, (16, 16), 16) == pytest.approx(once, rel=1e-6)


def test_the_demos_layout_is_another():
    """A class before a window of 8 x 8 codes: 1024 pixels are 128 codes."""
    model = build("demo", jnp.float32)
    c = model.gpt
    assert (model.config.grid, model.condition.length, model.first_stage.factor) == ((8, 8), 1, 8)
    assert (c.layers, c.heads, c.width) == (4, 4, 128)
    token = 2 * 37 * (12 * c.layers * c.width**2 + c.layers * c.width * 38) + 2 * c.width * c.head_size
    assert flops(model, (128, 128), 0) == pytest.approx(128**2 * token, rel=0.1)
    assert flops(build("small", jnp.float32), (64, 64), 0) > 3 * flops(model, (128, 128), 0)
    assert 7 * flops(build("tiny", jnp.float32), (128, 128), 0) < flops(model, (128, 128), 0)
