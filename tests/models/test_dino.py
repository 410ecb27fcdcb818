"""A narrow DINO against NumPy in float64 on the published names and layouts, its positions, and its loader."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import erf

from tests.reference import scale, write_state
from vqgan_jax.config import UserError
from vqgan_jax.convert import names, networks
from vqgan_jax.models import dino
from vqgan_jax.models.dino import DINO, DINOS, DINOConfig

NARROW = DINOConfig(patch=4, size=12, width=16, depth=2, heads=2)
LAYERS = (0, 1, 2)


def torch_shapes(c: DINOConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict, written down from its layout, not from ours."""
    d = c.width
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + (c.size // c.patch) ** 2, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, c.patch, c.patch), "patch_embed.proj.bias": (d,)}
    for k in range(c.depth):
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{k}.{name}.weight": shape, f"blocks.{k}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{k}.{name}.weight": (d,), f"blocks.{k}.{name}.bias": (d,)}
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def state(config: DINOConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in torch_shapes(config).items()}


def oracle(tensors: dict[str, np.ndarray], c: DINOConfig, images: np.ndarray) -> list[np.ndarray]:
    """The stream [b, t, d] before and after each block in float64, as the layers are defined; no resized positions."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = ((images.astype(np.float64) + 1) / 2 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    b, side, p, k = len(x), x.shape[1] // c.patch, c.patch, c.width // c.heads
    patches = x.reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 5, 2, 4).reshape(b, side**2, 3 * p * p)
    patches = patches @ w["patch_embed.proj.weight"].reshape(c.width, -1).T + w["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(w["cls_token"], (b, 1, c.width)), patches], axis=1) + w["pos_embed"]
    found = [x]
    for block in range(c.depth):
        at, y = f"blocks.{block}", np.zeros_like(x)
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv")
        for head in range(c.heads):
            q, key, v = (qkv[..., part * c.width + head * k :][..., :k] for part in range(3))
            scores = np.exp(q @ key.transpose(0, 2, 1) / np.sqrt(k))
            y[..., head * k : (head + 1) * k] = scores / scores.sum(-1, keepdims=True) @ v
        x = x + linear(y, f"{at}.attn.proj")
        y = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        x = x + linear(y * 0.5 * (1 + erf(y / np.sqrt(2))), f"{at}.mlp.fc2")
        found.append(x)
    return found


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    monkeypatch.setitem(DINOS, "dino_vits8", NARROW)
    tensors = state(NARROW)
    write_state(tmp_path / "dino.safetensors", tensors)
    return tensors, networks.load_dino("dino_vits8", tmp_path / "dino.safetensors")


def test_equals_float64(loaded):
    tensors, variables = loaded
    images = np.random.default_rng(1).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    plain, added, half = (
        jax.jit(DINO(NARROW, LAYERS, **options).apply)(variables, images)
        for options in ({"class_token": False}, {}, {"dtype": jnp.bfloat16})
    )
    for k, wanted in enumerate(oracle(tensors, NARROW, images)):
        patches, token = wanted[:, 1:].reshape(2, 3, 3, -1), wanted[:, :1, None]
        np.testing.assert_allclose(plain[k], patches, atol=2e-5 * scale(wanted), rtol=0)
        np.testing.assert_allclose(added[k], patches + token, atol=2e-5 * scale(wanted), rtol=0)
        np.testing.assert_allclose(half[k], patches + token, atol=0.05 * scale(wanted), rtol=0)
        assert half[k].dtype == jnp.float32


@pytest.mark.parametrize("name, published", [("dino_vits8", 21_670_272), ("dino_vits16", 21_665_664)])
def test_full_size_has_the_published_names_and_shapes(name, published):
    module = DINO(DINOS[name], (12,))
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    theirs, found = torch_shapes(DINOS[name]), {}
    for path, leaf in flatten_dict(abstract["params"], sep="/").items():
        key = names.dino_key(path)
        found[key.name] = names.to_reference(np.broadcast_to(np.float32(0), leaf.shape), key.layout).shape
    assert found == {name: shape for name, shape in theirs.items() if not name.startswith("norm.")}
    assert sum(np.prod(shape) for shape in theirs.values()) == published


def test_another_networks_weights_are_refused(loaded, tmp_path):
    deep = DINOConfig(patch=4, size=12, width=16, depth=3, heads=2)
    write_state(tmp_path / "deep.safetensors", state(deep))
    with pytest.raises(UserError, match="'blocks.2.*' is no tensor of dino_vits8"):
        networks.load_dino("dino_vits8", tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="dino_vits9.*did you mean"):
        networks.load_dino("dino_vits9", tmp_path / "deep.safetensors")


@pytest.mark.parametrize("size", [(3, 3), (7, 4), (28, 28), (2, 5)])
def test_resized_positions(size):
    """A constant stays, mirror images stay so, and the same size is untouched."""
    grid = np.random.default_rng(0).normal(size=(6, 6, 5)).astype(np.float32)
    resized = dino.resize_positions(grid, *size)
    assert resized.shape == (*size, 5)
    np.testing.assert_allclose(dino.resize_positions(np.ones_like(grid), *size), 1, atol=1e-6)
    mirrored = dino.resize_positions(grid[:, ::-1], *size)
    np.testing.assert_allclose(mirrored[:, ::-1], resized, atol=1e-5)
    np.testing.assert_array_equal(dino.resize_positions(grid, 6, 6), grid)


def test_resized_positions_are_bicubic_as_opencv_and_pytorch_have_it():
    grid = np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
    for height, width in [(9, 5), (14, 31), (4, 3)]:
        wanted = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        np.testing.assert_allclose(dino.resize_positions(grid, height, width), wanted, atol=2e-5)


def test_the_gradient_reaches_the_picture_and_positions_follow_its_size(loaded):
    module, images = DINO(NARROW, (2,)), jnp.zeros((1, 8, 16, 3))

    def total(x):
        (features,) = module.apply(loaded[1], x)
        return features.sum(), features

    grad, features = jax.jit(jax.grad(total, has_aux=True))(images)
    assert features.shape == (1, 2, 4, 16)
    assert np.isfinite(grad).all() and np.abs(grad).min(axis=(0, 3)).max() > 0
    with pytest.raises(ValueError, match="layer 3 of a network of 2"):
        DINO(NARROW, (3,)).apply(loaded[1], images)
