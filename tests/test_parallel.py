"""The mesh: 8 simulated devices compute what one does, leaves are sharded as the table says, mistakes raise."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests import reference as ref
from tests.train.test_vqgan_step import OBJECTIVE
from vqgan_jax import parallel
from vqgan_jax.conditioning import ClassLabelConfig
from vqgan_jax.config import UserError
from vqgan_jax.models.lpips import LPIPS, LPIPSConfig
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.train import transformer_step, vqgan_step
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig

MESHES = {
    "data": dict(data=8, fsdp=1, tensor=1),
    "fsdp": dict(data=1, fsdp=8, tensor=1),
    "tensor": dict(data=4, fsdp=1, tensor=2),
    "mixed": dict(data=2, fsdp=2, tensor=2),
}
ONE = dict(data=1, fsdp=1, tensor=1)
TX = optax.sgd(1e-2)


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values())))
    return parallel.make_mesh(sizes, jax.devices()[:count])


def run(init, step, sizes, rows, frozen=None):
    """Three SGD steps on a mesh: state and the metrics of each step, on the host."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        state = parallel.init_sharded(init, mesh, jax.random.key(0))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        traces = []

        def counted(*args):
            traces.append(1)
            return step(*args)

        fast = jax.jit(counted, out_shardings=(shardings, None))  # as the scripts pin them
        frozen = parallel.put_tree(frozen or {}, mesh)
        metrics = []
        for k in range(3):
            batch = parallel.put_batch({name: x[k] for name, x in rows.items()}, mesh, 8)
            state, m = fast(state, batch, frozen)
            metrics.append(jax.device_get(m))
    assert len(traces) == 1, "one trace for all steps"
    return state, metrics


def compare(one, many):
    """Losses and gradient norms of each step, and the parameters after the last. The adaptive weight divides by the
    norm of a small gradient, which rounding moves by a thousandth."""
    for k, (a, b) in enumerate(zip(one[1], many[1], strict=True)):
        for name in a:
            loose = name == "adaptive_weight" or (k and "adaptive_weight" in a)
            np.testing.assert_allclose(a[name], b[name], rtol=1e-2 if loose else 2e-4, atol=1e-4, err_msg=name)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4),
        *(jax.device_get((s.params, s.collections)) for s in (one[0], many[0])),
    )


@functools.cache
def vqgan_case():
    model = VQGAN(VQGANConfig(ref.autoencoder(), ref.vq(), ref.VQGAN_TINY.discriminator, "image"))
    # L2, for the sign of an L1 gradient can flip with rounding
    objective = vqgan_step.VQGANObjective(**OBJECTIVE | {"adversarial_start": 0, "reconstruction": "l2"})
    lpips = LPIPS(LPIPSConfig((8, 8), (1, 1)))
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 32, 32, 3)).astype(np.float32)
    frozen = {"lpips": lpips.init(jax.random.key(3), images[0, :1], images[0, :1])}
    tx = {"generator": TX, "discriminator": TX}
    init = vqgan_step.make_init(model, tx, ema=True)
    step = vqgan_step.make_step(model, objective, lpips, tx, ema_decay=0.9)
    return init, step, {"image": images}, frozen


@functools.cache
def transformer_case():
    config = TransformerConfig(
        ArchitectureConfig(2, 4, 64, 0, 0, 0.0, 0.0, 0.0), ClassLabelConfig(8), (4, 4), "row_major", False, 0.0
    )
    model = ImageTransformer(config, Tokenizer(VQGAN(ref.FIRST_STAGE_TINY)))
    rng = np.random.default_rng(0)
    rows = {
        "codes/image": rng.integers(0, 64, (3, 8, 4, 4)).astype(np.int32),
        "label": rng.integers(0, 8, (3, 8)).astype(np.int32),
    }
    init = transformer_step.make_init(model, TX, ema=True)
    step = transformer_step.make_step(model, transformer_step.TransformerObjective(1.0, 0.0), TX, ema_decay=0.9)
    return init, step, rows


@functools.cache
def on_one_device(case):
    return run(case()[0], case()[1], ONE, *case()[2:])


@pytest.mark.parametrize("name", MESHES)
def test_transformer_on_eight_devices_equals_one(name):
    init, step, rows = transformer_case()
    many = run(init, step, MESHES[name], rows)
    compare(on_one_device(transformer_case), many)
    kernel = many[0].params["transformer"]["blocks"]["attention"]["query_kernel"]
    moved = P(None, "fsdp", "tensor")
    assert kernel.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh_of(MESHES[name]), moved), 3)
    assert (
        many[0]
        .ema["transformer"]["head"]
        .sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh_of(MESHES[name]), P("fsdp", "tensor")), 2)
    )


@pytest.mark.parametrize("name", ["data", pytest.param("fsdp", marks=pytest.mark.slow), "mixed"])
def test_vqgan_on_eight_devices_equals_one(name, monkeypatch):
    """BatchNorm, the codebook's statistics and every metric are global."""
    monkeypatch.setattr(parallel, "MIN_SHARDED_SIZE", 64)
    init, step, rows, frozen = vqgan_case()
    many = run(init, step, MESHES[name], rows, frozen)
    compare(on_one_device(vqgan_case), many)
    kernel = many[0].params["generator"]["encoder"]["conv_out"]["kernel"]
    assert (MESHES[name]["fsdp"] > 1) == (not kernel.sharding.is_fully_replicated)


def test_unknown_names_raise():
    with pytest.raises(KeyError):
        parallel.constrain(jnp.zeros((2, 2)), "batch", "widht")
    with pytest.raises(ValueError):
        parallel.constrain(jnp.zeros((2, 2)), "batch")
    boxed = {"w": nn.Partitioned(jax.ShapeDtypeStruct((2,), jnp.float32), ("widht",))}
    with pytest.raises(KeyError):
        parallel.state_shardings(boxed, mesh_of(ONE))


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=-1, fsdp=-1), dict(data=0), dict(data=-1, fsdp=3)])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(UserError, match="config.mesh"):
        parallel.make_mesh(ONE | sizes)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="config.batch_size: 12 examples do not divide over 8"):
        parallel.check_batch(12, mesh_of(MESHES["data"]))


def test_a_vocabulary_that_does_not_divide_stays_whole():
    mesh = mesh_of(MESHES["tensor"])
    boxed = {n: nn.Partitioned(jax.ShapeDtypeStruct((n, 8), jnp.float32), ("vocab", "width")) for n in (64, 65)}
    shardings = parallel.state_shardings(boxed, mesh)
    assert shardings[64].spec == P("tensor", "fsdp") and shardings[65].spec == P(None, "fsdp")


def test_rows_of_a_host_are_those_of_its_devices():
    np.testing.assert_array_equal(parallel.host_rows(mesh_of(MESHES["mixed"]), 8), np.arange(8))
    mesh = mesh_of(MESHES["data"])
    rows = np.arange(16, dtype=np.int32)
    batch = parallel.put_batch({"x": rows}, mesh, 16)
    np.testing.assert_array_equal(batch["x"], rows)
    assert batch["x"].addressable_shards[0].data.shape == (2,)


def test_shard_by_size(monkeypatch):
    mesh = mesh_of(MESHES["fsdp"])
    assert parallel.shard_by_size((3, 3, 64, 128), mesh) == P(None, None, None, "fsdp")
    assert parallel.shard_by_size((3, 3, 3, 3), mesh) == P()  # small
    assert parallel.shard_by_size((5, 5, 5, 129), mesh) == P()  # nothing divides
