"""Layer by layer in strips = the plain model, for every kind of layer, within the memory that was asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from tests.memory import device_memory
from vqgan_jax.config import UserError
from vqgan_jax.models import strips as module
from vqgan_jax.models.strips import Strips, _statistics, apply_in_strips
from vqgan_jax.models.vqgan import VQGAN

STEM = dataclasses.replace(
    ref.VQGAN_TINY, autoencoder=dataclasses.replace(ref.autoencoder((1, 2), ()), stem=4, mid_attention=False)
)
WIDER = dataclasses.replace(ref.VQGAN_TINY, autoencoder=ref.autoencoder((1, 2, 2), (16, 8)))
CONFIGS = {"tiny": ref.VQGAN_TINY, "stem": STEM, "wider": WIDER, "gumbel": ref.GUMBEL_TINY}
LARGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("wider", "gumbel")]


def made(config, dtype=jnp.float32):
    model = VQGAN(config, dtype)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.jit(model.init)({"params": jax.random.key(0), "quantizer": jax.random.key(1)}, images)
    return model, jax.device_get(variables)


def planned_and_run(model, variables, x, **settings):
    """What strips make of x and what that takes, as a shape told before anything ran, and compiled all."""
    standing_in, told = apply_in_strips(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype), **settings)
    known = set(module._COMPILED)
    strips, peak = apply_in_strips(model, variables, x, **settings)
    assert told == peak and set(module._COMPILED) == known
    assert (standing_in.shape, standing_in.dtype) == (strips.shape, strips.dtype)
    return strips, peak


@pytest.mark.parametrize(
    "name", ["tiny", "stem", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wider", "gumbel"))]
)
def test_decoding_in_strips_equals_the_plain_decoder(name):
    model, variables = made(CONFIGS[name])
    ids = np.asarray(jax.random.randint(jax.random.key(2), (2, 13, 9), 0, 48))
    plain = np.asarray(jax.jit(lambda v, x: model.apply(v, x, method="decode"))(variables, ids))
    whole, most = apply_in_strips(model, variables, ids, method="decode", budget=1 << 30)
    with device_memory() as taken:
        strips, peak = planned_and_run(model, variables, ids, method="decode", budget=most.device // 3)
    assert peak.device // 2 < taken.bytes <= peak.device <= most.device // 3
    for made_so in (whole, strips):
        np.testing.assert_allclose(made_so, plain, atol=1e-4 * ref.scale(plain))


@pytest.mark.parametrize("name", ["tiny", "stem", LARGER[0]])
def test_encoding_in_strips_gives_the_same_ids(name):
    model, variables = made(CONFIGS[name])
    f = model.config.factor
    images = np.asarray(jax.random.uniform(jax.random.key(3), (1, 18 * f, 10 * f, 3), minval=-1))
    plain = np.asarray(jax.jit(lambda v, x: model.apply(v, x, method="encode"))(variables, images))
    strips, _ = planned_and_run(model, variables, images, method="encode", budget=1 << 20)
    assert strips.shape == (1, 18, 10)
    assert (strips == plain).mean() > 0.99  # a code may win by less than rounding


def test_the_norm_keeps_far_off_means():
    """A single pass over float32 would lose the variance beside a mean of a thousand."""
    x = np.asarray(1e3 + jax.random.normal(jax.random.key(0), (1, 64, 8, 32)), np.float32)
    mean, variance = _statistics(Strips(1 << 16), x)
    exact = x.astype(np.float64).reshape(1, -1, 32)
    np.testing.assert_allclose(mean, exact.mean(1), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(1), rtol=1e-3)


@pytest.mark.slow
def test_bfloat16_strips_stay_near_the_plain_model():
    model, variables = made(ref.VQGAN_TINY, jnp.bfloat16)
    ids = np.asarray(jax.random.randint(jax.random.key(2), (1, 16, 8), 0, 48))
    plain = np.asarray(jax.jit(lambda v, x: model.apply(v, x, method="decode"))(variables, ids))
    strips, _ = apply_in_strips(model, variables, ids, method="decode", budget=1 << 19)
    assert np.abs(strips - plain).mean() < 0.02 * ref.scale(plain)


def test_a_budget_below_one_row_is_refused():
    model, variables = made(ref.VQGAN_TINY)
    for x in (np.zeros((1, 16, 8), np.int32), jax.ShapeDtypeStruct((1, 16, 8), jnp.int32)):
        with pytest.raises(UserError, match="memory budget"):
            apply_in_strips(model, variables, x, method="decode", budget=1000)
