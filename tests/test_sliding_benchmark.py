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
