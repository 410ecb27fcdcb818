"""The cached decoder: logits of the whole sequence at every position, ids that are given, memory, guidance, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.models import random_transformer
from vqgan_jax import parallel
from vqgan_jax.config import UserError
from vqgan_jax.models import attention, blocks
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.sampling.decoder import decode, spans
from vqgan_jax.sampling.large import LargeSampler
from vqgan_jax.sampling.sampler import leading_given, make_sampler
from vqgan_jax.sampling.strategies import Strategy, guidance_scale, row_keys

LABELS = jnp.array([[1], [7], [3], [3]])


@functools.cache
def small():
    model, params = random_transformer()
    return model, params, split_layers(params)


@functools.cache
def sampler():
    """One for all tests, so that what they draw alike is compiled once."""
    return make_sampler(small()[0], (6, 6))


def recorded(model, split, strategy, condition=LABELS, **more):
    """Ids [b, t], and the (guided) logits [t, b, v] that the decoder drew them from."""
    logits = {}

    def edit(x, ids, i):
        jax.debug.callback(lambda x, i: logits.update({int(i): np.asarray(x)}), x, i)
        return x

    strategy = strategy.replace(edit=edit)
    null = model.layout.condition(model.null_condition) if strategy.guided else None

    @jax.jit
    def run(split, condition, keys):
        apply, empty = model.decoder(split)
        prefix = model.layout.condition(condition)
        return decode(apply, empty, prefix, len(model.order), keys, strategy, null_bt=null, **more)

    ids = run(split, condition, row_keys(3, jnp.arange(len(condition))))
    jax.effects_barrier()
    return ids, logits


@pytest.mark.parametrize(
    "start, length, buckets", [(1, 256, 8), (1, 256, 1), (256, 256, None), (31, 30, 8), (1, 1, None)]
)
def test_spans_cover_every_token_and_grow(start, length, buckets):
    found = spans(start, length, buckets)
    tokens = [i for first, last, _ in found for i in range(first, last)]
    assert tokens == list(range(length - 1))
    for _, last, span in found:
        assert start + last <= span <= start + length - 1
    assert [s for *_, s in found] == sorted({s for *_, s in found})
    if (start, length, buckets) == (1, 256, 8):
        assert found == spans(1, 256)
        assert len(found) == 8 and sum((last - first) * span for first, last, span in found) / 255 < 145


@pytest.mark.parametrize(
    "kind, buckets, tolerance",
    [
        ({}, 8, 1e-4),
        ({"dtype": jnp.bfloat16}, 5, 0.06),
        ({"spatial": True, "grid": (4, 4)}, 3, 1e-4),
        ({"spatial": True, "grid": (4, 4), "prefix": -1}, 3, 1e-4),
    ],
    ids=["class", "bfloat16", "spatial", "both ways"],
)
def test_the_decoders_logits_equal_the_whole_sequences_at_every_position(kind, buckets, tolerance):
    model, params = random_transformer(**kind)
    condition = jax.random.randint(jax.random.key(2), (4, model.condition.length), 0, model.condition.vocab_size)
    ids, logits = recorded(model, split_layers(params, model.dtype), Strategy(), condition, buckets=buckets)
    assert len(np.unique(ids)) > 10
    full = jax.jit(model.logits)(params, condition, ids)
    spread = float(full.std())
    assert sorted(logits) == list(range(len(model.order))) and spread > 0.5
    for i in logits:
        np.testing.assert_allclose(logits[i], full[:, i], atol=tolerance * spread, err_msg=f"token {i}")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_one_token_attends_as_many_do(kv_heads):
    shapes = (3, 1, 32), (3, 20, 8 * kv_heads), (3, 20, 8 * kv_heads)
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    seen = jnp.arange(20) < 13
    heads = [a.reshape(3, -1, a.shape[-1] // 8, 8) for a in (q, k, v)]
    expected = jax.nn.dot_product_attention(*heads, mask=jnp.broadcast_to(seen, (3, 4, 1, 20))).reshape(3, 32)
    by_product = attention.attend_by_matrix if kv_heads == 4 else attention.attend_by_spread_query
    for one in (by_product, attention.attend_by_sum, attention.attend_by_heads):
        np.testing.assert_allclose(one(q[:, 0], k, v, seen, heads=4), expected, atol=1e-5)


def test_one_rows_product_in_pieces_is_the_product():
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(1, 1, 32), (32, 6)]))
    np.testing.assert_allclose(blocks.contract(x, kernel), x @ kernel, atol=1e-5)
    assert blocks.contract(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_guided_logits_are_those_of_two_passes():
    model, params, split = small()
    strategy = Strategy(guidance=3.0, schedule="power-cosine", power=0.7, interval=(0.1, 0.8))
    ids, logits = recorded(model, split, strategy)
    conditional = model.logits(params, LABELS, ids)
    null = model.logits(params, jnp.broadcast_to(model.null_condition, LABELS.shape), ids)
    for i in range(36):
        w = guidance_scale(strategy, i, 36)
        np.testing.assert_allclose(logits[i], null[:, i] + w * (conditional - null)[:, i], atol=5e-3)
    assert float(jnp.abs(conditional - null).mean()) > 0.05


def test_guidance_of_one_is_none_and_needs_a_null_condition():
    _, _, split = small()
    keys, linear = row_keys(0, jnp.arange(4)), Strategy(schedule="linear", top_k=9)
    plain = sampler()(split, LABELS, keys, linear, None)
    one, guided = (
        sampler()(split, LABELS, keys, linear.replace(guidance=jnp.float32(w), guided=True), None) for w in (1, 4)
    )
    np.testing.assert_array_equal(plain, one)
    assert (guided != plain).any()
    without, params = random_transformer(dropout=0.0)
    with pytest.raises(UserError, match="condition_dropout"):
        make_sampler(without, (6, 6))(split_layers(params), LABELS, keys, Strategy(guidance=4.0), None)


def test_the_window_is_guided_like_the_plain_sampler():
    model, _, split = small()
    keys, strategy = row_keys(5, jnp.arange(4)), Strategy(guidance=jnp.float32(2.5), schedule="linear", top_k=9)
    plain = sampler()(split, LABELS, keys, strategy, None)
    slid = LargeSampler(model, (6, 6)).whole(split, LABELS, keys, strategy)
    np.testing.assert_array_equal(slid, plain)


def test_a_sweep_compiles_once():
    model, _, split = small()
    sweep = make_sampler(model, (6, 6))
    for seed, (temperature, k, p, min_p, scale, power, interval) in enumerate(
        [
            (1.0, 5, 1.0, 0.0, 2.0, 1.0, (0.0, 1.0)),
            (0.7, 50, 0.9, 0.1, 3.5, 2.0, (0.2, 0.9)),
            (1.3, 256, 0.5, 0.5, 9.0, 0.5, (0, 1)),
        ]
    ):
        strategy = Strategy(
            temperature, k, p, min_p, guidance=scale, power=power, interval=interval, schedule="power-cosine"
        )
        keys = row_keys(seed, jnp.arange(2))
        sweep(split, LABELS[:2], keys, strategy, None)
    assert sweep._cache_size() == 1


def test_given_ids_never_change_and_a_leading_run_is_prefilled():
    model, _, split = small()
    keys, strategy = row_keys(2, jnp.arange(4)), Strategy(guidance=2.0)
    ids = jax.random.randint(jax.random.key(1), (4, 6, 6), 0, 64)
    rng = np.random.default_rng(0)
    for mask in (rng.random((4, 6, 6)) < 0.4, np.ones((4, 6, 6), bool), np.zeros((4, 6, 6), bool)):
        mask[:, :2] |= mask[:, 2:3]
        drawn = sampler()(split, LABELS, keys, strategy, (ids, jnp.asarray(mask)))
        np.testing.assert_array_equal(np.asarray(drawn)[mask], np.asarray(ids)[mask])
        assert mask.all() or (np.asarray(drawn)[~mask] != np.asarray(ids)[~mask]).any()
    mask = np.zeros((4, 6, 6), bool)
    mask[:, :3], mask[:, 3, :2], mask[0] = True, True, True
    assert leading_given(model, mask) == 18
    given = (ids, jnp.asarray(mask))
    slow, fast = (sampler()(split, LABELS, keys, strategy, given, leading=leading) for leading in (0, 18))
    np.testing.assert_array_equal(fast, slow)
    whole = (ids, jnp.ones((4, 6, 6), bool))
    np.testing.assert_array_equal(sampler()(split, LABELS, keys, strategy, whole, leading=36), ids)


EIGHT = jnp.arange(8)[:, None], row_keys(7, jnp.arange(8)), Strategy(top_k=30, guidance=1.5)


def test_a_row_depends_on_its_seed_alone():
    _, _, split = small()
    labels, keys, strategy = EIGHT
    together = np.asarray(sampler()(split, labels, keys, strategy, None))
    turned = np.asarray(sampler()(split, labels[::-1], keys[::-1], strategy, None))[::-1]
    np.testing.assert_array_equal(together, turned)
    for i in (0, 3, 7):
        np.testing.assert_array_equal(
            sampler()(split, labels[i : i + 1], keys[i : i + 1], strategy, None)[0], together[i]
        )
    assert len(np.unique(together.reshape(8, -1), axis=0)) == 8


SLOW_SHAPES = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (1, 4, 2), (1, 2, 4))]


@pytest.mark.parametrize("shape", [(2, 2, 2), *SLOW_SHAPES])
def test_eight_devices_draw_what_one_draws(shape):
    model, params, split = small()
    labels, keys, strategy = EIGHT
    one = sampler()(split, labels, keys, strategy, None)
    mesh = parallel.make_mesh(dict(zip(parallel.MESH_AXES, shape, strict=True)))
    placed = model.split(params, mesh)
    kernel = placed["block_0"]["attention"]["query_kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (32 // shape[1], 32 // shape[2])
    rows = parallel.put_batch({"labels": np.asarray(labels)}, mesh, 8)["labels"]
    with jax.set_mesh(mesh):
        many = make_sampler(model, (6, 6))(placed, rows, keys, strategy, None)
    np.testing.assert_array_equal(many, one)


def test_the_cache_is_sharded_by_batch_and_heads():
    model, params, _ = small()
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: model.decoder({})[1](8))()
    assert cache.keys[0].shape == (8, 36, 32)
    assert cache.keys[1].sharding.shard_shape((8, 36, 32)) == (2, 36, 16)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_temporaries_stay_close_to_the_cache(scale):
    """The cache is one of them: nothing else is as large, so it is updated in place at every token."""
    model, params = random_transformer(layers=16, width=64, grid=(8, 8))
    optimise = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        rows = 8
        args = split_layers(params), jnp.zeros((rows, 1), jnp.int32), row_keys(0, jnp.arange(rows))
        compiled = make_sampler(model, (8, 8)).lower(*args, Strategy(guidance=scale), None).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", optimise)
    cache = 2 * 16 * rows * (2 if scale != 1 else 1) * 64 * 64 * 4
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert cache <= temporaries < 1.1 * cache


def test_splitting_casts_all_but_the_norms():
    model, params, _ = small()
    split = split_layers(params, jnp.bfloat16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(split):
        wide = "norm" in jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), path
