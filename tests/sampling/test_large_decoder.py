"""Large grids: every exact way gives the plain decoder's picture, tiles fade without seams, the budget chooses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from tests.memory import device_memory
from vqgan_jax import parallel
from vqgan_jax.models.strips import apply_in_strips
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.sampling.large_decoder import decode_tiles, encode_tiles, plan

MODEL = VQGAN(ref.VQGAN_TINY)


@pytest.fixture(scope="module")
def variables():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))


def decode(variables, ids):
    return MODEL.apply(variables, ids, method="decode")


def in_strips(variables, ids, budget):
    return apply_in_strips(MODEL, variables, ids, method="decode", budget=budget)


def test_the_budget_chooses_and_every_exact_way_agrees(variables):
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    alone = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    ids = np.asarray(jax.random.randint(jax.random.key(1), (1, 32, 16), 0, 64))
    plans, budget = [], 1 << 40
    for chosen_mesh in (alone, mesh, alone):
        plans.append(plan(decode, in_strips, variables, ids.shape, ids.dtype, budget=budget, mesh=chosen_mesh))
        budget = plans[0].bytes - 1
    assert [p.way for p in plans] == ["whole", "sharded", "strips"]
    assert plans[1].bytes < plans[0].bytes
    whole, *others = (p.run(variables, ids) for p in plans)
    assert whole.shape == (1, 64, 32, 3)
    for other in others:
        np.testing.assert_allclose(other, whole, atol=1e-4 * ref.scale(whole))


@pytest.mark.parametrize("size", [(5, 9), (8, 8), (23, 31)])
def test_tiles_of_a_local_decoder_are_exact(size):
    """A decoder without any view beyond the code leaves nothing for the blend to hide."""
    table = np.random.default_rng(0).normal(size=(16, 4, 3)).astype(np.float32)

    @jax.jit
    def local(variables, ids):
        b, h, w = ids.shape
        return variables[ids].reshape(b, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 3)

    ids = np.random.default_rng(1).integers(16, size=(2, *size))
    made = decode_tiles(local, table, ids, 2, tile=8, overlap=3)
    np.testing.assert_allclose(made, local(table, ids), atol=1e-5)


@pytest.mark.parametrize("size", [(5, 9), (8, 8), (23, 31)])
def test_codes_of_tiles_are_those_of_the_place(size):
    """Of an encoder that sees its tile's edges, only codes away from them may differ: none where neighbours meet."""
    picture = np.random.default_rng(2).integers(99, size=(2, 2 * size[0], 2 * size[1]))

    def encode(offset, x):
        ids = np.array(x[:, ::2, ::2] + offset)
        for edge in (np.s_[:, :1], np.s_[:, -1:], np.s_[:, :, :1], np.s_[:, :, -1:]):
            ids[edge] = -1
        return ids

    made = encode_tiles(encode, 1, picture, 2, tile=8, overlap=3)
    np.testing.assert_array_equal(made, encode(1, picture))


def test_tiles_of_the_model_are_near_the_whole(variables):
    ids = np.asarray(jax.random.randint(jax.random.key(1), (1, 24, 16), 0, 64))
    whole = np.asarray(jax.jit(decode)(variables, ids))
    made = decode_tiles(jax.jit(decode), variables, ids, 2, tile=16, overlap=4)
    assert 0 < np.abs(made - whole).mean() < 0.5 * np.abs(whole - whole.mean()).mean()


@pytest.mark.parametrize("codes", [1024, 1021, 514])
@pytest.mark.parametrize("overlap", [3, 8])
def test_tiles_cover_8192_pixels_once(codes, overlap):
    """Weights are one together at each pixel, and each code comes from one tile that shows it."""
    ids = np.arange(codes, dtype=np.int32)[None, None].repeat(5, 1)
    widths = []

    def enlarge(scale, ids):
        widths.append(ids.shape[2])
        return np.float32(scale) * ids.repeat(8, 1).repeat(8, 2)[..., None]

    made = decode_tiles(enlarge, 1 / codes, ids, 8, tile=16, overlap=overlap)
    assert made.shape == (1, 40, 8 * codes, 1) and set(widths) == {16}
    np.testing.assert_allclose(made[..., 0], ids.repeat(8, 1).repeat(8, 2) / codes, atol=1e-6)
    assert len(widths) == -(-(codes - overlap) // (16 - overlap))  # no more than cover it
    found = encode_tiles(
        lambda none, x: x[:, ::8, ::8], None, ids.repeat(8, 1).repeat(8, 2), 8, tile=16, overlap=overlap
    )
    np.testing.assert_array_equal(found, ids)


@pytest.mark.slow
@pytest.mark.parametrize("rows, ways", [(512, ("sharded", "strips")), (509, ("strips", "strips"))])
def test_8192_pixels_are_planned_by_shape(rows, ways):
    """Rows that do not divide over the devices are not cut over them."""
    model = VQGAN(dataclasses.replace(ref.VQGAN_TINY, autoencoder=ref.autoencoder((1, 1, 1, 1, 1), ())))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})

    def convert(variables, ids):
        return model.apply(variables, ids, method="decode")

    def planned(budget):
        return plan(convert, in_strips, variables, (1, rows, 512), jnp.int32, budget=budget, mesh=mesh)

    activation = 4 * 32 * (16 * rows) * (16 * 512)  # of the finest level
    assert planned(1 << 40).way == "whole" and planned(1 << 40).bytes > 2 * activation
    assert tuple(planned(budget).way for budget in (activation, activation // 4)) == ways


@pytest.mark.slow
def test_1024_by_512_pixels_within_the_budget_that_is_announced():
    """Decoding and encoding, over eight devices and in strips: the plain model's within 1e-4."""
    config = dataclasses.replace(ref.VQGAN_TINY, autoencoder=ref.autoencoder((1, 1, 1, 1, 1), ()))
    model = VQGAN(config)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    alone = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    ids = np.asarray(jax.random.randint(jax.random.key(1), (1, 32, 64), 0, 64))
    images = np.asarray(jax.random.uniform(jax.random.key(2), (1, 512, 1024, 3), minval=-1))
    for method, x in (("decode", ids), ("encode", images)):

        def convert(variables, x):
            return model.apply(variables, x, method=method)  # noqa: B023

        def strips(variables, x, budget):
            return apply_in_strips(model, variables, x, method=method, budget=budget)  # noqa: B023

        planned = functools.partial(plan, convert, strips, variables, x.shape, x.dtype)
        whole = planned(budget=1 << 40, mesh=mesh)
        sharded = planned(budget=whole.bytes - 1, mesh=mesh)
        narrow = planned(budget=(budget := whole.bytes // 8), mesh=alone)
        assert (whole.way, sharded.way, narrow.way) == ("whole", "sharded", "strips")
        assert sharded.bytes < whole.bytes / 2 and f"{budget >> 20} MiB" in str(narrow)
        plain = whole.run(variables, x)
        for other in (sharded, narrow):
            with device_memory() as taken:
                made = other.run(variables, x)
            if method == "decode":
                assert made.shape == (1, 512, 1024, 3)
                np.testing.assert_allclose(made, plain, atol=1e-4 * ref.scale(plain))
            else:  # a code may win by less than rounding
                assert made.shape == (1, 32, 64) and (made == plain).mean() > 0.99
        assert budget // 4 < taken.bytes <= narrow.bytes == budget


def test_attention_counts_where_the_compiler_does_not_count_it(variables):
    """On a CPU a library allocates the scores of attention: without them the whole would seem to fit."""
    assert ref.VQGAN_TINY.autoencoder.score_bytes(2, 16, 8) == 4 * 2 * (16 * 8) ** 2
    assert ref.autoencoder((1, 2), (32, 16)).score_bytes(2, 16, 8) == 4 * 2 * (4 * 16 * 8) ** 2  # at the finest level
    assert ref.autoencoder((1, 1, 1), ()).score_bytes(1, 128, 512) == 4 * (128 * 512) ** 2
    one = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    ids = jax.ShapeDtypeStruct((1, 32, 16), jnp.int32)
    plans = [
        plan(decode, in_strips, variables, ids.shape, ids.dtype, budget=1 << 32, mesh=one, uncounted=uncounted)
        for uncounted in (0, 1 << 30, 1 << 32)
    ]
    assert [p.way for p in plans] == ["whole", "whole", "strips"]
    assert plans[1].bytes == plans[0].bytes + (1 << 30)
