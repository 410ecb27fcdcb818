"""Sources: what a folder of images may hold, splits that never overlap, and the cache of scenes."""

import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax.config import UserError
from vqgan_jax.data import scenes, sources
from vqgan_jax.data.sources import CorruptExample, FolderSource, ScenesSource, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scenes"


def config(**fields):
    fields = {"source": "folder", "train_split": "", "val_split": "", "val_share": 0.3, "seed": 1} | fields
    sizes = {"train_examples": 6, "val_examples": 4, "image_size": 8}
    return ConfigDict(sizes | {"resize": "box", "crop": "center", "crop_scale": (0.5, 1.0)} | fields)


def save(path, colour=(200, 100, 50), size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def assert_same_example(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert np.asarray(a[key]).dtype == np.asarray(b[key]).dtype


def test_unknown_source_and_split_name_the_near_one():
    with pytest.raises(UserError, match=r"config\.data\.source.*'scenes'"):
        open_source(config(source="scene"), "train")
    with pytest.raises(UserError, match="'train'"):
        open_source(config(), "trian")


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
    train, val = (open_source(config(source="scenes"), split) for split in ("train", "val"))
    assert len(train) == 6 and len(val) == 4 and train.classes == scenes.CLASSES
    pictures = [source[i]["image"].tobytes() for source in (train, val) for i in range(len(source))]
    assert len(set(pictures)) == 10
    ScenesSource(6, 8, 2, "train"), ScenesSource(7, 8, 1, "train"), ScenesSource(6, 9, 1, "train")
    assert len(list(cache.iterdir())) == 5


def test_a_changed_renderer_is_another_cache(cache, tmp_path, monkeypatch):
    ScenesSource(2, 8, 1, "train")
    changed = tmp_path / "scenes.py"
    changed.write_text("# another renderer")
    monkeypatch.setattr(scenes, "__file__", str(changed))
    ScenesSource(2, 8, 1, "train")
    assert len(list(cache.iterdir())) == 2


def test_parallel_rendering_is_serial_rendering(cache, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", 2)
    monkeypatch.setattr(sources, "_cores", lambda: 2)
    source = ScenesSource(33, 8, 1, "train")
    for i in (0, 1, 2, 16, 31, 32):
        assert_same_example(source[i], scenes.render(1, i, 8, 8))


def test_scenes_without_a_cache_are_rendered_on_the_fly(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "file"))
    source = ScenesSource(3, 8, 1, "train")
    assert_same_example(pickle.loads(pickle.dumps(source))[2], scenes.render(1, 2, 8, 8))


def test_too_many_scenes_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(sources, "CACHE_LIMIT", 3 * 8 * 8 * 8 - 1)
    assert_same_example(ScenesSource(3, 8, 1, "val")[0], scenes.render(1, sources.VAL_START, 8, 8))
    assert not cache.exists()


def test_a_full_disk_leaves_no_half_cache(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "_write_header", full)
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


def test_classes_are_the_top_folders_and_names_are_sorted(tmp_path):
    for name in ("dog/b/2.png", "dog/1.JPEG", "cat/a/b/c/3.WebP", "cat/4.bmp"):
        save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("")
    (tmp_path / "dog" / "._1.jpg").write_text("hidden")
    (tmp_path / "empty").mkdir()
    source = FolderSource(tmp_path)
    assert source.names == ["cat/4.bmp", "cat/a/b/c/3.WebP", "dog/1.JPEG", "dog/b/2.png"]
    assert source.classes == ("cat", "dog")
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert_same_example(pickle.loads(pickle.dumps(source))[2], source[2])


def test_images_directly_in_the_folder_have_no_class(tmp_path):
    save(tmp_path / "1.png")
    source = FolderSource(tmp_path)
    assert source.classes == () and source[0].keys() == {"image"}


def test_links_are_followed_but_loops_end(tmp_path):
    save(tmp_path / "data" / "a" / "1.png")
    save(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "self").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "3.png").symlink_to(tmp_path / "nowhere")
    source = FolderSource(tmp_path / "data")
    assert source.names == ["a/1.png", "b/2.png", "b/3.png"]
    with pytest.raises(CorruptExample, match=r"b/3\.png"):
        source[2]


def test_every_kind_of_picture_becomes_rgb_uint8(tmp_path):
    grey = np.array([[0, 128, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray((grey.astype(np.int32) * 257 + [0, 100, -100]).astype(np.uint16)).save(tmp_path / "b.png")
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "c.png")
    Image.new("RGB", (3, 2), (255, 0, 0)).convert("P").save(tmp_path / "d.png")
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "e.jpg")
    Image.new("1", (3, 2), 1).save(tmp_path / "f.bmp")
    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "g.png")
    images = [FolderSource(tmp_path)[i]["image"] for i in range(7)]
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in images)
    for image in images[:2]:
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(images[2][0], [[255, 0, 0], [255, 255, 255]])
    np.testing.assert_array_equal(images[3], np.broadcast_to([255, 0, 0], (2, 3, 3)))
    np.testing.assert_allclose(images[4], np.broadcast_to([255, 0, 0], (2, 3, 3)), atol=3)
    np.testing.assert_array_equal(images[5], np.full((2, 3, 3), 255))
    np.testing.assert_array_equal(images[6][0], [[9] * 3, [255] * 3])


def test_the_camera_rotation_is_applied(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of the stored picture is its bottom
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    upright = FolderSource(tmp_path)[0]["image"]
    np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


def test_draft_decoding_keeps_the_asked_size(tmp_path):
    save(tmp_path / "1.jpg", size=(400, 300))
    assert FolderSource(tmp_path)[0]["image"].shape == (300, 400, 3)
    assert FolderSource(tmp_path, decode_at_least=70)[0]["image"].shape == (75, 100, 3)
    assert open_source(config(path=str(tmp_path), val_share=0.0), "train")[0]["image"].shape == (38, 50, 3)
    whole = config(path=str(tmp_path), val_share=0.0, resize="bilinear_no_antialias")
    assert open_source(whole, "train")[0]["image"].shape == (300, 400, 3)
    assert open_source(config(path=str(tmp_path), val_share=1.0), "val")[0]["image"].shape == (300, 400, 3)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_damaged_files_are_corrupt_examples(tmp_path, damage):
    path = tmp_path / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)).save(path)
    path.write_bytes({"empty": b"", "text": b"hello", "cut": path.read_bytes()[:2000]}[damage])
    with pytest.raises(CorruptExample) as caught:
        FolderSource(tmp_path)[0]
    assert caught.value.path == str(path) and caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path in (str(tmp_path / "nowhere"), str(tmp_path), ""):
        with pytest.raises(UserError, match=r"config\.data\.path"):
            open_source(config(path=path), "train")


def test_held_out_split_is_disjoint_complete_and_stable(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i % 2}" / f"{i}.png", size=(1, 1))
    train, val = (open_source(config(path=str(tmp_path)), split) for split in ("train", "val"))
    assert not set(train.names) & set(val.names) and len(train) + len(val) == 40
    assert 4 <= len(val) <= 20 and train.classes == val.classes == ("0", "1")
    save(tmp_path / "1" / "new.png", size=(1, 1))  # a further file moves no other
    assert set(val.names) <= set(open_source(config(path=str(tmp_path)), "val").names)
    with pytest.raises(UserError, match="val_share"):
        open_source(config(path=str(tmp_path), val_share=0.0), "val")


def test_split_folders_share_the_ids_of_training(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png"):
        save(tmp_path / name)
    data = config(path=str(tmp_path), train_split="train", val_split="val")
    (tmp_path / "train" / "aa").mkdir()  # no image, no class
    train, val = (open_source(data, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("a", "b", "c")
    assert val[0]["label"] == 2
    save(tmp_path / "val" / "bb" / "1.png")
    with pytest.raises(UserError, match="'b'"):
        open_source(data, "val")


@pytest.mark.parametrize("train,val", [("", "val"), ("val", "val"), ("train", "train/sub")])
def test_overlapping_split_folders_are_refused(tmp_path, train, val):
    for name in ("train/sub/1.png", "val/1.png"):
        save(tmp_path / name)
    with pytest.raises(UserError, match="overlap"):
        open_source(config(path=str(tmp_path), train_split=train, val_split=val), "train")
