"""Discriminators: exact sizes, blurred halving, spectral norm, heads on feature maps of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from vqgan_jax.config import UserError
from vqgan_jax.models import discriminators
from vqgan_jax.models.discriminators import BlurPoolConfig, FeatureHeadsConfig, PatchGANConfig, make_discriminator
from vqgan_jax.models.vqgan import VQGANConfig


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def abstract(config, size=256, channels=3):
    """Shapes of the output and of the variables."""
    module = make_discriminator(config)
    x = discriminators.example_input(config, size, channels)
    return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x))


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_blurpool_is_the_published_one(spectral_norm):
    """128 channels, three stages: 16x16 logits of 256 pixels, and what its layers add up to."""
    logits, variables = abstract(BlurPoolConfig(128, 512, 3, spectral_norm))
    assert logits.shape == (1, 16, 16, 1) and logits.dtype == jnp.float32
    convolutions = (25 * 3 + 1) * 128 + (9 * 128 + 1) * 128 + (9 * 128 + 1) * 256 + (9 * 256 + 1) * 512
    ends = (512 + 1) * 512 + (25 * 512 + 1)
    norms = 2 * (128 + 256 + 512)
    assert count(variables["params"]) == convolutions + ends + norms == 1_909_889
    assert count(variables.get("batch_stats", {})) == spectral_norm * (128 + 128 + 256 + 512 + 512 + 1)


def test_channels_grow_to_their_cap():
    _, variables = abstract(BlurPoolConfig(32, 64, 4, False), 64)
    assert [variables["params"][f"conv_{k}"]["kernel"].shape[-1] for k in range(4)] == [32, 64, 64, 64]


@pytest.mark.parametrize("config", [PatchGANConfig(16, 2, "batch", False), PatchGANConfig(16, 2, "actnorm", False)])
def test_spectral_norm_changes_no_parameter(config):
    """So that the reference's tensors keep their names."""
    plain, normed = (abstract(PatchGANConfig(16, 2, config.norm, on), 32)[1] for on in (False, True))
    assert plain["params"] == normed["params"]
    vectors = {name: stats["u"].shape for name, stats in normed["batch_stats"].items() if "u" in stats}
    assert vectors == {"conv_in": (16,), "conv_1": (32,), "conv_2": (64,), "conv_out": (1,)}


def test_blur_keeps_what_is_flat_and_halves_what_is_odd():
    flat = discriminators.blur_downsample(jnp.ones((1, 8, 7, 2)))
    assert flat.shape == (1, 4, 4, 2)
    np.testing.assert_allclose(flat[:, 1:-1, 1:-1], 1.0)
    point = jnp.zeros((1, 8, 8, 1)).at[0, 3, 4].set(1.0)
    taps = np.array([1, 3, 3, 1]) / 8
    rows, columns = np.zeros(4), np.zeros(4)  # output i sees 2i - 1, ..., 2i + 2
    for i in range(4):
        rows[i] = taps[3 - (2 * i - 1)] if 0 <= 3 - (2 * i - 1) < 4 else 0
        columns[i] = taps[4 - (2 * i - 1)] if 0 <= 4 - (2 * i - 1) < 4 else 0
    np.testing.assert_allclose(discriminators.blur_downsample(point)[0, :, :, 0], np.outer(rows, columns), atol=1e-7)


def kernels(params, stats):
    """Every kernel as a matrix, with its vector `u`."""
    if "kernel" in params:
        yield np.asarray(params["kernel"]).reshape(-1, params["kernel"].shape[-1]), np.asarray(stats["u"])
        return
    for name, module in params.items():
        if isinstance(module, dict) and "norm" not in name:
            yield from kernels(module, stats[name])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(PatchGANConfig(8, 2, "batch", True), marks=pytest.mark.slow),
        BlurPoolConfig(32, 32, 1, True),
        pytest.param(FeatureHeadsConfig("dino_vits16", (0, 12), 0, 3, "batch", True), marks=pytest.mark.slow),
    ],
    ids=["patchgan", "blurpool", "dino"],
)
def test_spectral_norm_follows_the_largest_singular_value(config):
    """Of every kernel, one step a training pass; other passes leave it."""
    module, key = make_discriminator(config), jax.random.key(1)
    heads = isinstance(config, FeatureHeadsConfig)
    x = [jax.random.normal(key, (1, 3, 2, 8))] * 2 if heads else jax.random.normal(key, (1, 16, 16, 3))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    stats = {"batch_stats": variables["batch_stats"]}

    def norms():
        pairs = kernels(variables["params"], stats["batch_stats"])
        return np.array([np.linalg.norm(w @ u) / np.linalg.svd(w, compute_uv=False)[0] for w, u in pairs])

    assert len(norms()) == (6 if heads else 4) and norms().min() < 0.9
    train = jax.jit(lambda stats: module.apply(variables | stats, x, train=True, mutable=["batch_stats"])[1])
    for _ in range(150):
        stats = train(stats)
    assert np.all(norms() > 0.99) and np.all(norms() < 1 + 1e-5)
    evaluate = jax.jit(lambda stats: module.apply(variables | stats, x, mutable=["batch_stats"])[1])
    jax.tree.map(np.testing.assert_array_equal, evaluate(stats), stats)


def test_a_spectral_convolution_divides_its_kernel():
    """By its largest singular value, which is then one, whatever the kernel's scale; the gradient turns it alone."""
    conv = discriminators.SpectralConv(4, 1, padding=(0, 0), bias=False)
    kernel = 7 * jax.random.normal(jax.random.key(0), (1, 1, 6, 4))
    left, values, right = np.linalg.svd(np.asarray(kernel)[0, 0], full_matrices=False)
    stats = {"u": jnp.asarray(right[0])}
    apply = lambda kernel: conv.apply({"params": {"kernel": kernel}, "batch_stats": stats}, jnp.eye(6)[None, None])  # noqa: E731
    np.testing.assert_allclose(apply(kernel)[0, 0], kernel[0, 0] / values[0], rtol=1e-5)
    scaled = jax.grad(lambda scale: jnp.sum(apply(scale * kernel) ** 3))(1.0)
    np.testing.assert_allclose(scaled, 0, atol=1e-5)


def test_heads_take_maps_of_any_size_and_all_of_them_count():
    config = FeatureHeadsConfig("dino_vits16", (0, 3, 12), 224, 3, "group", True)
    module = make_discriminator(config)
    maps = [jax.random.normal(jax.random.key(k), (2, 3 + k, 2, 32)) for k in range(3)]
    logits, variables = jax.jit(module.init_with_output)(jax.random.key(0), maps)
    assert logits.shape == (2, 2 * (3 + 4 + 5)) and logits.dtype == jnp.float32
    gradients = jax.jit(jax.grad(lambda maps: module.apply(variables, maps).sum()))(maps)
    assert all(bool(jnp.any(g != 0)) and bool(jnp.all(jnp.isfinite(g))) for g in gradients)
    assert set(variables["params"]) == {"head_0", "head_1", "head_2"}


def test_every_name_builds_from_its_config_and_a_typo_does_not():
    config = common.vqgan_model()
    for make in (common.patchgan, common.blurpool, common.dino_heads):
        config.discriminator = make()
        built = VQGANConfig.from_config(config).discriminator
        assert isinstance(built, discriminators.CONFIGS[make().name])
        logits, variables = abstract(built)
        assert logits.dtype == jnp.float32 and count(variables["params"]) > 100_000
    for change, message in (
        ({"name": "blurpol"}, "did you mean 'blurpool'"),
        ({"network": "dino"}, "config.model.discriminator: network: unknown name 'dino'"),
        ({"layers": (13,)}, "name some of 0 to 12"),
        ({"size": 100}, "no multiple of the patch"),
    ):
        config.discriminator = common.dino_heads().to_dict() | change
        with pytest.raises(UserError, match=message):
            VQGANConfig.from_config(config)
    config.discriminator, config.autoencoder.out_channels = common.dino_heads(), 1
    with pytest.raises(UserError, match="'dino' sees pictures of 3 channels only"):
        VQGANConfig.from_config(config)
    config.discriminator = common.blurpool().to_dict() | {"channels": 16}
    with pytest.raises(UserError, match="multiples of GroupNorm's 32 groups"):
        VQGANConfig.from_config(config)


def test_bfloat16_logits_are_near_float32s():
    config = BlurPoolConfig(32, 64, 2, True)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))

    @jax.jit
    def both():
        full, variables = make_discriminator(config).init_with_output(jax.random.key(1), x)
        return full, make_discriminator(config, jnp.bfloat16).apply(variables, x)

    full, half = both()
    assert full.shape == (2, 2, 2, 1) and half.dtype == jnp.float32
    np.testing.assert_allclose(full, half, atol=0.05 * float(jnp.abs(full).max()) + 1e-3)
