"""What both trainers do before the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from vqgan_jax import parallel
from vqgan_jax.train import setup
from vqgan_jax.train.checkpoints import Checkpoints
from vqgan_jax.train.state import TrainState


def make_init(ema: bool):
    def init(key):
        params = {"transformer": {"w": jax.random.normal(key, (4,))}}
        states = {"transformer": optax.sgd(0.1).init(params["transformer"])}
        return TrainState.create(key, params, {"transformer": {}}, states, params if ema else {})

    return init


def judged(lecam: bool):
    def init(key):
        means = {"lecam": {"logits": {"real": jnp.ones(()), "fake": jnp.ones(())}}} if lecam else {}
        collections = {"generator": {}, "discriminator": {"batch_stats": {"mean": jnp.ones(3)}} | means}
        return TrainState.create(key, {"generator": {"w": jnp.ones(4)}}, collections, {"generator": ()}, {})

    return init


@pytest.mark.parametrize("had", [True, False])
def test_a_checkpoint_without_lecams_means_starts_them_at_zero(tmp_path, had):
    mesh = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    saved = parallel.init_sharded(judged(had), mesh, jax.random.key(1))
    with Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_best=0) as checkpoints:
        checkpoints.save(5, saved, {"format_version": 2, "examples": 40}, None)
        state, _ = setup.restore_or_init(checkpoints, judged(True), mesh, common.run())
    assert jax.tree.structure(state.collections) == jax.tree.structure(judged(True)(jax.random.key(0)).collections)
    assert float(state.collections["discriminator"]["lecam"]["logits"]["real"]) == had
    assert float(state.collections["discriminator"]["batch_stats"]["mean"][0]) == 1


@pytest.mark.parametrize("had", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("recorded", ["0.0", "0.9", None])
def test_whether_a_run_was_averaged_is_read_from_its_checkpoint(tmp_path, had, wanted, recorded):
    """config.json is of the last start, which may have been killed before it saved anything."""
    mesh = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    saved = parallel.init_sharded(make_init(had), mesh, jax.random.key(1))
    if had:
        saved = saved.replace(ema=jax.tree.map(lambda x: x + 1, saved.ema))
    if recorded:
        (tmp_path / "config.json").write_text(f'{{"ema_decay": {recorded}}}')
    with Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_best=0) as checkpoints:
        checkpoints.save(5, saved, {"format_version": 2, "examples": 40}, None)
        state, start = setup.restore_or_init(checkpoints, make_init(wanted), mesh, common.run())
    assert start.examples == 40 and bool(state.ema) == wanted
    if wanted:
        source = saved.ema if had else saved.params
        np.testing.assert_array_equal(state.ema["transformer"]["w"], source["transformer"]["w"])
    assert jnp.array_equal(state.params["transformer"]["w"], saved.params["transformer"]["w"])
