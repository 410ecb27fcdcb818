"""Attention by platform: every way equals the plain products, and what a kernel does not take goes the plain way."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from vqgan_jax import parallel
from vqgan_jax.models import attention
from vqgan_jax.models.attention import attend_sequence

HEADS = 2


def inputs(batch=2, length=130, width=16, dtype=jnp.float32, kv_heads=HEADS):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, length, n * width)), dtype) for n in (HEADS, kv_heads, kv_heads)]


def value_and_gradients(query, keys, values):
    def loss(*args):
        y = attend_sequence(*args, heads=HEADS)
        return (y * jnp.cos(jnp.arange(y.shape[-1]))).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, keys, values)


def stand_on(monkeypatch, platform, **device):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    if device:
        monkeypatch.setattr(attention.jax, "devices", lambda: [SimpleNamespace(**device)])


def test_on_a_cpu_it_is_the_plain_products():
    query, keys, values = inputs(length=20)
    heads = (a.reshape(2, 20, HEADS, -1) for a in (query, keys, values))
    expected = jax.nn.dot_product_attention(*heads, is_causal=True, implementation="xla").reshape(2, 20, -1)
    np.testing.assert_allclose(attend_sequence(query, keys, values, heads=HEADS), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("meshed, kv_heads", [(False, HEADS), (True, HEADS), (False, 1)])
def test_the_tpu_kernel_equals_the_plain_products(monkeypatch, meshed, kv_heads):
    """130 tokens: the last tile is mostly padding. Interpreted, with its backward pass; alone and on a mesh; with keys
    and values that two heads share."""
    args = inputs(kv_heads=kv_heads)
    expected = value_and_gradients(*args)
    stand_on(monkeypatch, "tpu")
    mesh = parallel.make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with pltpu.force_tpu_interpret_mode():
        if meshed:
            with jax.set_mesh(mesh):
                found = value_and_gradients(*args)
        else:
            found = value_and_gradients(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), expected, found)


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
def test_cudnn_is_asked_for_the_same_attention(monkeypatch, kv_heads):
    """The call that a GPU would get, answered here by XLA: layout, mask and scale are those of the plain products."""
    asked = []
    plain = jax.nn.dot_product_attention

    def answer(*args, implementation, **options):
        asked.append(implementation)
        return plain(*args, implementation="xla", **options)

    args = inputs(length=20, dtype=jnp.bfloat16, kv_heads=kv_heads)
    (_, expected), gradients = value_and_gradients(*args)
    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    stand_on(monkeypatch, "gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
    (_, y), found = value_and_gradients(*args)
    assert asked == ["cudnn"]
    for a, b in zip((expected, *gradients), (y, *found), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.06)


@pytest.mark.parametrize(
    ("platform", "device", "shape"),
    [
        ("gpu", dict(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"), {}),  # float32
        ("gpu", dict(device_kind="Tesla T4", compute_capability="7.5"), dict(dtype=jnp.bfloat16)),
        ("gpu", dict(device_kind="gfx942"), dict(dtype=jnp.bfloat16)),
        ("gpu", dict(device_kind="NVIDIA A100", compute_capability="8.0"), dict(dtype=jnp.bfloat16, width=12)),
        ("tpu", {}, dict(length=20)),
        ("tpu", {}, dict(length=128, width=136)),
    ],
)
def test_what_a_kernel_does_not_take_goes_the_plain_way(monkeypatch, platform, device, shape):
    args = inputs(**dict(batch=1, length=20) | shape)
    expected = attend_sequence(*args, heads=HEADS)
    stand_on(monkeypatch, platform, **device)
    np.testing.assert_array_equal(attend_sequence(*args, heads=HEADS), expected)


def test_rows_that_do_not_divide_over_a_tpu_mesh_go_the_plain_way(monkeypatch):
    stand_on(monkeypatch, "tpu")
    mesh = parallel.make_mesh(dict(data=8, fsdp=1, tensor=1))
    with jax.set_mesh(mesh):
        assert attention._pallas_takes(8, 128, 2, 16) and not attention._pallas_takes(4, 128, 2, 16)
