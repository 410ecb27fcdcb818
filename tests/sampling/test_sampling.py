"""Sampling: equal to the reference's greedy samplers, cached = uncached, filters exact, a row's tokens its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax.conditioning import ClassLabelConfig, EncodedImageConfig
from vqgan_jax.config import GPT2, UserError
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.sampling.decoder import decode
from vqgan_jax.sampling.large import LargeSampler
from vqgan_jax.sampling.sliding import Wavefront, window_start
from vqgan_jax.sampling.strategies import Strategy, filter_logits, row_keys
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig


def class_transformer():
    """The class-conditional fixture: model, parameters (stacked), frozen variables."""
    tensors = ref.checkpoint("class_transformer_tiny.ckpt")
    config = TransformerConfig(
        ArchitectureConfig(2, 4, 32, 64, 0, 0.0, 0.0, 0.0, **GPT2), ClassLabelConfig(10), (8, 8), "row_major", True, 0.0
    )
    model = ImageTransformer(config, Tokenizer(VQGAN(ref.FIRST_STAGE_TINY)))
    frozen = {"first_stage": ref.vqgan_variables(ref.FIRST_STAGE_TINY, tensors, "first_stage_model.")}
    return model, ref.gpt_params(model.gpt, tensors, "transformer."), frozen


def depth_transformer():
    """The depth-conditional fixture."""
    tensors = ref.checkpoint("depth_transformer_tiny.ckpt")
    config = TransformerConfig(
        ArchitectureConfig(2, 2, 32, 512, 0, 0.0, 0.0, 0.0, **GPT2),
        EncodedImageConfig("depth"),
        (16, 16),
        "row_major",
        True,
        0.0,
    )
    depth = Tokenizer(VQGAN(ref.DEPTH_STAGE_TINY))
    model = ImageTransformer(config, Tokenizer(VQGAN(ref.FIRST_STAGE_TINY)), {"depth": depth})
    frozen = {
        "first_stage": ref.vqgan_variables(ref.FIRST_STAGE_TINY, tensors, "first_stage_model."),
        "cond/depth": ref.vqgan_variables(ref.DEPTH_STAGE_TINY, tensors, "cond_stage_model."),
    }
    return model, ref.gpt_params(model.gpt, tensors, "transformer."), frozen


def sample(model, params, condition, keys, strategy, length, given=None):
    @jax.jit
    def run(params, condition, keys, strategy, given):
        apply, empty = model.decoder(params)
        return decode(apply, empty, model.layout.condition(condition), length, keys, strategy, given)

    return run(split_layers(params), condition, keys, strategy, given)


def test_greedy_cached_sampling_equals_the_reference():
    golden = ref.golden("class_transformer_tiny.npz")
    model, params, frozen = class_transformer()
    keys = row_keys(0, jnp.arange(3))
    codes = sample(model, params, golden["cond_tokens"], keys, Strategy(greedy=True), 64)
    np.testing.assert_array_equal(codes, golden["greedy_tokens"])
    image = model.decode(frozen, model.to_grid(codes))
    np.testing.assert_allclose(image, golden["greedy_image"], atol=1e-4 * ref.scale(golden["greedy_image"]))


@pytest.mark.parametrize("serial", [pytest.param(True, marks=pytest.mark.slow), False])
def test_greedy_sliding_window_equals_the_reference(serial):
    golden = ref.golden("depth_transformer_tiny.npz")
    model, params, frozen = depth_transformer()
    logits = model.logits(params, golden["cond_tokens"], golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-3 * ref.scale(golden["logits"]))  # stored as float16
    condition = model.condition.stage.encode(frozen["cond/depth"], golden["slide/depth"])
    np.testing.assert_array_equal(condition, golden["slide/cond_tokens"])
    sampler = LargeSampler(model, (22, 27), serial=serial)
    keys = row_keys(0, jnp.arange(1))
    ids = sampler.whole(split_layers(params), condition.reshape(1, -1), keys, Strategy(greedy=True))
    np.testing.assert_array_equal(ids, golden["slide/greedy_tokens"])
    image = model.decode(frozen, ids)
    np.testing.assert_allclose(image, golden["slide/image"], atol=1e-3 * ref.scale(golden["slide/image"]))


def test_the_window_covering_the_grid_equals_the_plain_sampler_and_given_ids_stay():
    model, params, _ = class_transformer()
    labels, keys = jnp.array([[1], [7]]), row_keys(3, jnp.arange(2))
    mask = jax.random.bernoulli(jax.random.key(0), 0.3, (2, 8, 8))
    ids = jax.random.randint(jax.random.key(1), (2, 8, 8), 0, 64)
    given = (ids.reshape(2, -1), mask.reshape(2, -1))
    plain = sample(model, params, labels, keys, Strategy(), 64, given)
    slid = LargeSampler(model, (8, 8)).whole(split_layers(params), labels, keys, Strategy(), (ids, mask))
    np.testing.assert_array_equal(slid.reshape(2, -1), plain)
    np.testing.assert_array_equal(np.asarray(slid)[mask], np.asarray(ids)[mask])


def test_filters_equal_the_reference():
    golden = ref.golden("class_transformer_tiny.npz")
    for name, expected in golden.items():
        if not name.startswith("filter/probs"):
            continue
        k, p, t = (float(part[1:]) for part in name.removeprefix("filter/probs_").split("_"))
        kept = filter_logits(golden["filter/logits"], Strategy(t, int(k), p))
        np.testing.assert_allclose(jax.nn.softmax(kept), expected, atol=1e-5, err_msg=name)


def test_window_starts_follow_both_conventions():
    assert [int(window_start(i, 24, 16)) for i in (0, 8, 9, 23)] == [0, 0, 1, 8]
    assert [int(window_start(i, 24, 16, "lower")) for i in (0, 7, 8, 23)] == [0, 0, 1, 8]


def test_a_grid_below_the_window_is_refused():
    with pytest.raises(UserError, match="smaller than the window"):
        Wavefront((4, 8), (8, 8))
