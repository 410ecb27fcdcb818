"""Statistics of sets: what they depend on, what they are refused for, every format they are opened from, the cache."""

import dataclasses
import gc
import json
import logging
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from tests.evals.nets import pictures, small_net
from vqgan_jax.config import UserError
from vqgan_jax.evals import distances, references
from vqgan_jax.evals import pictures as pictures_on_disk
from vqgan_jax.evals.features import PRESETS, make_extractor
from vqgan_jax.evals.references import Statistics, collect, collect_pairs, compare, numbered, open_reference
from vqgan_jax.images import save_png

COUNT = 37


def extractor(preset: str = "adm", devices: int = 1, batch: int = 4, **net):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return make_extractor(small_net(**net), PRESETS[preset], mesh, batch)


def statistics(images: np.ndarray, extract=None, **more) -> Statistics:
    return collect(numbered([images]), extract or extractor(), count=len(images), source={"from": "test"}, **more)


def write_folder(folder, images: np.ndarray, suffix: str = ".png"):
    for k, image in enumerate(images):
        save_png(folder / f"class_{k % 2}" / f"{k:03d}{suffix}", image)
    return folder


@pytest.fixture(scope="module")
def sets():
    """Samples and reference, and the scores of plain NumPy on all of their features."""
    samples, reference = pictures(COUNT, seed=1), pictures(29, seed=2)
    extract = extractor(batch=64)
    found = [next(iter(extract(numbered([x])))) for x in (samples, reference)]
    return samples, reference, found


def test_scores_equal_numpy_on_the_features(sets):
    samples, reference, (ours, theirs) = sets
    scores = compare(statistics(samples), statistics(reference))

    def frechet(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        roots = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real.sum()
        return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2 * roots

    assert scores["fid"] == pytest.approx(frechet(ours.pool, theirs.pool), rel=1e-5)
    assert scores["sfid"] == pytest.approx(frechet(ours.spatial, theirs.spatial), rel=1e-5)
    assert (scores["precision"], scores["recall"]) == distances.precision_recall(theirs.pool, ours.pool)
    assert scores["kid_mean"] == pytest.approx(distances.kid(ours.pool, theirs.pool)[0], rel=1e-4)
    p = np.exp(ours.logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    assert scores["is_mean"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-5)
    assert scores["samples"] == COUNT and scores["reference_samples"] == 29 and "rank_deficient" not in scores
    assert all(type(value) is float for value in scores.values()) and json.dumps(scores)


@pytest.mark.parametrize("preset", ["adm", "torch-fidelity"])
def test_scores_depend_on_no_device_batch_or_order_of_arrival(sets, preset):
    samples, reference, _ = sets
    wanted = compare(statistics(samples, extractor(preset)), statistics(reference, extractor(preset)))
    order = np.random.default_rng(3).permutation(COUNT)
    for devices, batch, cut in ((8, 8, 10), (1, 7, 1), (8, 24, 37)):
        extract = extractor(preset, devices, batch)
        shuffled = [(samples[order[a : a + cut]], order[a : a + cut]) for a in range(0, COUNT, cut)]
        ours = collect(shuffled, extract, count=COUNT, source={})
        measured = compare(ours, statistics(reference, extract))
        assert measured.keys() == wanted.keys()
        for name, value in wanted.items():
            assert measured[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_a_set_is_zero_from_itself(sets):
    scores = compare(statistics(sets[0]), statistics(sets[0], extractor(devices=8, batch=16)))
    assert scores["fid"] < 1e-6 and scores["sfid"] < 1e-6 and scores["precision"] == scores["recall"] == 1


def test_the_count_is_checked_and_few_pictures_are_flagged(sets):
    samples, reference, _ = sets
    with pytest.raises(UserError, match="36 pictures came, 37 were expected"):
        collect(numbered([samples[:36]]), extractor(), count=37, source={})
    for bad in (numbered([samples]), [(samples[:2], np.array([1, 1])), (samples[:2], np.array([1, 2]))]):
        with pytest.raises(ValueError, match="comes once"):
            collect(bad, extractor(), count=36, source={})
    with pytest.raises(UserError, match="at least 2"):
        statistics(samples[:1])
    scores = compare(statistics(samples[:3]), statistics(reference))
    assert scores["rank_deficient"] == 1 and "precision" not in scores and scores["kid_subset_size"] == 3


def test_kept_features_are_a_fixed_random_part(sets):
    samples, _, (ours, _) = sets
    kept = statistics(samples, keep=10).features
    again = statistics(samples, extractor(devices=8, batch=8), keep=10).features
    np.testing.assert_allclose(kept, again, atol=2e-6)
    rows = [int(np.abs(ours.pool - row).max(1).argmin()) for row in kept]
    assert len(set(rows)) == 10 and rows == sorted(rows) and rows != list(range(10))
    assert compare(statistics(samples, keep=10), statistics(samples))["samples_compared"] == 10


def test_memory_does_not_grow_with_the_pictures():
    def stream(n):
        for k in range(n):
            yield np.full((8, 48, 48, 3), k, np.uint8), np.arange(8 * k, 8 * k + 8)

    def peak(n):
        extract = extractor(batch=8)
        gc.collect()
        tracemalloc.start()
        collect(stream(n), extract, count=8 * n, source={}, keep=16)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(100) < peak(10) + 90 * 8 * 48 * 48 * 3 / 5  # a fifth of what the 90 batches more would take


def test_files_are_read_in_order_and_only_a_little_ahead():
    asked, ahead = [], []
    for taken, value in enumerate(
        pictures_on_disk.in_threads(lambda k: k * k, (asked.append(k) or k for k in range(500)))
    ):
        assert value == taken * taken
        ahead.append(len(asked) - taken)
    assert len(ahead) == 500 and max(ahead) < 100


def test_pairs_in_one_pass_equal_two_passes(sets):
    originals = sets[0]
    rebuilt = (originals.astype(int) * 3 // 4).astype(np.uint8)
    pairs = [(originals[a : a + 5], rebuilt[a : a + 5], np.arange(a, min(a + 5, COUNT))) for a in range(0, COUNT, 5)]
    there, back = collect_pairs(pairs, extractor(), count=COUNT, source={"split": "val"})
    assert there.source == {"split": "val"} and back.source == {"reconstructions of": {"split": "val"}}
    wanted = compare(statistics(rebuilt), statistics(originals))
    assert compare(back, there) == pytest.approx(wanted, rel=1e-6, abs=1e-9) and wanted["fid"] > 0.01


def test_saved_statistics_come_back_and_are_readable_as_pytorch_fids(sets, tmp_path):
    made = statistics(sets[0])
    made.save(tmp_path / "a.npz")
    back = open_reference(str(tmp_path / "a.npz"), extractor(), cache=None, preset_stated=False)
    np.testing.assert_array_equal(back.features, made.features)
    assert (back.preset, back.net, back.source, back.count, back.score, back.unverified) == (
        made.preset, made.net, made.source, made.count, made.score, made.unverified,
    )  # fmt: skip
    other = statistics(sets[1])
    assert compare(back, other) == compare(made, other) and compare(other, back) == compare(other, made)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["sigma"], made.pool.covariance)
        assert arrays["mu"].shape == (6,)


def test_statistics_of_another_preset_or_network_are_refused(sets, tmp_path):
    samples, reference, _ = sets
    made = statistics(samples)
    with pytest.raises(UserError, match="preset clean.*adm"):
        compare(made, statistics(reference, extractor("clean")))
    with pytest.raises(UserError, match="other weights"):
        compare(made, statistics(reference, extractor(sha256="1" * 64)))
    made.save(tmp_path / "a.npz")
    for other in (extractor("clean"), extractor(sha256="1" * 64)):
        with pytest.raises(UserError, match="the preset adm|other weights"):  # before anything is sampled
            open_reference(str(tmp_path / "a.npz"), other, cache=None, preset_stated=True)


def test_samples_whose_preset_was_taken_on_trust_are_noted_too(sets):
    trusted = dataclasses.replace(statistics(sets[0]), unverified=True)
    assert compare(trusted, statistics(sets[1]))["reference_unverified"] == 1


def test_pairs_without_kept_features_have_fid_alone(sets):
    pairs = [(sets[0], sets[0] // 2, np.arange(COUNT))]
    there, back = collect_pairs(pairs, extractor(), count=COUNT, source={}, keep=0)
    assert there.features is None and {"fid", "sfid"} < compare(back, there).keys()
    assert not {"precision", "kid_mean"} & compare(back, there).keys()


def test_pictures_are_scored_as_the_published_tools_decode_them(tmp_path):
    """As stored: not turned by EXIF, and what is transparent keeps its colours."""
    rgba = np.concatenate([pictures(4, seed=3), np.zeros((4, 12, 10, 1), np.uint8)], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for k, image in enumerate(rgba):
        Image.fromarray(image).save(tmp_path / f"{k}.png", exif=exif)
    found = pictures_on_disk.open_pictures(str(tmp_path), key="--samples")
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found.read()]), rgba[..., :3])


@pytest.mark.parametrize("kind", ["fortran", "version", "crc"])
def test_arrays_that_cannot_be_read_are_one_line(tmp_path, kind):
    x = np.asfortranarray(pictures(4)) if kind == "fortran" else pictures(4)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, x, version=(3, 0) if kind == "version" else None)
    if kind == "crc":
        data = bytearray((tmp_path / "a.npz").read_bytes())
        data[500] ^= 255
        (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match="--samples=.*a.npz: 'arr_0' cannot be read") as caught:
        open_reference(str(tmp_path / "a.npz"), extractor(), cache=None, preset_stated=True, key="--samples")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_pictures_from_every_kind_of_place_score_as_the_array(sets, tmp_path, kind):
    samples = sets[0]
    if kind == "npz":
        np.savez(tmp_path / "a.npz", arr_0=samples)
        where, ordered = tmp_path / "a.npz", samples
    else:
        where = write_folder(tmp_path / "a", samples)
        (where / "notes.txt").write_text("no picture")
        (where / "class_0" / "._000.png").write_text("no picture either")
        ordered = np.concatenate([samples[0::2], samples[1::2]])  # by class folder
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
                for file in sorted(where.rglob("0*.png")):
                    archive.write(file, file.relative_to(where))
            where = tmp_path / "a.zip"
    found = open_reference(str(where), extractor(), cache=None, preset_stated=False)
    wanted = statistics(ordered)
    assert found.count == COUNT and found.source["path"] == str(where)
    np.testing.assert_allclose(found.features, wanted.features, atol=2e-6)
    assert found.score == pytest.approx(wanted.score, rel=1e-6)
    assert compare(found, wanted)["fid"] < 1e-6


def test_pictures_of_many_sizes(tmp_path):
    made = []
    for k in range(12):
        made.append(pictures(1, (12 + k % 3, 10), seed=k)[0])
        save_png(tmp_path / f"{k:02d}.png", made[-1])
    found = open_reference(str(tmp_path), extractor(), cache=None, preset_stated=False)
    wanted = [next(iter(extractor(batch=1)(numbered([x[None]])))).pool[0] for x in made]
    np.testing.assert_allclose(found.features, wanted, atol=2e-6)


def test_jpeg_is_warned_of(sets, tmp_path, caplog):
    write_folder(tmp_path / "png", sets[0][:4])
    with caplog.at_level(logging.WARNING, logger="absl"):
        open_reference(str(tmp_path / "png"), extractor(), cache=None, preset_stated=False)
    assert not caplog.records
    for k, image in enumerate(sets[0][:3]):
        Image.fromarray(image).save(tmp_path / "png" / f"{k}.JPEG", "JPEG")
    with caplog.at_level(logging.WARNING, logger="absl"):
        found = open_reference(str(tmp_path / "png"), extractor(), cache=None, preset_stated=False, key="--samples")
    assert "--samples" in caplog.text and "3 of 7 pictures are JPEG" in caplog.text and found.source["jpeg"] == 3


def write_adm(path, images, **changes):
    """A reference batch: the statistics of all pictures, and some of the pictures."""
    made = statistics(images)
    arrays = {"mu": made.pool.mean, "sigma": made.pool.covariance, "arr_0": images[:20]}
    arrays |= {"mu_s": made.spatial.mean, "sigma_s": made.spatial.covariance} | changes
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return str(path)


def test_adms_reference_batches(sets, tmp_path):
    samples, reference, (ours, theirs) = sets
    where = write_adm(tmp_path / "adm.npz", reference)
    found = open_reference(where, extractor(), cache=tmp_path / "cache", preset_stated=False)
    scores = compare(statistics(samples), found)
    wanted = compare(statistics(samples), statistics(reference))
    assert scores["fid"] == pytest.approx(wanted["fid"]) and scores["sfid"] == pytest.approx(wanted["sfid"])
    assert (scores["precision"], scores["recall"]) == distances.precision_recall(theirs.pool[:20], ours.pool)
    assert "reference_samples" not in scores and scores["reference_compared"] == 20  # of how many mu is, is not said
    assert "reference_unverified" not in scores
    with pytest.raises(UserError, match="reference batch of ADM; use --preset=adm"):
        open_reference(where, extractor("pytorch-fid"), cache=None, preset_stated=True)
    bare = open_reference(
        write_adm(tmp_path / "no.npz", reference, arr_0=None), extractor(), cache=None, preset_stated=False
    )
    assert bare.features is None and compare(statistics(samples), bare).keys() == {
        "fid", "sfid", "is_mean", "is_std", "samples",
    }  # fmt: skip


def test_bare_statistics_need_a_stated_preset_and_are_noted(sets, tmp_path):
    samples, reference, _ = sets
    where = write_adm(tmp_path / "fid.npz", reference, arr_0=None, mu_s=None, sigma_s=None)
    with pytest.raises(UserError, match="--preset"):
        open_reference(where, extractor(), cache=None, preset_stated=False)
    scores = compare(statistics(samples), open_reference(where, extractor(), cache=None, preset_stated=True))
    half = write_adm(tmp_path / "half.npz", reference, arr_0=None, sigma_s=None)
    assert open_reference(half, extractor(), cache=None, preset_stated=True).spatial is None
    assert scores["reference_unverified"] == 1 and "sfid" not in scores and "reference_samples" not in scores
    assert scores["fid"] == pytest.approx(compare(statistics(samples), statistics(reference))["fid"])
    few = write_adm(tmp_path / "few.npz", reference[:4], arr_0=None, mu_s=None, sigma_s=None)
    found = open_reference(few, extractor(), cache=None, preset_stated=True)
    assert compare(statistics(samples), found)["rank_deficient"] == 1  # seen in the covariance itself


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(7), "sigma": np.zeros((7, 7))}, "not of the network's 6 features"),
        ({"mu": np.zeros(6), "sigma": np.zeros((6, 5))}, "not of the network's 6 features"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}, "network's 5 features"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "float32.*uint8"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "uint8 .n, h, w, 3"),
        ({"samples": np.zeros(3)}, "holds samples; pictures are 'arr_0'"),
    ],
)
def test_files_that_hold_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_reference(str(tmp_path / "a.npz"), extractor(), cache=None, preset_stated=True)


def test_nothing_there_and_damage_are_one_line(sets, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    write_folder(tmp_path / "cut", sets[0][:3])
    broken = tmp_path / "cut" / "class_0" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for name, message in (
        ("none", "nothing there"),
        ("none.npz", "no .npz file"),
        ("empty", "holds no picture"),
        ("a.npz", "no .npz file"),
        ("cut", "class_0/002.png"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_reference(str(tmp_path / name), extractor(), cache=None, preset_stated=True, key="--samples")
        assert "\n" not in str(caught.value) and str(caught.value).startswith("--samples")


def test_the_cache_is_used_for_the_same_set_and_for_no_other(sets, tmp_path, monkeypatch):
    folder, cache = write_folder(tmp_path / "a", sets[0][:8]), tmp_path / "cache"
    runs = []
    real = references.collect
    monkeypatch.setattr(references, "collect", lambda *a, **k: runs.append(1) or real(*a, **k))

    def opened(where=folder, extract=None, keep=None):
        before = len(runs)
        found = open_reference(str(where), extract or extractor(), cache=cache, preset_stated=True, keep=keep)
        return found, len(runs) - before

    first, made = opened()
    assert made == 1
    again, made = opened(extract=extractor(devices=8, batch=16))
    assert made == 0 and again.source["path"] == str(folder)
    np.testing.assert_array_equal(again.features, first.features)
    moved, made = opened(folder.rename(tmp_path / "b"))
    assert made == 0 and moved.source["path"] == str(tmp_path / "b")  # the same pictures elsewhere
    folder = tmp_path / "b"
    assert opened(folder, extractor("clean"))[1] == 1
    assert opened(folder, extractor(sha256="1" * 64))[1] == 1
    assert opened(folder, keep=3)[1] == 1
    save_png(folder / "class_0" / "000.png", sets[0][20])  # another picture under an old name
    assert opened(folder)[1] == 1
    (folder / "class_0" / "000.png").unlink()
    fewer, made = opened(folder)
    assert made == 1 and fewer.count == 7
    assert len(list(cache.iterdir())) == 6
    for k, image in enumerate(sets[0][:3]):  # of one size, whatever they show
        Image.fromarray(image).save(tmp_path / f"bmp_{k}.bmp")
    (tmp_path / "c").mkdir()
    for k in (0, 1):
        (tmp_path / f"bmp_{k}.bmp").rename(tmp_path / "c" / f"{k}.bmp")
    assert opened(tmp_path / "c")[1] == 1
    (tmp_path / "bmp_2.bmp").rename(tmp_path / "c" / "1.bmp")
    assert opened(tmp_path / "c")[1] == 1
