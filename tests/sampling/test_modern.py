"""Every sampler on a transformer with rotary and target positions, shared keys, AdaLN and guidance: what is drawn with
a cache, or in a window, is what the whole sequence says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.models import random_transformer
from tests.sampling.test_decoder import recorded
from vqgan_jax import parallel
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.sampling.large import LargeSampler
from vqgan_jax.sampling.strategies import Strategy, guidance_scale, row_keys

PIECES = dict(block="llama", positions="rope", qk_norm=True, adaln=True, kv_heads=2, target_positions=True)
GUIDED = Strategy(guidance=3.0, schedule="power-cosine", power=1.5)
LABELS = jnp.array([[1], [7], [3]])


@functools.cache
def modern():
    model, params = random_transformer(grid=(4, 4), **PIECES)
    return model, params, split_layers(params)


@functools.cache
def drawn():
    """Codes and guided logits of the cached decoder."""
    model, _, split = modern()
    return recorded(model, split, GUIDED, LABELS, buckets=2)


@functools.cache
def whole():
    model, params, _ = modern()
    return jax.jit(functools.partial(model.logits, params))


def test_the_decoders_guided_logits_are_the_whole_sequences():
    model = modern()[0]
    ids, logits = drawn()
    conditional = whole()(LABELS, ids)
    null = whole()(jnp.broadcast_to(model.null_condition, LABELS.shape), ids)
    assert float(jnp.abs(conditional - null).mean()) > 0.05 and len(np.unique(ids)) > 10
    for i in range(16):
        w = guidance_scale(GUIDED, i, 16)
        np.testing.assert_allclose(logits[i], null[:, i] + w * (conditional - null)[:, i], atol=1e-2)


@pytest.mark.slow
def test_on_a_mesh_it_draws_the_same():
    model, params, _ = modern()
    mesh = parallel.make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        labels = jax.device_put(jnp.concatenate([LABELS, LABELS[:1]]), parallel.batch_sharding(mesh))
        ids, logits = recorded(model, model.split(params, mesh), GUIDED, labels, buckets=2)
    np.testing.assert_array_equal(ids[:3], drawn()[0])
    for i in range(16):
        np.testing.assert_allclose(logits[i][:3], drawn()[1][i], atol=1e-3)


@pytest.mark.slow
def test_the_exact_window_draws_what_the_decoder_draws():
    model, _, split = modern()
    slid = LargeSampler(model, (4, 4)).whole(split, LABELS, row_keys(3, jnp.arange(3)), GUIDED)
    np.testing.assert_array_equal(model.from_grid(slid), drawn()[0])


@pytest.mark.slow
def test_block_windows_draw_what_the_whole_window_says():
    model, _, split = modern()
    greedy = Strategy(greedy=True)
    ids = LargeSampler(model, (4, 6), stride=2).whole(split, LABELS, row_keys(0, jnp.arange(3)), greedy)
    for left, block in ((0, slice(None)), (2, slice(2, 4))):
        window = ids[:, :, left : left + 4]
        likeliest = model.to_grid(whole()(LABELS, model.from_grid(window)).argmax(-1))
        np.testing.assert_array_equal(likeliest[:, :, block], window[:, :, block])
    assert len(np.unique(ids)) > 5
