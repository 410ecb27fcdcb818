"""Properties of the models: causality, exact parameter counts, no NaN at the edges."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax.models import quantizers
from vqgan_jax.models.autoencoder import AutoencoderConfig
from vqgan_jax.models.discriminators import PatchGAN, PatchGANConfig
from vqgan_jax.models.gpt import GPT
from vqgan_jax.models.layers import Downsample, pixel_shuffle
from vqgan_jax.models.lpips import LPIPS, LPIPSConfig
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.train.roofline import count_flops

TINY_GPT = ref.gpt_config(24, 20, 12, 2, 2, 16, 4, 0.0, 0.0, 0.0)


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(nn.unbox(tree)))


def gpt_size(vocab, block, layers, width, heads=16) -> int:
    config = ref.gpt_config(vocab, vocab, block, layers, heads, width, 0, 0.0, 0.0, 0.0)
    ids = jnp.zeros((1, 2), jnp.int32)
    return count(jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), ids, positions_bt=ids)))


@pytest.mark.parametrize(
    "layers, width, vocab, block, millions",
    [(24, 1024, 1024, 512, 304.9), (28, 1024, 1024, 256, 355.1), (24, 1664, 1024, 256, 801.8)]
    + [(48, 1536, 16384, 257, 1410.6), (32, 1280, 8192, 512, 651.3), (12, 768, 768, 512, 86.6)],
)
def test_transformer_parameter_counts(layers, width, vocab, block, millions):
    assert gpt_size(vocab, block, layers, width) == pytest.approx(millions * 1e6, abs=0.06e6)


def test_vqgan_parameter_counts():
    """The reference's f16 and f8 layouts, exactly."""
    for multipliers, attention, expected in (
        ((1, 1, 2, 2, 4), 16, 29_298_176 + 42_449_795),
        ((1, 1, 2, 4), 32, 26_345_728 + 38_316_163),
    ):
        ae = AutoencoderConfig(3, 3, 256, 128, multipliers, 2, 1, (attention,), True, 256, 0.0, 1)
        quantizer = quantizers.VQConfig(1024, 256, 1.0, 0.25, 0.0, 0.9, False, "uniform")
        model = VQGAN(VQGANConfig(ae, quantizer, None, "image"))
        sizes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
        assert count(sizes) == expected + 2 * 65_792 + 1024 * 256
    for layers, expected in ((3, 2_765_633), (2, 663_361)):
        model = PatchGAN(PatchGANConfig(64, layers, "batch", False))
        assert count(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]) == expected


def gpt_and_params(**kwargs):
    ids = jax.random.randint(jax.random.key(1), (2, 10), 0, 24)
    model = GPT(dataclasses.replace(TINY_GPT, **kwargs))
    params = nn.unbox(model.init(jax.random.key(0), ids, positions_bt=jnp.arange(10)[None]))["params"]
    return model, params, ids


@pytest.mark.parametrize("attend", ["causal", "prefix", "full"])
def test_who_sees_whom_by_gradient(attend):
    """The Jacobian of output i with respect to input j is zero exactly where i must not see j."""
    model, params, ids = gpt_and_params()

    def outputs(shift):
        """A shift of each position's embedding, through the position table: one row a position."""
        moved = params | {"position_embedding": params["position_embedding"].at[:10].add(shift)}
        return model.apply({"params": moved}, ids[:1], positions_bt=jnp.arange(10)[None], attend=attend)[0][0]

    jacobian = jnp.abs(jax.jacobian(outputs)(jnp.zeros((10, 16)))).sum(axis=(1, 3))
    i, j = np.meshgrid(np.arange(10), np.arange(10), indexing="ij")
    sees = {"causal": j <= i, "full": np.ones_like(i, bool), "prefix": (j <= i) | ((i < 4) & (j < 4))}[attend]
    np.testing.assert_array_equal(np.asarray(jacobian) > 0, sees)


@pytest.mark.parametrize("kind", ["gpt", pytest.param("vqgan", marks=pytest.mark.slow)])
def test_remat_computes_again_what_its_name_says(kind):
    """By the products in a gradient's program: "dots" keeps those with weights, "attention" and "block" repeat theirs.
    Nothing is compiled."""
    ids = jnp.zeros((1, 10), jnp.int32)
    ae = AutoencoderConfig(3, 3, 16, 32, (1, 1), 1, 1, (8,), True, 32, 0.0, 1)
    quantizer = quantizers.VQConfig(8, 4, 0.25, 1.0, 0.0, 0.9, False, "uniform")

    def products(name: str) -> float:
        if kind == "gpt":
            model = GPT(TINY_GPT, remat=name)
            init, apply = (
                (lambda key: model.init(key, ids, positions_bt=ids)),
                lambda p: model.apply(p, ids, positions_bt=ids)[0].sum(),
            )
        else:
            model, x = VQGAN(VQGANConfig(ae, quantizer, None, "image"), remat=name), jnp.zeros((1, 16, 16, 3))
            init, apply = (lambda key: model.init(key, x)), lambda p: model.apply(p, x).reconstruction.sum()
        params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
        return count_flops(jax.make_jaxpr(jax.grad(apply))(params))

    plain, dots, attention, block = (products(name) for name in ("", "dots", "attention", "block"))
    assert plain <= dots < 1.05 * plain < 1.1 * plain < block < 1.5 * plain and plain < attention < block
    with pytest.raises(ValueError, match="remat 'all'"):
        products("all")


def test_remat_changes_nothing_and_dropout_needs_train():
    model, params, ids = gpt_and_params(residual_dropout=0.5)
    positions = jnp.arange(10)[None]
    plain = model.apply({"params": params}, ids, positions_bt=positions)[0]
    others = [GPT(model.config, remat=name) for name in ("block", "dots")]
    loss = lambda m, p: m.apply({"params": p}, ids, positions_bt=positions)[0].sum()  # noqa: E731
    grads = [jax.jit(jax.grad(lambda p, m=m: loss(m, p)))(params) for m in (model, *others)]
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads[0], other)
    noisy = model.apply(
        {"params": params}, ids, positions_bt=positions, train=True, rngs={"dropout": jax.random.key(5)}
    )[0]
    assert not np.allclose(plain, noisy)


def test_bfloat16_is_near_float32():
    model, params, ids = gpt_and_params()
    positions = jnp.arange(10)[None]
    full = model.apply({"params": params}, ids, positions_bt=positions)[0]
    half = GPT(model.config, jnp.bfloat16).apply({"params": params}, ids, positions_bt=positions)[0]
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(full, half, atol=2e-2 * float(jnp.abs(full).max()) + 1e-3)


def test_width_must_divide_over_heads():
    with pytest.raises(ValueError, match="does not divide"):
        dataclasses.replace(TINY_GPT, heads=3)


def test_stem_and_tail_keep_the_shapes():
    ae = AutoencoderConfig(3, 3, 32, 32, (1, 1), 1, 0, (), False, 32, 0.0, 2)
    model = VQGAN(VQGANConfig(ae, ref.vq(), None, "image"))
    x = jax.random.normal(jax.random.key(0), (1, 16, 24, 3))
    output, _ = model.init_with_output(jax.random.key(0), x)
    assert ae.factor == 4 and output.reconstruction.shape == x.shape and output.ids.shape == (1, 4, 6)


def test_pixel_shuffle_places_each_channel():
    x = jnp.arange(16).reshape(1, 1, 2, 8)
    y = pixel_shuffle(x, 2)
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 2, 8, 10], [4, 6, 12, 14]])


def test_downsampling_pads_right_and_bottom_only():
    x = jnp.zeros((1, 4, 4, 32)).at[0, 0, 0].set(1.0)
    module = Downsample()
    variables = module.init(jax.random.key(0), x)
    kernel = jnp.zeros((3, 3, 32, 32)).at[0, 0].set(jnp.eye(32))  # copies the upper left tap
    y = module.apply({"params": {"kernel": kernel, "bias": jnp.zeros(32)}}, x)
    assert y.shape == (1, 2, 2, 32) and float(y[0, 0, 0, 0]) == 1.0
    assert variables["params"]["kernel"].shape == (3, 3, 32, 32)


@pytest.mark.parametrize("a, b", [(0.0, 0.0), (-0.03, 0.3), (1.0, 1.0)])
def test_lpips_gradients_are_finite_where_features_vanish(a, b):
    model = LPIPS(LPIPSConfig((8, 8), (1, 1)))
    x, y = jnp.full((1, 16, 16, 3), a), jnp.full((1, 16, 16, 3), b)
    variables = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), x, y))  # all features are zero
    value, gradient = jax.value_and_grad(lambda x: model.apply(variables, x, y).sum())(x)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))
    variables = model.init(jax.random.key(0), x, y)
    value, gradient = jax.value_and_grad(lambda x: model.apply(variables, x, y).sum())(x)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient)) and value >= 0
