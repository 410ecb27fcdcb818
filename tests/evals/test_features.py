"""Each preset prepares pictures as its tool does, and the extractor's features depend on nothing but the picture."""

import gc
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from tests.evals.nets import pictures, small_net
from vqgan_jax.evals import features
from vqgan_jax.evals.features import PRESETS, FeatureNet, make_extractor

SIZES = [(32, 32), (256, 256), (299, 299), (512, 384), (75, 500)]


def mesh(devices: int = 1):
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])


def prepared(preset: str, pixels: np.ndarray, size: int = 299) -> np.ndarray:
    """What the network gets of one picture: float32 [size, size, 3]."""
    seen = []
    net = FeatureNet("eye", lambda _, x: dict.fromkeys(("pool", "spatial", "logits"), x), {}, "", size)
    for found in make_extractor(net, PRESETS[preset], mesh(), 1)([(pixels[None], np.zeros(1, int))]):
        seen.append(found.pool[0])
    return seen[0]


def lerp(pixels: np.ndarray, source: np.ndarray, axis: int) -> np.ndarray:
    """Interpolates at the places `source` by gathering neighbours: bilinear resize, one axis at a time."""
    low = np.floor(source).astype(int)
    high, share = np.minimum(low + 1, pixels.shape[axis] - 1), (source - low).astype(np.float64)
    share = share.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.take(pixels, low, axis) * (1 - share) + np.take(pixels, high, axis) * share


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", ["adm", "torch-fidelity"])
def test_tensorflow_1s_resize(preset, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    wanted = pixels.astype(np.float64)
    for axis in (0, 1):
        wanted = lerp(wanted, np.arange(299) * (size[axis] / 299), axis)
    np.testing.assert_allclose(prepared(preset, pixels), (wanted - 128) / 128, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_pytorchs_resize(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    wanted = pixels / 255
    for axis in (0, 1):
        places = np.maximum((np.arange(299) + 0.5) * (size[axis] / 299) - 0.5, 0)
        wanted = lerp(wanted, np.minimum(places, size[axis] - 1), axis)
    np.testing.assert_allclose(prepared("pytorch-fid", pixels), 2 * wanted - 1, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_clean_is_pillows_bicubic_on_floats_clipped(size):
    pixels = np.random.default_rng(0).integers(0, 2, (*size, 3), np.uint8) * np.uint8(255)  # so that cubics overshoot
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) for channel in channels]
    raw = np.stack(resized, axis=-1)
    assert (raw < 0).any() or size == (299, 299)
    np.testing.assert_allclose(prepared("clean", pixels), (raw.clip(0, 255) - 128) / 128, atol=1e-5)


def test_the_presets_prepare_a_picture_differently():
    pixels = pictures(1, (40, 40))[0]
    made = {name: prepared(name, pixels, 24) for name in PRESETS}
    np.testing.assert_array_equal(made.pop("torch-fidelity"), made["adm"])
    for a in made:
        for b in made:
            assert a == b or np.abs(made[a] - made[b]).max() > 1e-3
    white = np.full((9, 9, 3), 255, np.uint8)
    assert [float(prepared(name, white, 9).max()) for name in PRESETS] == [127 / 128, 1, 127 / 128, 127 / 128]


def gathered(found) -> dict[str, np.ndarray]:
    found = list(found)
    for f in found:
        assert len(f.indices) == len(f.pool) == len(f.spatial) == len(f.logits)  # no padding
    order = np.argsort(np.concatenate([f.indices for f in found]))
    return {k: np.concatenate([getattr(f, k) for f in found])[order] for k in ("indices", "pool", "spatial", "logits")}


@pytest.mark.parametrize("devices, batch, cut", [(8, 8, 5), (8, 3, 11), (1, 5, 23), (4, 16, 1)])
def test_features_do_not_depend_on_devices_batches_or_order(devices, batch, cut):
    net, preset, images = small_net(), PRESETS["adm"], pictures(23)
    wanted = gathered(make_extractor(net, preset, mesh(), 1)([(images, np.arange(23))]))
    order = np.random.default_rng(1).permutation(23)
    parts = [(images[order[a : a + cut]], order[a : a + cut]) for a in range(0, 23, cut)]
    measured = gathered(make_extractor(net, preset, mesh(devices), batch)(parts))
    np.testing.assert_array_equal(measured["indices"], np.arange(23))
    for name in ("pool", "spatial", "logits"):
        assert measured[name].shape == (23, net.dims()[name])
        np.testing.assert_allclose(measured[name], wanted[name], atol=2e-6)


def test_every_device_computes_its_share():
    extract = make_extractor(small_net(), PRESETS["adm"], mesh(8), 9)
    assert extract.rows == 16
    output = extract.run(np.zeros((16, 12, 10, 3), np.uint8))
    seen = {shard.device: shard.data.shape for shard in output["pool"].addressable_shards}
    assert seen == dict.fromkeys(jax.devices(), (2, 6))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_pictures_of_other_sizes_resized_on_the_host_come_out_the_same(preset):
    net, preset = small_net(), PRESETS[preset]
    sizes = [(12, 10), (30, 20), (12, 10), (8, 8), (30, 20)]
    images = [(pictures(2, size, seed), np.array([2 * seed, 2 * seed + 1])) for seed, size in enumerate(sizes)]
    together = gathered(make_extractor(net, preset, mesh(2), 4)(images))
    alone = [gathered(make_extractor(net, preset, mesh(), 2)([item]))["pool"] for item in images]
    np.testing.assert_allclose(together["pool"], np.concatenate(alone), atol=2e-6)


@pytest.mark.parametrize("bad", [np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 4, 4, 1), np.uint8)])
def test_pictures_that_were_not_rounded_to_uint8_are_refused(bad):
    with pytest.raises(ValueError, match="uint8"):
        list(make_extractor(small_net(), PRESETS["adm"], mesh(), 1)([(bad, np.zeros(1, int))]))


def test_memory_does_not_grow_with_the_pictures():
    extract = make_extractor(small_net(), PRESETS["adm"], mesh(), 8)

    def stream(n):
        for k in range(n):
            yield np.zeros((8, 64, 64, 3), np.uint8), np.arange(8 * k, 8 * k + 8)

    def peak(n):
        gc.collect()
        tracemalloc.start()
        for _ in extract(stream(n)):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(64) < peak(8) + 56 * 8 * 64 * 64 * 3 / 5  # a fifth of what the 56 batches more would take


def test_splits_of_the_inception_score():
    np.testing.assert_array_equal(np.bincount(PRESETS["adm"].splits(12_000)), [5000, 5000, 2000])
    assert (np.diff(PRESETS["adm"].splits(12_000)) >= 0).all()
    splits = PRESETS["torch-fidelity"].splits(1003)
    order = np.random.RandomState(2020).permutation(1003)  # as the tool: features[order], then chunks
    for k in range(10):
        assert (splits[order[k * 1003 // 10 : (k + 1) * 1003 // 10]] == k).all()


def test_weights_of_a_resize_sum_to_one():
    for resize in (features.tf1_bilinear, features.torch_bilinear, features.pil_bicubic):
        for size in (7, 299, 1024):
            np.testing.assert_allclose(resize(size, 299).sum(axis=1), 1, atol=1e-12)
