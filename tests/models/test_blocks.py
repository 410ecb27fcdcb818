"""The transformer's variants: each is causal, the same with and without a cache, and near itself in bfloat16."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax import losses
from vqgan_jax.models import bits
from vqgan_jax.models.blocks import GPTConfig
from vqgan_jax.models.gpt import GPT, cast_weights, init_cache, split_layers
from vqgan_jax.models.rope import rotate, rotation_at
from vqgan_jax.train.optimizers import kernels_only

T, CONDITION = 10, 3
PLACES = ((-3, -3), (-2, -2), (-1, -1), *((i // 3, i % 3) for i in range(9)))
LLAMA = dict(block="llama", coordinates=PLACES, qk_norm=True, kv_heads=2, adaln=True, drop_path=0.5)
VARIANTS = {
    "llama": dict(block="llama"),
    "rope": dict(coordinates=PLACES),
    "mute": dict(coordinates=(None,) * CONDITION + PLACES[CONDITION:], block="llama"),
    "qk_norm": dict(qk_norm=True),
    "kv_heads": dict(kv_heads=1),
    "adaln": dict(adaln=True),
    "drop_path": dict(drop_path=0.5),
    "target_positions": dict(target_positions=True),
    "head_bits": dict(head_bits=2, block="llama"),
    "everything": LLAMA | dict(target_positions=True, mlp_width=24),
}
FAST = ("everything",)


def config_of(**changes) -> GPTConfig:
    return ref.gpt_config(24, 16, 12, 2, 4, 32, 0, 0.0, 0.0, 0.0, condition=CONDITION, **changes)


def random_params(config: GPTConfig, spread: float = 0.3):
    """Parameters of which none is at its start, where some do nothing yet."""
    ids = jnp.zeros((1, CONDITION), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), ids, positions_bt=ids)))["params"]
    rng = np.random.default_rng(0)

    def draw(path, x):
        centre = 1.0 if jax.tree_util.keystr(path).endswith("['scale']") else 0.0
        return jnp.asarray(centre + spread * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits_of(config: GPTConfig, params, ids, **options):
    positions = jnp.arange(ids.shape[1])[None]
    return GPT(config).apply({"params": params}, ids, positions_bt=positions, **options)[0]


@functools.cache
def results(name: str):
    """All that is asked of a variant, from one program: logits plain, cached and in bfloat16, and who sees whom."""
    config = config_of(**VARIANTS[name])
    params = random_params(config)
    ids = jnp.stack([jnp.arange(T), jnp.arange(T)[::-1] + 5]).astype(jnp.int32)
    positions = jnp.arange(T)[None]
    whole, apart = GPT(config), GPT(config, scan_layers=False)
    tables = [n for n in ("target_embedding", "position_embedding", "token_embedding") if n in params]
    table = "token_embedding" if config.adaln else tables[0]

    def cached(params):
        """Four tokens at once, the others one by one; and those of one index of the whole sequence."""
        split, cache = split_layers(params), init_cache(config, 2, T + 1, jnp.float32)
        first, cache = apart.apply({"params": split}, ids[:, :4], positions_bt=positions[:, :4], cache=cache, span=4)

        def token(cache, i):
            logits, cache = apart.apply(
                {"params": split}, ids[:, i][:, None], positions_bt=i[None, None], cache=cache, span=T + 1
            )
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(token, cache, jnp.arange(4, T))
        at = apart.apply({"params": split}, ids, positions_bt=positions, at=jnp.array([3, 7]))[0]
        return jnp.concatenate([first, rest.swapaxes(0, 1)], 1), at

    def outputs(shift, params):
        """A shift of each position's embedding: the ids and places of row 0 are the rows of every table."""
        moved = params | {table: params[table].at[:T].add(shift)}
        return whole.apply({"params": moved}, ids[:1], positions_bt=positions)[0][0]

    @jax.jit
    def run(params):
        half = GPT(config, jnp.bfloat16).apply({"params": params}, ids, positions_bt=positions)[0]
        ways = jnp.eye(T)[:, :, None] * jax.random.normal(jax.random.key(2), (T, config.width))
        still = jnp.zeros((T, config.width))
        moved = jax.vmap(lambda way: jax.jvp(lambda shift: outputs(shift, params), (still,), (way,))[1])(ways)
        seen = jnp.abs(moved).sum(-1).T  # [output, moved token]
        return logits_of(config, params, ids), half, *cached(params), seen

    return config, params, ids, jax.device_get(run(params))


each = pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])


@each
def test_with_a_cache_it_is_the_same(name):
    _, _, _, (plain, _, cached, at, _) = results(name)
    assert np.ptp(plain) > 1
    np.testing.assert_allclose(plain, cached, atol=1e-4)
    np.testing.assert_allclose(plain[[0, 1], [3, 7]], at[:, 0], atol=1e-4)


@each
def test_no_token_sees_later_ones(name):
    """By gradient; with AdaLN all see the whole condition."""
    config, _, _, (*_, seen) = results(name)
    i, j = np.meshgrid(np.arange(T), np.arange(T), indexing="ij")
    np.testing.assert_array_equal(seen > 1e-9, (j <= i) | (config.adaln & (j < CONDITION)))


@each
def test_bfloat16_is_near(name):
    _, _, _, (plain, half, *_) = results(name)
    assert half.dtype == np.float32
    assert np.abs(plain - half).mean() < 2e-2 * np.abs(plain).mean() + 1e-3


def test_rotary_positions_depend_on_offsets_alone():
    """The product of a query and a key is the same wherever on the grid both stand, and another at another offset."""
    width, grid = 16, [(i // 8, i % 8) for i in range(64)]
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.standard_normal((1, 1, width)), jnp.float32) for _ in range(2))

    def turned(x):
        places = jnp.arange(64)[None]
        return rotate(jnp.broadcast_to(x, (1, 64, width)), rotation_at(tuple(grid), width, places))[0]

    products = np.asarray(turned(query) @ turned(key).T)
    by_offset = {}
    for i, (y, x) in enumerate(grid):
        for j, (v, u) in enumerate(grid):
            by_offset.setdefault((v - y, u - x), []).append(products[i, j])
    assert max(np.ptp(values) for values in by_offset.values()) < 1e-4
    means = sorted(np.mean(values) for values in by_offset.values())
    assert len(means) == 225 and min(np.diff(means)) > 0 and np.ptp(means) > 1
    np.testing.assert_allclose(by_offset[0, 0][0], (query * key).sum(), rtol=1e-5)


def test_a_place_without_coordinates_has_no_query_and_no_key():
    rotation = rotation_at((None, (0, 0), (2, 1)), 8, jnp.arange(3)[None])
    turned = rotate(jnp.ones((1, 3, 16)), rotation)
    assert not turned[0, 0].any() and (turned[0, 1] == 1).all() and not np.allclose(turned[0, 2], 1)


def test_heads_of_one_group_share_their_keys():
    """A group of two is two heads whose keys and values are alike."""
    one, two = config_of(kv_heads=2, qk_norm=True), config_of(qk_norm=True)
    params = random_params(one)
    attention = dict(params["blocks"]["attention"])
    for name in ("key", "value"):
        for leaf in ("kernel", "bias"):
            x = attention[f"{name}_{leaf}"]
            doubled = jnp.repeat(x.reshape(*x.shape[:-1], 2, 8), 2, axis=-2)
            attention[f"{name}_{leaf}"] = doubled.reshape(*x.shape[:-1], 32)
    wide = params | {"blocks": params["blocks"] | {"attention": attention}}
    ids = jnp.arange(T)[None]
    run = jax.jit(lambda *both: [logits_of(*args, ids) for args in zip((one, two), both, strict=True)])
    np.testing.assert_allclose(*run(params, wide), atol=1e-5)


def test_drop_path_leaves_rows_out_in_training_alone():
    """At a rate near one the last layer's branches are left out of nearly all rows, and the first layer's of none."""
    config = config_of(drop_path=0.999)
    params = random_params(config)
    ids, positions = jnp.broadcast_to(jnp.arange(T), (16, T)), jnp.arange(T)[None]

    @jax.jit
    def run(params, key):
        train = dict(train=True, rngs={"dropout": key})
        trained = GPT(config).apply({"params": params}, ids, positions_bt=positions, **train)[0]
        return trained, logits_of(config, params, ids)

    trained, plain = run(params, jax.random.key(0))
    assert np.ptp(plain, axis=0).max() < 1e-5
    first = params | {"blocks": jax.tree.map(lambda x: x.at[1].set(0), params["blocks"])}  # zeros: nothing is added
    alone = run(first, jax.random.key(0))[1]
    left_out = np.isclose(trained, alone, atol=1e-4).all((1, 2))
    assert left_out.sum() >= 14 and not np.allclose(plain, alone, atol=1e-2)


def test_a_token_knows_the_place_that_it_predicts():
    config, params, ids, (plain, *_) = results("everything")
    targets = jnp.arange(1, T + 1)[None].at[0, 5].set(9)
    moved = jax.jit(functools.partial(logits_of, config))(params, ids, targets_bt=targets)
    np.testing.assert_allclose(moved[:, :5], plain[:, :5], atol=1e-4)
    assert np.abs(moved - plain)[:, 5].max() > 0.1


def test_groups_of_bits_are_factors_of_an_id():
    """The loss by groups is that of the sums, smoothed or not, and no other id has an id's groups."""
    config, params, ids, (plain, *_) = results("head_bits")
    codes = jnp.asarray(ids % 16)
    logits = jax.jit(functools.partial(logits_of, config, grouped=True))(params, ids)
    assert logits.shape == (2, T, 2, 4)
    groups = bits.split_bits(codes, 2, 2)
    for smoothing in (0.0, 0.3):
        whole = losses.token_nll(plain, codes, smoothing)
        np.testing.assert_allclose(losses.token_nll(logits, groups, smoothing), whole, atol=1e-4)
    assert len(np.unique(np.asarray(bits.split_bits(jnp.arange(16), 2, 2)), axis=0)) == 16
    table = jnp.arange(8.0)[:, None] ** 3
    np.testing.assert_array_equal(bits.embed_bits(table, jnp.array([[6]]), 2, 2)[0, 0], [1 + 6**3])
    with pytest.raises(ValueError, match="head_bits"):
        config_of(head_bits=3)


def test_norms_stay_in_float32_and_kernels_alone_decay():
    params = random_params(config_of(**VARIANTS["everything"]))
    for path, x in jax.tree_util.tree_leaves_with_path(cast_weights(params, jnp.bfloat16)):
        assert (x.dtype == jnp.float32) == ("norm" in jax.tree_util.keystr(path)), path
    decays = kernels_only(params)
    blocks = decays["blocks"]
    assert {name for name in blocks if blocks[name] is True} == {
        *("mlp_up_kernel", "mlp_gate_kernel", "mlp_down_kernel", "modulation_kernel")
    }
    assert not any(jax.tree.leaves([blocks["norm1"], blocks["attention"]["query_norm"], decays["target_embedding"]]))
    assert decays["head"] and not decays["token_embedding"] and blocks["attention"]["query_kernel"]


def test_adaln_starts_without_effect():
    """Zero gates: a block changes nothing before it has learned."""
    config = config_of(adaln=True)
    params, ids = random_params(config), jnp.zeros((1, 5), jnp.int32)
    started = {name: 0 * x if name.startswith("modulation") else x for name, x in params["blocks"].items()}
    run = jax.jit(functools.partial(logits_of, config))
    without = jax.tree.map(lambda x: 0 * x, started)
    logits = [run(params | {"blocks": blocks}, ids) for blocks in (started, without, params["blocks"])]
    np.testing.assert_array_equal(*logits[:2])
    assert not np.allclose(logits[0], logits[2], atol=0.1)


def test_a_condition_of_many_tokens_enters_a_cache_at_once():
    config = config_of(adaln=True)
    cache = jax.eval_shape(lambda: init_cache(config, 1, T, jnp.float32))
    assert [x.shape for x in cache.modulations] == [(1, 6 * 32)] * 2
    params = split_layers(random_params(config))
    with pytest.raises(ValueError, match="the condition 3"):
        ids = jnp.zeros((1, 2), jnp.int32)
        GPT(config, scan_layers=False).apply(
            {"params": params}, ids, positions_bt=ids, cache=init_cache(config, 1, T, jnp.float32), span=2
        )


@pytest.mark.parametrize(
    ("layers", "heads", "width", "hidden", "parameters"),
    [
        (12, 12, 768, 2048, 110_888_448),
        (24, 16, 1024, 2816, 342_910_976),
        (36, 20, 1280, 3584, 774_699_520),
        (48, 24, 1536, 4096, 1_410_972_672),
        (24, 32, 3200, 8704, 3_096_659_200),
    ],
)
def test_a_llama_has_llamagens_parameters(layers, heads, width, hidden, parameters):
    """B, L, XL, XXL and 3B, with 16384 codes, 1000 classes and the null class."""
    codes = 16384
    sizes = (codes + 1001, codes, 257, layers, heads, width, 0, 0.0, 0.0, 0.0)
    config = ref.gpt_config(*sizes, block="llama", coordinates=(None, (0, 0)))
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), ids, positions_bt=ids)))
    assert config.hidden == hidden
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_sizes_that_do_not_go_together_are_refused():
    for changes, message in (
        (dict(kv_heads=3), "kv_heads"),
        (dict(coordinates=PLACES, width=24), "rotary"),
        (dict(adaln=True, condition=0), "adaln"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config_of(), **changes)
