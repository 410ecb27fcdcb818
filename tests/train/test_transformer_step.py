"""The transformer's step: equal to the reference's, decay on kernels only, corruption and accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from tests import reference as ref
from tests.sampling.models import random_transformer
from tests.sampling.test_sampling import class_transformer
from vqgan_jax.convert import names
from vqgan_jax.train.optimizers import OptimizerConfig, kernels_only, make_optimizer, make_schedule
from vqgan_jax.train.state import TrainState
from vqgan_jax.train.transformer_step import Contrast, TransformerObjective, make_step

LIKELIHOOD = TransformerObjective(1.0, 0.0, 0.0, 0, 0, Contrast(0.0, 0.02))


def start(tx):
    model, params, _ = class_transformer()
    state = TrainState.create(
        jax.random.key(0), {"transformer": params}, {}, {"transformer": tx.init(params)}, {"transformer": params}
    )
    return model, state


def batch_of(golden, k):
    return {"codes/image": golden["tokens"][k].reshape(4, 8, 8), "label": golden["cond"][k][:, 0]}


def test_six_steps_equal_the_reference():
    golden = ref.golden("class_transformer_train.npz")
    config = OptimizerConfig(float(golden["lr"]), False, 0.9, 0.95, 1e-8, 0.01, 0.0, "constant", 0, 0, 1.0)
    tx = make_optimizer(config, make_schedule(config, 6, 4))
    model, state = start(tx)
    before = state.params["transformer"]
    step = jax.jit(make_step(model, LIKELIHOOD, tx, ema_decay=0.0))
    losses = []
    for k in range(6):
        state, metrics = step(state, batch_of(golden, k), {})
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[:4], golden["loss"][:4], rtol=1e-4)
    np.testing.assert_allclose(losses, golden["loss"], rtol=1e-3)
    tensors = names.write_tree(state.params["transformer"], names.gpt_key)
    old = names.write_tree(before, names.gpt_key)
    compared = 0
    for name, expected in golden.items():
        if not name.startswith("after/"):
            continue
        name = name.removeprefix("after/")
        # A key's bias has no gradient but rounding noise, which Adam makes steps of: it is left out of the fixture.
        np.testing.assert_allclose(tensors[name], expected, rtol=0, atol=1e-3 * ref.scale(expected), err_msg=name)
        assert np.abs(tensors[name] - old[name]).max() > 1e-3, name
        compared += 1
    assert compared == 18


def test_only_kernels_decay():
    model, params, _ = class_transformer()
    decays = flatten_dict(kernels_only(params), sep="/")
    expected = {
        "blocks/attention/query_kernel",
        "blocks/attention/key_kernel",
        "blocks/attention/value_kernel",
        "blocks/attention/out_kernel",
        "blocks/mlp_up_kernel",
        "blocks/mlp_down_kernel",
        "head",
    }
    assert {name for name, value in decays.items() if value} == expected
    boxed = flatten_dict(kernels_only(jax.eval_shape(model.init, jax.random.key(0))), sep="/")
    assert {name for name, value in boxed.items() if jax.tree.leaves(value)[0]} == expected


def test_kept_codes_and_random_ones():
    """With every input code replaced, the loss no longer depends on the codes that came before."""
    golden = ref.golden("class_transformer_train.npz")
    tx = optax.sgd(0.0)
    model, state = start(tx)
    metrics = {}
    for keep in (1.0, 0.5, 0.0):
        step = jax.jit(make_step(model, dataclasses.replace(LIKELIHOOD, keep=keep), tx, ema_decay=0.0))
        _, metrics[keep] = step(state, batch_of(golden, 0), {})
    losses = [float(metrics[keep]["loss"]) for keep in (1.0, 0.5, 0.0)]
    np.testing.assert_allclose(losses[0], golden["loss"][0], rtol=1e-4)
    assert len({round(loss, 4) for loss in losses}) == 3


def test_micro_batches_give_the_mean_gradient():
    golden = ref.golden("class_transformer_train.npz")
    tx = optax.sgd(0.1)
    model, state = start(tx)
    results = [
        jax.jit(
            make_step(model, dataclasses.replace(LIKELIHOOD, label_smoothing=0.1), tx, ema_decay=0.9, accumulation=n)
        )(state, batch_of(golden, 0), {})
        for n in (1, 2)
    ]
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][0].params, results[1][0].params)
    assert results[0][1]["loss"] > results[0][1]["nll"] or results[0][1]["loss"] != results[0][1]["nll"]


def test_schedules():
    config = OptimizerConfig(1e-3, True, 0.9, 0.95, 1e-8, 0.0, 0.0, "cosine", 10, 20, 0.1)
    rate = make_schedule(config, 100, 8)
    peak = 8e-3
    np.testing.assert_allclose([rate(0), rate(9), rate(10), rate(29)], [peak / 10, peak, peak, peak], rtol=1e-5)
    np.testing.assert_allclose([rate(65), rate(100)], [peak * 0.55, peak * 0.1], rtol=1e-3)
    assert float(make_schedule(OptimizerConfig(1e-3, False, 0.9, 0.9, 1e-8, 0, 0, "constant", 0, 0, 1.0), 9, 8)(5)) == (
        np.float32(1e-3)
    )
    assert jnp.isfinite(rate(1000))


def test_a_share_of_the_rows_trains_without_its_condition(monkeypatch):
    model, params = random_transformer(grid=(4, 4), dropout=0.25)
    seen = []
    inner = type(model).logits

    def logits(self, params, condition, *args, **kwargs):
        jax.debug.callback(lambda c: seen.append(np.asarray(c)), condition)
        return inner(self, params, condition, *args, **kwargs)

    monkeypatch.setattr(type(model), "logits", logits)
    tx = optax.sgd(0.0)
    state = TrainState.create(jax.random.key(0), {"transformer": params}, {}, {"transformer": tx.init(params)}, {})
    step = jax.jit(make_step(model, LIKELIHOOD, tx, ema_decay=0.0))
    batch = {"codes/image": np.zeros((64, 4, 4), np.int32), "label": np.arange(64, dtype=np.int32) % 10}
    for _ in range(4):
        state, _ = step(state, batch, {})
    jax.effects_barrier()
    seen = np.unique(np.stack(seen)[..., 0], axis=0)  # the backward pass may look again
    null = seen == 10
    assert len(seen) == 4 and 0.1 < null.mean() < 0.4
    np.testing.assert_array_equal(np.where(null, 0, seen), np.where(null, 0, batch["label"]))
    assert (model.layout.vocab_size, model.layout.head_size) == (64 + 11, 64)
