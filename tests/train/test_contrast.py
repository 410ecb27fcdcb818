"""Condition contrastive alignment (CCA): what the loss is where nothing was learned, and what a step changes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import demo_transformer
from tests.sampling.models import random_transformer
from tests.train.test_transformer_step import LIKELIHOOD
from vqgan_jax import losses
from vqgan_jax.config import UserError
from vqgan_jax.train.recipe import transformer_recipe
from vqgan_jax.train.setup import Durations
from vqgan_jax.train.state import TrainState
from vqgan_jax.train.transformer_step import Contrast, make_step

LABELS = np.arange(8, dtype=np.int32) % 5
LABELS[3] = LABELS[2]  # one row's wrong condition is its own
WEIGHT, BETA = 300.0, 0.02


@functools.cache
def tuned():
    """Model, state, the step at a rate that shows in 100 steps, its batch and frozen networks; a quarter of the rows
    drop their condition, and the model has dropout."""
    model, params = random_transformer(grid=(4, 4), dropout=0.25, residual_dropout=0.02)
    tx = optax.adam(3e-3)
    state = TrainState.create(jax.random.key(2), {"transformer": params}, {}, {"transformer": tx.init(params)}, {})
    objective = dataclasses.replace(LIKELIHOOD, cca=Contrast(WEIGHT, BETA))
    codes = np.random.default_rng(0).integers(0, 64, (8, 4, 4)).astype(np.int32)
    batch = {"codes/image": codes, "label": LABELS}
    step = jax.jit(make_step(model, objective, tx, ema_decay=0.0))
    return model, state, step, batch, {"reference": params}


def test_the_loss_is_the_published_one():
    rng = np.random.default_rng(0)
    gain, wrong = rng.normal(size=(2, 6)) * 50
    same = np.array([False, True, False, False, True, False])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = 0.0
    for g, w, s in zip(gain, wrong, same, strict=True):
        expected -= math.log(sigmoid(BETA * g))
        expected -= math.log(sigmoid(BETA * w)) if s else WEIGHT * math.log(sigmoid(-BETA * w))
    found = losses.condition_contrast(jnp.asarray(gain), jnp.asarray(wrong), jnp.asarray(same), WEIGHT, BETA)
    np.testing.assert_allclose(found, expected / 6 / WEIGHT, rtol=1e-5)
    half = losses.condition_contrast(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2, bool), 0.5, BETA)
    np.testing.assert_allclose(half, 1.5 * math.log(2), rtol=1e-6)  # a weight below 1 divides nothing


def test_where_nothing_was_learned_the_loss_is_known():
    model, state, step, batch, frozen = tuned()
    _, metrics = step(state, batch, frozen)
    key = jax.random.fold_in(state.stream("condition"), 0)
    right, wrong = (model.drop_condition(key, jnp.asarray(x)[:, None]) for x in (LABELS, np.roll(LABELS, -1)))
    same = np.asarray(right == wrong)[:, 0]
    dropped = np.asarray(right)[:, 0] == 10
    assert 0 < dropped.sum() < 8 and same[2] and (same >= dropped).all() and not same.all()
    expected = math.log(2) * np.mean(1 + np.where(same, 1, WEIGHT)) / WEIGHT
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["cca/margin"], 0, atol=1e-3)


def test_steps_raise_the_right_condition_above_the_wrong_one():
    model, state, step, batch, frozen = tuned()
    codes, right = model.from_grid(batch["codes/image"]), LABELS[:, None]
    wrong, differ = np.roll(right, -1, axis=0), (LABELS != np.roll(LABELS, -1))[:, None]

    @jax.jit
    def advantage(params):
        nll = [losses.token_nll(model.logits(params, condition, codes), codes).sum(-1) for condition in (right, wrong)]
        return nll[1] - nll[0]

    before, margins = advantage(state.params["transformer"]), []
    for _ in range(100):
        state, metrics = step(state, batch, frozen)
        margins.append(float(metrics["cca/margin"]))
    gained = np.asarray(advantage(state.params["transformer"]) - before)[differ[:, 0]]
    assert gained.mean() > 1 and (gained > 0).mean() > 0.8
    assert np.mean(margins[-10:]) > np.mean(margins[:10]) + 5 and metrics["cca/accuracy"] > 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "config.init_from"),
        ({"init_from": "x", "model.condition": {"name": "none"}}, "config.loss.cca.weight"),
        ({"init_from": "x"}, "config.checkpoint.keep_best"),
        ({"init_from": "x", "checkpoint.keep_best": 0, "accumulation": 32}, "config.accumulation"),
        ({"init_from": "x", "loss.label_smoothing": 0.1}, "config.loss: label_smoothing"),
    ],
)
def test_what_it_needs_is_said(change, message):
    config = demo_transformer.get_config()
    config.loss.cca.weight = 300.0
    with config.ignore_type():
        config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        transformer_recipe(config, tuned()[0], Durations(config, 32))
