"""Training some parameters: the rest, its statistics and its averages stay bit for bit."""

import functools

import jax
import numpy as np
import optax
import pytest

from configs import common, quantizers
from vqgan_jax.config import UserError
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.train import partial
from vqgan_jax.train.recipe import vqgan_recipe
from vqgan_jax.train.setup import Durations
from vqgan_jax.train.state import TrainState

DECODER = ("generator/decoder", "generator/post_quant", "discriminator")


def trained(train_only):
    """State before and after two steps of a small VQGAN with running codes, decay, averages, a discriminator."""
    config = common.shrink_vqgan(common.vqgan())
    ae = config.model.autoencoder
    ae.multipliers, ae.stem, ae.mid_attention, ae.attention_resolutions = (1,), 4, False, ()
    config.model.quantizer, ae.z_channels = quantizers.ema(16, 8), 8
    config.model.discriminator.layers = 1
    config.train_only, config.steps, config.loss.adaptive = train_only, "10", False
    config.optimizer = common.adam(1e-2, weight_decay=0.1, clip_norm=1.0)
    model = VQGAN(VQGANConfig.from_config(config.model))
    recipe = vqgan_recipe(config, model, Durations(config, 100))
    before = after = jax.jit(recipe.init)(jax.random.key(0))
    step = jax.jit(recipe.step)
    for seed in range(2):
        images = np.random.default_rng(seed).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
        after, metrics = step(after, {"image": images}, {})
    assert metrics["skipped"] == 0
    codes = jax.jit(functools.partial(model.apply, method="encode"))
    return before, after, metrics, codes


def named(tree, kind="params"):
    return {partial.leaf_name(path, kind): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_only_the_decoder_and_its_judge_move():
    before, after, metrics, codes = trained(DECODER)
    for kind in ("params", "collections", "ema"):
        names = "collections" if kind == "collections" else "params"
        old, new = named(getattr(before, kind), names), named(getattr(after, kind), names)
        for name, x in new.items():
            same = np.array_equal(x, old[name])
            moves = partial.trains(name, DECODER) and not name.startswith("discriminator/logits/")  # LeCAM is off
            assert same != moves, (kind, name)
    assert {"generator/quantizer/codes", "generator/encoder/conv_in/kernel"} <= {
        *named(before.collections, "collections"),
        *named(before.params),
    }
    images = np.random.default_rng(5).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    ids = [codes({"params": s.params["generator"], **s.collections["generator"]}, images) for s in (before, after)]
    np.testing.assert_array_equal(*ids)
    names = {f"generator/{name}" for name in after.opt_state["generator"][1].mu}
    assert names == {x for x in named(after.params) if x.startswith("generator") and partial.trains(x, DECODER)}
    assert metrics["grad_norm/generator"] > 0
    assert "quantizer/commitment" in metrics and "quantizer/restarts" not in metrics  # as in evaluation


def test_codes_are_fixed_where_nothing_trains_that_makes_them():
    assert partial.fixed_codes(DECODER) and partial.fixed_codes(("discriminator",))
    for prefix in ("generator", "generator/encoder", "generator/encoder/conv_in", "generator/quantizer"):
        assert not partial.fixed_codes((*DECODER, prefix))
    assert not partial.fixed_codes(())


def test_unknown_prefixes_are_named():
    leaves = {
        "generator": {"decoder": {"conv_out": {"kernel": 0}}, "post_quant": {"bias": 0}},
        "discriminator": {"x": 0},
    }
    before = TrainState(0, 0, leaves, {}, {}, {}, 0)
    partial.check_train_only(DECODER, before)
    with pytest.raises(UserError, match="config.train_only: 'generator/decodr' is no part.*mean 'generator/decoder'"):
        partial.check_train_only(("generator/decodr/conv_out",), before)
    with pytest.raises(UserError, match="'decoder' is no part of this model"):
        partial.check_train_only(("decoder",), before)


def test_an_optimizer_of_nothing_keeps_still():
    """A network without a part that trains, and one whose layers are stacked."""
    params = {"blocks": {"mlp_kernel": np.ones((2, 3))}, "head": np.ones(3)}
    for prefixes, moves in ((("transformer/head",), {"head"}), (("other",), set()), ((), {"head", "blocks"})):
        tx = partial.optimize_only(optax.adamw(0.1), prefixes, "transformer")
        updates, _ = tx.update(params, tx.init(params), params)
        assert {name for name in params if np.any(jax.tree.leaves(updates[name])[0])} == moves
