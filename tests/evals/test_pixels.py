"""Pixel metrics against scikit-image 0.26 (tests/golden/pixel_metrics.npz), and the collection on padded batches."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vqgan_jax.config import UserError
from vqgan_jax.evals import pixels
from vqgan_jax.evals.pixels import ReconstructionMetrics
from vqgan_jax.images import from_uint8, to_uint8

GOLDEN = Path(__file__).parents[1] / "golden" / "pixel_metrics.npz"
CODEBOOK = 7


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def _batch(n: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (n, 12, 13, 3)).astype(np.float32)
    noise = rng.normal(size=image.shape) * rng.uniform(0.05, 0.5, (n, 1, 1, 1))
    return {
        "image": image,
        "reconstruction": (image + noise).astype(np.float32),
        "codes": rng.integers(CODEBOOK - 2, size=(n, 2, 2)).astype(np.int32),
        "valid": np.ones(n, bool),
    }


@jax.jit
def _score(batch):
    return ReconstructionMetrics.single_from_model_output(**batch, codebook_size=CODEBOOK)


def _padded(batch: dict, size: int) -> dict:
    """Rows up to `size`: pictures with infinite PSNR and a code that no real row uses, marked as not valid."""
    n = len(batch["valid"])
    fill = {"image": 0.5, "reconstruction": 0.5, "codes": CODEBOOK - 1, "valid": False}
    return {k: np.concatenate([v, np.full((size - n, *v.shape[1:]), fill[k], v.dtype)]) for k, v in batch.items()}


@pytest.mark.parametrize("name, tolerance", [("psnr", 1e-4), ("ssim", 1e-5), ("l1", 1e-6)])
def test_equals_scikit_image(golden, name, tolerance):
    measured = jax.jit(getattr(pixels, name))(from_uint8(golden["a"]), from_uint8(golden["b"]))
    assert measured.dtype == jnp.float32
    np.testing.assert_allclose(measured, golden[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [(11, 11), (40, 23), (64, 64)])
def test_equals_the_scikit_image_that_is_installed(size):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(size[1])
    a = rng.integers(0, 256, (3, *size, 3), np.uint8)
    b = np.clip(a + rng.normal(0, [[[[2]]], [[[20]]], [[[90]]]], a.shape), 0, 255).astype(np.uint8)
    wanted = {"psnr": [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]}
    window = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": -1, "data_range": 255}
    wanted["ssim"] = [metrics.structural_similarity(x, y, **window) for x, y in zip(a, b, strict=True)]
    for name, values in wanted.items():
        measured = jax.jit(getattr(pixels, name))(from_uint8(a), from_uint8(b))
        np.testing.assert_allclose(measured, values, atol=2e-5, rtol=1e-5, err_msg=name)


def test_equal_images_score_perfectly(golden):
    a = from_uint8(golden["a"])
    assert np.isposinf(pixels.psnr(a, a)).all()
    np.testing.assert_allclose(pixels.ssim(a, a), 1, atol=1e-6)
    assert not pixels.l1(a, a).any()


def test_ssim_needs_room_for_its_window():
    with pytest.raises(UserError, match="10x16"):
        pixels.ssim(jnp.zeros((1, 10, 16, 3)), jnp.zeros((1, 10, 16, 3)))


def test_through_uint8_is_saving_and_loading():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 16, 16, 3)).astype(np.float32)
    rounded = jax.jit(pixels.through_uint8)(x)
    np.testing.assert_allclose(rounded, from_uint8(to_uint8(x)), atol=1e-7)
    np.testing.assert_array_equal(to_uint8(rounded), to_uint8(x))
    np.testing.assert_array_equal(pixels.through_uint8(rounded), rounded)


def test_collection_averages_what_the_functions_measure():
    batch = _batch(10)
    scores = _score(batch).compute()
    a, b = (from_uint8(to_uint8(batch[k])) for k in ("image", "reconstruction"))
    for name in ("psnr", "ssim", "l1"):
        each = np.asarray(getattr(pixels, name)(a, b), np.float64)
        assert scores[name] == pytest.approx(each.mean(), rel=1e-5)
        assert scores[f"{name}_stderr"] == pytest.approx(each.std(ddof=1) / math.sqrt(10), rel=1e-4)
        if name == "psnr":
            assert scores["psnr_p10"] == pytest.approx(np.percentile(each, 10), rel=1e-5)
    counts = np.bincount(batch["codes"].ravel(), minlength=CODEBOOK)
    shares = counts[counts > 0] / counts.sum()
    assert scores["codebook_usage"] == np.count_nonzero(counts) / CODEBOOK < 1
    assert scores["codebook_perplexity"] == pytest.approx(np.prod(shares**-shares))
    assert scores["images"] == 10
    assert all(type(value) is float for value in scores.values())


def test_padding_and_batch_size_change_nothing():
    whole = _batch(10)
    scores = ReconstructionMetrics.empty()
    for start in range(0, 10, 4):
        scores = scores.merge(_score(_padded({k: v[start : start + 4] for k, v in whole.items()}, 4)))
    assert scores.compute() == pytest.approx(_score(whole).compute(), rel=1e-5)


def test_eight_devices_equal_one():
    batch = _padded(_batch(13), 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        spread = _score(jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))))
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(spread))
    assert spread.compute() == pytest.approx(_score(batch).compute(), rel=1e-5)


def test_one_exact_image_does_not_carry_the_mean_away():
    batch = _batch(4)
    batch["reconstruction"][0] = batch["image"][0]
    before = _score({k: v[1:] for k, v in batch.items()}).compute()
    scores = _score(batch).compute()
    assert scores["psnr"] == pytest.approx((3 * before["psnr"] + pixels.EXACT_PSNR) / 4, rel=1e-5)
    assert math.isfinite(scores["psnr_stderr"])


def test_no_real_image_is_an_error():
    with pytest.raises(UserError, match="no image"):
        _score({**_batch(2), "valid": np.zeros(2, bool)}).compute()
    with pytest.raises(UserError, match="no image"):
        ReconstructionMetrics.empty().compute()
