"""The FID's Inception against numbers of its published PyTorch port (tests/golden/inception.npz), and its loader."""

import jax
import numpy as np
import pytest

from tests.reference import golden, inception_state, scale, write_state
from vqgan_jax.config import UserError
from vqgan_jax.convert import networks
from vqgan_jax.evals.features import PRESETS, make_extractor
from vqgan_jax.models.inception import Inception

SIZES = ("small", "native", "large")


@pytest.fixture(scope="module")
def state():
    return inception_state()


@pytest.fixture(scope="module")
def net(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    digest = write_state(path, state)
    loaded = networks.load_inception(path)
    assert loaded.sha256 == digest
    return loaded


@pytest.fixture(scope="module")
def measured(net):
    """Features of the fixtures' eight pictures, whose sizes differ, by all devices at once."""
    fixture = golden("inception.npz")
    images, start = [], 0
    for size in SIZES:
        pixels = fixture[f"{size}/image_uint8"]
        images.append((pixels, np.arange(start, start + len(pixels))))
        start += len(pixels)
    extract = make_extractor(net, PRESETS["pytorch-fid"], jax.make_mesh((8,), ("data",)), 8)
    found = list(extract(images))
    order = np.argsort(np.concatenate([f.indices for f in found]))
    rows = {k: np.concatenate([getattr(f, k) for f in found])[order] for k in ("pool", "spatial", "logits")}
    bounds = np.cumsum([0, *(len(pixels) for pixels, _ in images)])
    return {size: {k: x[a:b] for k, x in rows.items()} for size, a, b in zip(SIZES, bounds, bounds[1:], strict=False)}


@pytest.mark.parametrize("size", SIZES)
def test_pooled_features_and_logits_equal_the_port(measured, size):
    fixture = golden("inception.npz")
    for ours, theirs in (("pool", "pool3"), ("logits", "logits_no_bias")):
        wanted = fixture[f"{size}/{theirs}"]
        np.testing.assert_allclose(measured[size][ours], wanted, atol=1e-5 * scale(wanted), rtol=0)


def test_the_means_of_blocks_equal_the_port_and_the_spatial_features_are_of_the_17x17_grid(net, measured):
    fixture = golden("inception.npz")
    prepared = PRESETS["pytorch-fid"].normalise(fixture["native/image_uint8"][:1].astype(np.float32))
    wanted_blocks = {"Conv2d_2b_3x3": "mean_64", "Conv2d_4a_3x3": "mean_192", "Mixed_6e": "mean_768"}

    @jax.jit
    def blocks(variables, x):
        keep = lambda module, _: module.name in {*wanted_blocks, "Mixed_6d"}  # noqa: E731
        _, inside = Inception().apply(variables, x, capture_intermediates=keep)
        return {name: value["__call__"][0] for name, value in inside["intermediates"].items()}

    found = jax.device_get(blocks(net.variables, prepared))
    for name, mean in wanted_blocks.items():
        block = found[name]
        if name.startswith("Conv"):  # the fixture's means are of what the pool behind it leaves
            block = np.lib.stride_tricks.sliding_window_view(block, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-2, -1))
        wanted = fixture[f"native/{mean}"][:1]
        np.testing.assert_allclose(block.mean(axis=(1, 2)), wanted, atol=1e-5 * scale(wanted), rtol=0)
    spatial = found["Mixed_6d"][..., :7]
    assert spatial.shape == (1, 17, 17, 7)
    wanted = spatial.reshape(1, -1)
    np.testing.assert_allclose(measured["native"]["spatial"][:1], wanted, atol=1e-5 * scale(wanted), rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("Mixed_7c.branch_pool.bn.running_var"), "no tensor 'Mixed_7c.branch_pool.bn.running_var'"),
        (lambda s: s.update({"fc.weight": np.zeros((1000, 2048), np.float32)}), "'fc.weight' has shape"),
        (lambda s: s.update({"AuxLogits.fc.bias": np.zeros(9, np.float32)}), "'AuxLogits.fc.bias' is no tensor"),
    ],
)
def test_weights_of_another_network_are_refused(state, tmp_path, change, message):
    state = dict(state)
    change(state)
    write_state(tmp_path / "inception.safetensors", state)
    with pytest.raises(UserError, match=message):
        networks.load_inception(tmp_path / "inception.safetensors")


def test_counters_of_batch_norm_are_passed_over(state, net, tmp_path):
    counters = {f"{n.removesuffix('weight')}num_batches_tracked": np.zeros((), np.int64) for n in state if ".bn.w" in n}
    assert len(state) + len(counters) == 566  # what the published file holds
    write_state(tmp_path / "inception.safetensors", state | counters)
    loaded = networks.load_inception(tmp_path / "inception.safetensors")
    assert loaded.sha256 != net.sha256
    np.testing.assert_array_equal(loaded.variables["params"]["fc"], state["fc.weight"].T)
