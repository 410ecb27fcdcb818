"""Random orders in training (RAR): the logits of every order, the share of rows that have one, what the step does."""

import dataclasses
import functools

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
from vqgan_jax.models.bits import join_logits
from vqgan_jax.train.recipe import transformer_recipe
from vqgan_jax.train.setup import Durations
from vqgan_jax.train.state import TrainState
from vqgan_jax.train.transformer_step import make_step, random_orders
from vqgan_jax.transformer import ImageTransformer

PIECES = dict(block="llama", positions="rope", qk_norm=True, adaln=True, kv_heads=2, target_positions=True)
CONDITION = jnp.array([[1], [7], [3]])
CODES = jax.random.permutation(jax.random.key(0), jnp.arange(48)).reshape(3, 16)  # no two alike
ORDERS = jnp.stack([jax.random.permutation(jax.random.key(i), 16) for i in (1, 2, 3)])
OWN = jnp.broadcast_to(jnp.arange(16), (3, 16))


@functools.cache
def modern():
    return random_transformer(grid=(4, 4), **PIECES)


@functools.cache
def logits_in_orders():
    @jax.jit
    def run(params, codes, orders, condition):
        return modern()[0].logits(params, condition, codes, permutation_bt=orders)

    return run


def test_the_models_own_order_is_one_of_them():
    model, params = modern()
    plain = jax.jit(model.logits)(params, CONDITION, CODES)
    np.testing.assert_allclose(logits_in_orders()(params, CODES, OWN, CONDITION), plain, atol=1e-5)


def test_a_permuted_row_is_the_row_of_a_model_of_that_order():
    """Another model whose own order is the permutation, with the same parameters where they belong to a place."""
    model, params = modern()
    other = ImageTransformer(dataclasses.replace(model.config, order="spiral_in"), model.first_stage)
    table = params["target_embedding"]  # row 0: the first code, which the only token of the condition predicts
    moved = params | {"target_embedding": table.at[:16].set(table[other.order])}
    expected = jax.jit(other.logits)(moved, CONDITION, CODES)
    orders = jnp.broadcast_to(other.order, (3, 16))
    np.testing.assert_allclose(logits_in_orders()(params, CODES, orders, CONDITION), expected, atol=1e-4)
    assert float(jnp.abs(logits_in_orders()(params, CODES, ORDERS, CONDITION) - expected).max()) > 0.1


def test_a_code_sees_those_before_it_in_its_rows_order():
    _, params = modern()
    codes = jnp.take_along_axis(CODES, ORDERS, axis=1)

    def of_table(table):
        logits = logits_in_orders()(params | {"token_embedding": table}, codes, ORDERS, CONDITION)
        return (logits * jax.random.normal(jax.random.key(5), logits.shape)).sum(-1)

    gradient = jax.jit(jax.jacrev(of_table))(params["token_embedding"])  # [b, t, v, d]
    seen = np.abs(gradient).max(-1) > 0
    for row in range(3):
        np.testing.assert_array_equal(seen[row][:, codes[row]], np.tri(16, k=-1, dtype=bool))
        assert seen[row][:, 64 + CONDITION[row, 0]].all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_orders_are_permutations_and_random_in_their_share_of_the_rows(share):
    orders = np.asarray(random_orders(jax.random.key(0), jnp.asarray(share), 400, 16))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.broadcast_to(np.arange(16), orders.shape))
    random = (orders != np.arange(16)).any(1)
    assert abs(random.mean() - share) < 0.07
    assert len(np.unique(orders[random], axis=0)) == random.sum()
    if share == 1:
        first = np.bincount(orders[:, 0], minlength=16)
        assert first.min() > 8 and first.max() < 50  # of 25 on average


def test_the_share_falls_along_a_line():
    objective = dataclasses.replace(LIKELIHOOD, permute_from=100, permute_until=300)
    shares = [float(objective.permuted_share(step)) for step in (0, 100, 150, 200, 300, 10**6)]
    np.testing.assert_allclose(shares, [1, 1, 0.75, 0.5, 0, 0])
    at_once = dataclasses.replace(LIKELIHOOD, permute_from=5, permute_until=5)
    assert [float(at_once.permuted_share(step)) for step in (4, 5)] == [1, 0]


def test_the_step_trains_on_its_share_and_ends_in_the_models_own_order():
    model, params = modern()
    tx = optax.sgd(0.0)
    objective = dataclasses.replace(LIKELIHOOD, permute_from=100, permute_until=300, z_weight=1e-2)
    state = TrainState.create(jax.random.key(0), {"transformer": params}, {}, {"transformer": tx.init(params)}, {})
    step = jax.jit(make_step(dataclasses.replace(model), objective, tx, ema_decay=0.0))
    rows = {"codes/image": model.to_grid(CODES), "label": CONDITION[:, 0]}
    seen = {at: step(state.replace(step=jnp.asarray(at)), rows, {})[1] for at in (0, 200, 300, 301)}
    assert [float(seen[at]["permuted"]) for at in seen] == [1, 0.5, 0, 0]
    for at in (300, 301):  # a share of the conditions is dropped, by the step
        dropped = model.drop_condition(jax.random.fold_in(state.replace(step=at).stream("condition"), 0), CONDITION)
        logits = logits_in_orders()(params, CODES, OWN, dropped)
        np.testing.assert_allclose(seen[at]["nll"], losses.token_nll(logits, CODES).mean(), rtol=1e-5)
        z = (jax.nn.logsumexp(logits, -1) ** 2).mean()
        np.testing.assert_allclose(seen[at]["z_loss"], z, rtol=1e-5)
        np.testing.assert_allclose(seen[at]["loss"], seen[at]["nll"] + 1e-2 * z, rtol=1e-5)
    assert abs(seen[0]["nll"] - seen[300]["nll"]) > 1e-2


def test_random_orders_need_to_know_what_comes_next():
    config = demo_transformer.get_config()
    config.loss.permute_from, config.loss.permute_until = "50%", "75%"
    with pytest.raises(UserError, match="config.model.transformer.target_positions"):
        transformer_recipe(config, random_transformer()[0], Durations(config, 32))
    transformer_recipe(config, modern()[0], Durations(config, 32))
    config.loss.permute_from = "80%"
    with pytest.raises(UserError, match="config.loss: permute_from"):
        transformer_recipe(config, modern()[0], Durations(config, 32))


@pytest.mark.slow
def test_groups_of_bits_cost_what_their_sums_cost():
    model, params = random_transformer(grid=(4, 4), head_bits=3)
    grouped = jax.jit(functools.partial(model.logits, grouped=True))(params, CONDITION, CODES)
    plain = join_logits(grouped)
    assert plain.shape == (3, 16, 64) and grouped.shape == (3, 16, 2, 8)
    targets = model.targets(CODES)
    for smoothing in (0.0, 0.1):
        np.testing.assert_allclose(
            losses.token_nll(grouped, targets, smoothing), losses.token_nll(plain, CODES, smoothing), rtol=1e-4
        )
    np.testing.assert_allclose(losses.z_loss(grouped), losses.z_loss(plain), rtol=1e-4)
    right = losses.over_groups(grouped.argmax(-1) == targets, jnp.all)
    np.testing.assert_array_equal(right, plain.argmax(-1) == CODES)
