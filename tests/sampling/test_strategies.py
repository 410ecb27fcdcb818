"""Filters keep exactly the right tokens, whatever ranks them; guidance follows its formula; settings are traced."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqgan_jax.sampling.strategies import (
    MOST_K,
    RAMPS,
    Strategy,
    draw,
    filter_logits,
    guidance_scale,
    interleave,
    next_token,
    row_keys,
)


def oracle(logits: np.ndarray, k: int, p: float, min_p: float) -> np.ndarray:
    """Which of one row's tokens stay, one after another in falling order."""
    order = np.argsort(-logits, kind="stable")
    kept = [i for i in order if not k or logits[i] >= logits[order[k - 1]]]
    probabilities = np.exp(logits - logits.max())
    total = probabilities[kept].sum()
    if p < 1:
        before, nucleus = 0.0, []
        for i in kept:
            if before >= p and nucleus:
                break
            nucleus.append(i)
            before += probabilities[i] / total
        kept = nucleus
    mask = np.zeros(len(logits), bool)
    mask[kept] = True
    return mask & ((probabilities >= min_p - 1e-7) | (logits == logits.max()))


ROWS = {
    "distinct": np.linspace(-3, 3, 40)[np.random.RandomState(0).permutation(40)],
    "ties": np.random.RandomState(1).randint(-2, 3, 40).astype(float),
    "equal": np.zeros(40),
    "one": np.eye(40)[7] * 50,
}


@pytest.mark.parametrize("kind", ["numbers", "arrays"])
@pytest.mark.parametrize("row", ROWS)
def test_filters_keep_exactly_what_ranking_by_hand_keeps(row, kind):
    logits = ROWS[row].astype(np.float32)
    run = jax.jit(filter_logits)
    for k, p, min_p in itertools.product((0, 1, 2, 7, 40), (0.0, 0.213, 0.77, 1.0), (0.0, 0.3, 1.0)):
        values = (k, p, min_p) if kind == "numbers" else (jnp.int32(k), jnp.float32(p), jnp.float32(min_p))
        kept = run(logits[None], Strategy(top_k=values[0], top_p=values[1], min_p=values[2]))[0]
        expected = oracle(logits, k, p, min_p)
        np.testing.assert_array_equal(np.isfinite(kept), expected, err_msg=f"{k} {p} {min_p}")
        np.testing.assert_array_equal(kept[expected], logits[expected])


def test_ties_with_the_kth_stay_beyond_what_is_ranked():
    logits = jnp.concatenate([jnp.full((1, 2 * MOST_K), 1.0), jnp.zeros((1, 9))], 1)
    strategy = Strategy(top_k=3)
    assert strategy.kind == "top_k"
    assert int(jnp.isfinite(filter_logits(logits, strategy)).sum()) == 2 * MOST_K
    half = strategy.replace(top_p=0.4999)
    assert int(jnp.isfinite(filter_logits(logits, half)).sum()) == MOST_K


def test_a_program_holds_only_what_its_numbers_ask_for():
    def primitives(strategy):
        return str(jax.make_jaxpr(lambda x: draw(row_keys(0, jnp.arange(1)), x, strategy))(jnp.zeros((1, 600))))

    plain, top_k, ranked, greedy = (
        primitives(Strategy(**settings)) for settings in ({}, {"top_k": 5}, {"top_p": 0.5}, {"greedy": True})
    )
    assert " sort[" not in plain and "top_k" not in plain and "cumsum" not in plain
    assert "top_k" in top_k and " sort[" not in top_k
    assert " sort[" in ranked
    assert "argmax" in greedy and "random_bits" not in greedy
    assert [Strategy(top_k=k).kind for k in (0, 1, MOST_K, MOST_K + 1)] == ["plain", "top_k", "top_k", "ranked"]
    assert not Strategy().guided and Strategy(guidance=2.0).guided and Strategy(guidance=jnp.float32(1)).guided
    assert Strategy().replace(guidance=3.0).guided and not Strategy(guidance=3.0).replace(guidance=1.0).guided


def test_the_same_key_draws_the_same_token_however_it_is_ranked():
    logits, keys = jax.random.normal(jax.random.key(0), (64, 300)), row_keys(1, jnp.arange(64))
    plain = draw(keys, logits, Strategy())
    for strategy in (Strategy(top_k=jnp.int32(0)), Strategy(top_p=0.9999999), Strategy(top_k=MOST_K + 44)):
        assert strategy.kind == "ranked"
        np.testing.assert_array_equal(draw(keys, logits, strategy), plain)
    few = [draw(keys, logits, Strategy(top_k=5)), draw(keys, logits, Strategy(top_k=jnp.int32(5)))]
    np.testing.assert_array_equal(*few)
    assert (few[0] != plain).any()


def test_drawn_tokens_follow_the_probabilities():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (4000, 4))
    drawn = draw(row_keys(3, jnp.arange(4000)), logits, Strategy(top_p=0.9))
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.03)


def test_schedules_grow_from_one_to_the_scale():
    def scales(**settings):
        return np.array([guidance_scale(Strategy(guidance=5.0, **settings), i, 8) for i in range(8)])

    t = np.arange(8) / 8
    np.testing.assert_allclose(scales(), np.full(8, 5.0))
    np.testing.assert_allclose(scales(schedule="linear"), 1 + 4 * t, rtol=1e-6)
    np.testing.assert_allclose(scales(schedule="cosine"), 1 + 2 * (1 - np.cos(np.pi * t)), rtol=1e-5)
    powered = 1 + 2 * (1 - np.cos(np.pi * t**2.5))
    np.testing.assert_allclose(scales(schedule="power-cosine", power=2.5), powered, rtol=1e-5)
    np.testing.assert_allclose(scales(interval=(0.25, 0.75)), [1, 1, 5, 5, 5, 5, 1, 1])
    assert set(RAMPS) == {"constant", "linear", "cosine", "power-cosine"}


def test_guidance_mixes_both_passes_of_a_row():
    conditional, null = jax.random.normal(jax.random.key(0), (2, 3, 9))
    seen = []

    def edit(logits, ids, i):
        seen.append(logits)
        return logits

    strategy = Strategy(guidance=3.0, schedule="linear", greedy=True, edit=edit)
    drawn = next_token(row_keys(0, jnp.arange(3)), interleave(conditional, null), strategy, None, jnp.int32(2), 4)
    mixed = null + 2.0 * (conditional - null)
    np.testing.assert_allclose(seen[0], mixed, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(drawn, mixed.argmax(-1))


def test_the_hook_has_the_last_word():
    def only_seven(logits, ids, i):
        return jnp.where(jnp.arange(logits.shape[-1]) == 7, logits, -jnp.inf)

    strategy = Strategy(edit=only_seven)
    drawn = next_token(row_keys(0, jnp.arange(3)), jnp.zeros((3, 9)), strategy, None, jnp.int32(0), 4)
    np.testing.assert_array_equal(drawn, [7, 7, 7])
