"""Scenes as a source: the cache holds what the renderer draws, whatever happens to it."""

import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict

from vqgan_jax.config import UserError
from vqgan_jax.data import scenes, scenes_source
from vqgan_jax.data.scenes_source import ScenesSource
from vqgan_jax.data.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scenes"


def assert_same_example(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert np.asarray(a[key]).dtype == np.asarray(b[key]).dtype


def test_cached_scenes_are_the_rendered_ones_and_are_rendered_once(cache, monkeypatch):
    source = ScenesSource(5, 16, 3, "train")
    assert len(list(cache.iterdir())) == 1
    for i in range(5):
        assert_same_example(source[i], scenes.render(3, i, 16, 16))
    monkeypatch.setattr(scenes, "render", None)  # the second opening must not need it
    again = ScenesSource(5, 16, 3, "train")
    assert_same_example(again[4], source[4])
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert_same_example(pickle.loads(pickled)[2], source[2])
    with pytest.raises(IndexError):
        source[5]


def test_scenes_splits_are_disjoint_and_keyed_by_all_that_matters(cache):
    data = ConfigDict(
        dict(source="scenes", train_examples=6, val_examples=4, image_size=8, resize_to=0, seed=1, classes="")
    )
    train, val = (open_source(data, split) for split in ("train", "val"))
    assert len(train) == 6 and len(val) == 4 and train.classes == scenes.CLASSES
    pictures = [source[i]["image"].tobytes() for source in (train, val) for i in range(len(source))]
    assert len(set(pictures)) == 10
    data.resize_to = 12  # crops are cut out of larger pictures
    assert open_source(data, "val")[0]["image"].shape == (12, 12, 3)
    ScenesSource(6, 8, 2, "train"), ScenesSource(7, 8, 1, "train"), ScenesSource(6, 9, 1, "train")
    assert len(list(cache.iterdir())) == 6


def test_scenes_of_some_classes_are_scenes_of_the_whole_world(cache):
    """They keep their labels; the training split and the other never share one."""
    data = ConfigDict(
        dict(
            source="scenes",
            train_examples=5,
            val_examples=3,
            image_size=8,
            resize_to=0,
            seed=1,
            classes="night_lake, 0",
        )
    )
    train, val = (open_source(data, split) for split in ("train", "val"))
    labels = [scenes.render(1, index, 8, 8)["label"] for index in range(100)]
    kept = {0, scenes.CLASSES.index("night_lake")}
    indices = [index for index, label in enumerate(labels) if label in kept][:5]
    for i, index in enumerate(indices):
        assert scenes.label_of(1, index) == labels[index]
        assert_same_example(train[i], scenes.render(1, index, 8, 8))
    assert len(train) == 5 and len(val) == 3 and {val[i]["label"] for i in range(3)} <= kept
    whole = ScenesSource(5, 8, 1, "train")
    assert whole[0]["label"] == labels[0] and len(list(cache.iterdir())) == 3
    data.classes = "noon"
    with pytest.raises(UserError, match="config.data.classes: unknown name 'noon'"):
        open_source(data, "train")


def test_a_changed_renderer_is_another_cache(cache, tmp_path, monkeypatch):
    ScenesSource(2, 8, 1, "train")
    changed = tmp_path / "scenes.py"
    changed.write_text("# another renderer")
    monkeypatch.setattr(scenes, "__file__", str(changed))
    ScenesSource(2, 8, 1, "train")
    assert len(list(cache.iterdir())) == 2


def test_parallel_rendering_is_serial_rendering(cache, monkeypatch):
    monkeypatch.setattr(scenes_source, "_CHUNK", 2)
    monkeypatch.setattr(scenes_source, "cores", lambda: 2)
    source = ScenesSource(33, 8, 1, "train")
    for i in (0, 1, 2, 16, 31, 32):
        assert_same_example(source[i], scenes.render(1, i, 8, 8))


def test_scenes_without_a_cache_are_rendered_on_the_fly(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "file"))
    source = ScenesSource(3, 8, 1, "train")
    assert_same_example(pickle.loads(pickle.dumps(source))[2], scenes.render(1, 2, 8, 8))


def test_too_many_scenes_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(scenes_source, "CACHE_LIMIT", 3 * 8 * 8 * 8 - 1)
    assert_same_example(ScenesSource(3, 8, 1, "val")[0], scenes.render(1, scenes_source.VAL_START, 8, 8))
    assert not cache.exists()


def test_a_full_disk_leaves_no_half_cache(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes_source, "_write_header", full)
    source = ScenesSource(3, 8, 1, "train")
    assert list(cache.iterdir()) == []
    assert_same_example(source[1], scenes.render(1, 1, 8, 8))


def test_a_cache_another_process_finished_first_is_used(cache, monkeypatch):
    write = ScenesSource._write_arrays

    def slow(self, folder):
        monkeypatch.setattr(ScenesSource, "_write_arrays", write)
        ScenesSource(3, 8, 1, "train")  # the other process
        write(self, folder)

    monkeypatch.setattr(ScenesSource, "_write_arrays", slow)
    source = ScenesSource(3, 8, 1, "train")
    assert source._arrays is not None and len(list(cache.iterdir())) == 1


def test_a_damaged_cache_is_named(cache):
    ScenesSource(3, 8, 1, "train")
    (next(cache.iterdir()) / "image.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=str(cache)):
        ScenesSource(3, 8, 1, "train")
