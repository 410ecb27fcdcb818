"""What is logged of a run's speed: FLOPs by hand, the share of a peak, memory, waiting."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.test_parallel import MESHES, mesh_of, transformer_case
from vqgan_jax import parallel
from vqgan_jax.train import roofline, speed


def test_flops_of_a_training_step_are_those_of_the_formula():
    """24 d^2 a token and layer, 4 t d for attention and 2 d v for the head; three times that with the gradient."""
    init, step, rows = transformer_case()
    mesh = mesh_of(MESHES["mixed"])
    d, t, v, layers, batch = 64, 16, 64, 2, 8
    forward = batch * t * (layers * (24 * d**2 + 4 * t * d) + 2 * d * v)
    with jax.set_mesh(mesh):
        state = parallel.abstract_sharded(init, mesh, jax.random.key(0))
        counter = speed.flops_counter(step, state, {})
        assert counter(parallel.put_batch({name: x[0] for name, x in rows.items()}, mesh, 8)) == 3 * forward


def test_the_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    chip = SimpleNamespace(device_kind="TPU v5 lite", memory_stats=lambda: {"bytes_in_use": 2**30})
    more = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 2**32})
    monkeypatch.setattr(jax, "devices", lambda: [chip] * 4)
    monkeypatch.setattr(jax, "local_devices", lambda: [chip, more])
    rates = {"images/s": 8.0} | speed.utilisation(lambda: 197e12)
    found = speed.of_steps(rates, [0.5, 0.5, 0.5], [0.0, 0.3, 0.0])
    assert found.pop("data_wait_share") == pytest.approx(0.2) and found.pop("data_wait_seconds") == pytest.approx(0.1)
    assert found.pop("mfu") == pytest.approx(0.5)  # a quarter of a second of four chips in half a second
    assert found == {
        "images/s": 16, "step_seconds": 0.5, "step_seconds_p99": 0.5, "hbm_gib": 3.0, "hbm_peak_gib": 4.0
    }  # fmt: skip


def test_where_no_peak_is_known_nothing_is_counted():
    assert speed.utilisation(lambda: pytest.fail("counted")) == {} and speed.memory_in_use() == {}
    assert speed.of_steps({"images/s": 8}, [], []) == {}


def test_every_product_is_found_with_how_often_it_runs():
    def f(x, kernel):
        y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.scan(lambda c, _: (jax.nn.relu(c @ jnp.ones((4, 4))), None), y, None, length=5)[0]

    jaxpr = jax.make_jaxpr(f)(jnp.ones((1, 8, 8, 3)), jnp.ones((1, 1, 3, 4)))
    found = [(e.primitive.name, times, roofline.flops_of(e)) for e, times in roofline.products(jaxpr)]
    assert found == [("conv_general_dilated", 1, 2 * 16 * 12), ("dot_general", 5, 2 * 16 * 16)]


def test_of_the_ways_of_platforms_the_one_that_is_taken_counts():
    def f(x):
        ways = dict(tpu=lambda x: x @ x @ x, cuda=lambda x: x @ x @ x @ x, default=lambda x: x @ x)
        x = jax.lax.platform_dependent(x, **ways)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)  # one or the other: the costliest

    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 4)))
    counts = {name: roofline.count_flops(jaxpr, name) / (2 * 4**3) for name in ("tpu", "gpu", "cpu")}
    assert counts == {"tpu": 2 + 1, "gpu": 3 + 1, "cpu": 1 + 1}
    assert roofline.count_flops(jaxpr) == 2 * 2 * 4**3
