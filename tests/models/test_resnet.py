"""A narrow ResNet against NumPy in float64 on the published names and layouts, and its loader."""

import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.reference import scale, write_state
from vqgan_jax.config import UserError
from vqgan_jax.convert import names, networks
from vqgan_jax.models import resnet
from vqgan_jax.models.resnet import RESNETS, ResNet, ResNetConfig

NARROW = ResNetConfig((2, 1, 2, 1), width=4, classes=10)


def torch_shapes(config: ResNetConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's state dict, written down from its layout, not from ours."""
    shapes = {"conv1.weight": (config.width, 3, 7, 7)} | norm("bn1", config.width)
    inputs = config.width
    for stage, depth in enumerate(config.depths):
        width = config.width * 2**stage
        for block in range(depth):
            at = f"layer{stage + 1}.{block}"
            shapes |= {f"{at}.conv1.weight": (width, inputs, 1, 1)} | norm(f"{at}.bn1", width)
            shapes |= {f"{at}.conv2.weight": (width, width, 3, 3)} | norm(f"{at}.bn2", width)
            shapes |= {f"{at}.conv3.weight": (4 * width, width, 1, 1)} | norm(f"{at}.bn3", 4 * width)
            if not block:
                shapes |= {f"{at}.downsample.0.weight": (4 * width, inputs, 1, 1)}
                shapes |= norm(f"{at}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes | {"fc.weight": (config.classes, inputs), "fc.bias": (config.classes,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def state(config: ResNetConfig) -> dict[str, np.ndarray]:
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in torch_shapes(config).items():
        array = rng.normal(size=shape) * np.sqrt(2 / max(1, np.prod(shape[1:])))
        tensors[name] = np.abs(array) + 0.5 if name.endswith("running_var") else array
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def oracle(tensors: dict[str, np.ndarray], config: ResNetConfig, images: np.ndarray) -> np.ndarray:
    """Logits in float64, NCHW, as the layers are defined."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}

    def conv(x, name, stride, pad):
        x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
        size = w[name].shape[2]
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
        return np.einsum("bchwyx,ocyx->bohw", windows, w[name], optimize=True)

    def batch_norm(x, name):
        mean, variance, weight, bias = (
            w[f"{name}.{leaf}"][:, None, None] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias

    x = (images.transpose(0, 3, 1, 2).astype(np.float64) + 1) / 2
    x = (x - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[:, None, None]
    x = np.maximum(batch_norm(conv(x, "conv1.weight", 2, 3), "bn1"), 0)
    x = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max(axis=(-2, -1))
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            at, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = np.maximum(batch_norm(conv(x, f"{at}.conv1.weight", 1, 0), f"{at}.bn1"), 0)
            y = np.maximum(batch_norm(conv(y, f"{at}.conv2.weight", stride, 1), f"{at}.bn2"), 0)
            y = batch_norm(conv(y, f"{at}.conv3.weight", 1, 0), f"{at}.bn3")
            if not block:
                x = batch_norm(conv(x, f"{at}.downsample.0.weight", stride, 0), f"{at}.downsample.1")
            x = np.maximum(x + y, 0)
    return x.mean(axis=(2, 3)) @ w["fc.weight"].T + w["fc.bias"]


@pytest.mark.parametrize("size", [(32, 32), (45, 38)])  # odd sizes tell whose padding it is
def test_equals_float64(monkeypatch, tmp_path, size):
    monkeypatch.setitem(RESNETS, "resnet50", NARROW)
    tensors = state(NARROW)
    digest = write_state(tmp_path / "resnet.safetensors", tensors)
    net = networks.load_resnet("resnet50", tmp_path / "resnet.safetensors")
    assert net.sha256 == digest and net.size == resnet.SIZE
    images = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    wanted = oracle(tensors, NARROW, images)
    measured = jax.jit(net.apply)(net.variables, images)
    assert measured["logits"].dtype == jnp.float32 and measured["pool"].shape == (2, 32 * NARROW.width)
    np.testing.assert_allclose(measured["logits"], wanted, atol=1e-5 * scale(wanted), rtol=0)


@pytest.mark.parametrize("name, tensors, published", [("resnet50", 267, 25_557_032), ("resnet101", 522, 44_549_160)])
def test_full_size_has_the_published_names_and_shapes(name, tensors, published):
    abstract = jax.eval_shape(ResNet(RESNETS[name]).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    ours = flatten_dict(abstract["params"], sep="/")
    theirs = torch_shapes(RESNETS[name])
    found = {}
    for path, leaf in ours.items():
        key = names.resnet_key(path)
        found[key.name] = names.to_reference(np.broadcast_to(np.float32(0), leaf.shape), key.layout).shape
    assert found == theirs and len(theirs) == tensors
    assert sum(np.prod(shape) for key, shape in theirs.items() if "running" not in key) == published


def test_another_networks_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(RESNETS, "resnet50", NARROW)
    write_state(tmp_path / "a.safetensors", state(ResNetConfig((2, 1, 2, 2), width=4, classes=10)))
    with pytest.raises(UserError, match="'layer4.1.*' is no tensor of resnet50"):
        networks.load_resnet("resnet50", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="resnet51.*did you mean"):
        networks.load_resnet("resnet51", tmp_path / "a.safetensors")


def test_distance_of_logits(monkeypatch, tmp_path):
    """The mean squared error at 224 x 224, with a gradient for the reconstruction alone."""
    monkeypatch.setitem(RESNETS, "resnet50", NARROW)
    tensors = state(NARROW)
    write_state(tmp_path / "resnet.safetensors", tensors)
    variables = networks.load_resnet("resnet50", tmp_path / "resnet.safetensors").variables
    images, fake = np.random.default_rng(1).uniform(-1, 1, (2, 1, 56, 56, 3)).astype(np.float32)
    distance = jax.jit(jax.value_and_grad(functools.partial(resnet.logits_distance, variables), argnums=(0, 1)))
    value, (to_fake, to_real) = distance(fake, images)
    enlarged = [cv2.resize(x[0], (224, 224), interpolation=cv2.INTER_LINEAR)[None] for x in (images, fake)]
    a, b = (oracle(tensors, NARROW, x) for x in enlarged)
    np.testing.assert_allclose(value, np.mean((a - b) ** 2), rtol=1e-3)
    assert np.abs(to_fake).max() > 0 and not np.any(to_real)
    assert distance(images, images)[0] == 0
