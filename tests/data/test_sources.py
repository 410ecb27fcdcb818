"""Sources: image files of a folder, a list or an archive alike, splits that never overlap, and corrupt files."""

import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from configs import common
from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.decoding import IMAGE_SUFFIXES
from vqgan_jax.data.image_files import ImageFiles, decode_at_least, in_split
from vqgan_jax.data.pipeline import evaluation, pipeline
from vqgan_jax.data.source import CorruptExample, readable
from vqgan_jax.data.sources import SOURCES, open_source
from vqgan_jax.data.stores import open_store
from vqgan_jax.data.transforms import Transform
from vqgan_jax.images import png_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))


def config(**fields):
    data = common.data("folder")
    fields = {"train_split": "", "val_split": "", "val_share": 0.3, "image_size": 8, "crop": "center"} | fields
    data.update(fields)
    return data


def save(path, colour=(200, 100, 50), size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def files(path):
    return open_source(config(path=str(path), val_share=0.0, resize="bilinear_no_antialias"), "train")


def pack(kind, folder, target):
    """A folder of files as the data set that a source of this kind reads: what `config.data.path` is."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in found]
    if kind == "folder":
        return folder
    if kind == "zip":
        with zipfile.ZipFile(target := target / "x.zip", "w") as archive:
            for path, name in zip(found, names, strict=True):
                archive.write(path, name)
    elif kind == "tar":
        with tarfile.open(target := target / "x.tar", "w") as archive:
            archive.add(folder, ".")
    else:
        target = target / "lists"
        target.mkdir()
        for split in ("train", "val"):
            mine = [str(path) for path, name in zip(found, names, strict=True) if name.startswith(split)]
            (target / f"{split}.txt").write_text("\n".join(mine) + "\n")
    return target


def test_unknown_source_and_split_name_the_near_one():
    with pytest.raises(UserError, match=r"config\.data\.source.*'scenes'"):
        open_source(config(source="scene"), "train")
    with pytest.raises(UserError, match="'train'"):
        open_source(config(), "trian")


def test_classes_are_the_top_folders_and_names_are_sorted(tmp_path):
    for name in ("dog/b/2.png", "dog/1.JPEG", "cat/a/b/c/3.WebP", "cat/4.bmp"):
        save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("")
    (tmp_path / "dog" / "._1.jpg").write_text("hidden")
    (tmp_path / "empty").mkdir()
    source = files(tmp_path)
    assert source.names == ["cat/4.bmp", "cat/a/b/c/3.WebP", "dog/1.JPEG", "dog/b/2.png"]
    assert source.classes == ("cat", "dog")
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert source[2]["name"] == str(tmp_path / "dog" / "1.JPEG")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[2]["image"], source[2]["image"])


def test_images_directly_in_the_folder_have_no_class(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "a" / "2.png")
    source = files(tmp_path)
    assert source.classes == () and source[0].keys() == {"image", "name"}


@pytest.mark.parametrize("kind,source", [("folder", "folder"), ("zip", "archive"), ("tar", "archive")])
def test_folders_and_archives_hold_the_same_examples(tmp_path, kind, source):
    for i, name in enumerate(("train/b/1.png", "train/a/é.png", "train/b/2.png", "val/b/3.png")):
        save(tmp_path / "data" / name, (i, 2 * i, 3 * i))
    path = pack(kind, tmp_path / "data", tmp_path)
    data = config(source=source, path=str(path), train_split="train", val_split="val")
    train, val = (open_source(data, split) for split in ("train", "val"))
    assert train.names == ["a/é.png", "b/1.png", "b/2.png"] and val.names == ["b/3.png"]
    assert train.classes == val.classes == ("a", "b")
    assert [int(train[i]["image"][0, 0, 0]) for i in range(3)] == [1, 0, 2] and val[0]["label"] == 1
    assert val[0]["name"] == f"{path}/val/b/3.png"


def test_a_list_holds_its_files_with_the_classes_of_their_folders(tmp_path):
    for i in range(4):
        save(tmp_path / f"{'ab'[i % 2]}" / f"{i}.png", (i, i, i))
    (tmp_path / "train.txt").write_text("b/3.png\na/0.png\nb/1.png\n")
    (tmp_path / "val").write_text("a/2.png\n")
    data = config(source="list", path=str(tmp_path), train_split="train", val_split="val")
    train, val = (open_source(data, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("a", "b")
    assert [int(train[i]["image"][0, 0, 0]) for i in range(3)] == [3, 0, 1] and val[0]["label"] == 0
    alone = config(source="list", path=str(tmp_path / "train.txt"), val_share=0.0)
    assert open_source(alone, "train").names == train.names
    alone.train_split = "train"
    with pytest.raises(UserError, match=r"is one list.*config\.data\.train_split="):
        open_source(alone, "train")
    alone.train_split = ""
    (tmp_path / "val").write_text("c/9.png\n")
    alone.path = str(tmp_path / "val")
    with pytest.raises(UserError, match=rf"there is no '{tmp_path}/c/9\.png'\)"):
        open_source(alone, "train")
    with pytest.raises(UserError, match="overlap"):
        open_source(config(source="list", path=str(tmp_path), train_split="val", val_split="val"), "train")


def test_a_bucket_is_read_like_a_folder(bucket):
    for name in ("train/a/1.png", "train/b/2.png", "val/b/3.png"):
        storage.write_bytes(f"{bucket}/{name}", png_bytes(np.full((4, 6, 3), 9, np.uint8)))
    data = config(path=bucket, train_split="train", val_split="val")
    train, val = (open_source(data, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("a", "b") and len(train) == 2
    assert val[0]["label"] == 1 and val[0]["image"].shape == (4, 6, 3)
    with pytest.raises(UserError, match="overlap"):
        open_source(config(path=bucket, train_split="train", val_split="train"), "val")


def test_training_jpegs_are_decoded_at_twice_the_crop(tmp_path):
    save(tmp_path / "1.jpg", size=(400, 300))
    assert files(tmp_path)[0]["image"].shape == (300, 400, 3)
    store = open_store(tmp_path, IMAGE_SUFFIXES)
    assert ImageFiles(store, store.names, at_least=70)[0]["image"].shape == (75, 100, 3)
    assert open_source(config(path=str(tmp_path), val_share=0.0), "train")[0]["image"].shape == (38, 50, 3)
    whole = config(path=str(tmp_path), val_share=0.0, resize="bilinear_no_antialias")
    assert open_source(whole, "train")[0]["image"].shape == (300, 400, 3)
    assert open_source(config(path=str(tmp_path), val_share=1.0), "val")[0]["image"].shape == (300, 400, 3)
    assert decode_at_least(config(crop="random_resized", crop_scale=(0.25, 1.0)), "train") == 32
    assert decode_at_least(config(resize_to=11), "train") == 22


@pytest.mark.parametrize("source", ["folder", "archive", "list"])
def test_missing_and_empty_data_sets_are_named(tmp_path, source):
    (tmp_path / "notes.txt").write_text("")
    for path in (str(tmp_path / "nowhere"), str(tmp_path / "notes.txt"), str(tmp_path), ""):
        with pytest.raises(UserError, match=r"config\.data\.path") as mistake:
            open_source(config(source=source, path=path), "train")
        assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("kind,source", [("folder", "folder"), ("tar", "archive")])
def test_held_out_split_is_disjoint_complete_and_stable(tmp_path, kind, source):
    for i in range(40):
        save(tmp_path / "data" / f"{i % 2}" / f"{i}.png", size=(1, 1))
    data = config(source=source, path=str(pack(kind, tmp_path / "data", tmp_path)))
    train, val = (open_source(data, split) for split in ("train", "val"))
    assert not set(train.names) & set(val.names) and len(train) + len(val) == 40
    assert 4 <= len(val) <= 20 and train.classes == val.classes == ("0", "1")
    assert {name for name in (*train.names, *val.names) if in_split(name, "val", 0.3)} == set(val.names)
    save(tmp_path / "data" / "1" / "new.png", size=(1, 1))  # a further file moves no other
    data.path = str(pack(kind, tmp_path / "data", tmp_path))
    assert set(val.names) <= set(open_source(data, "val").names)
    with pytest.raises(UserError, match="val_share"):
        open_source(config(source=source, path=data.path, val_share=0.0), "val")


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


@pytest.mark.parametrize("train,val", [("", "val"), ("val", "val"), ("train", "train/sub"), ("train", "link")])
def test_overlapping_split_folders_are_refused(tmp_path, train, val):
    for name in ("train/sub/1.png", "val/1.png"):
        save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="overlap"):
        open_source(config(path=str(tmp_path), train_split=train, val_split=val), "train")
    (tmp_path / "trainings").mkdir()
    save(tmp_path / "trainings" / "1.png")  # whose name only starts like that of another
    open_source(config(path=str(tmp_path), train_split="train", val_split="trainings"), "train")


@pytest.mark.parametrize(
    "kind,source", [("folder", "folder"), ("zip", "archive"), ("tar", "archive"), ("list", "list")]
)
def test_corrupt_files_change_nothing_but_their_own_rows(tmp_path, kind, source):
    """Every other row of the stream, and the order, are those of the sound data set; the corrupt ones are counted."""
    for i in range(200):
        save(tmp_path / "data" / f"train/{i:03}.png", (i, i, i), size=(8, 8))
    sound_path = pack(kind, tmp_path / "data", tmp_path)

    def batches(path):
        data = config(source=source, path=str(path), train_split="train", val_share=0.0)
        found = open_source(data, "train")
        transform = Transform.from_config(data, keys=("image",), classes=0, train=True)
        how = dict(rows=np.arange(8), global_batch=8, seed=3, start=0, threads=2, processes=0)
        with pipeline(found, transform=transform, max_corrupt_share=0.05, **how) as stream:
            drawn = [np.rint((next(stream)["image"][:, 0, 0, 0] + 1) * 127.5) for _ in range(25)]
        evaluated = list(evaluation(found, rows=np.arange(8), global_batch=8, transform=transform))
        return np.concatenate(drawn), stream.replaced, np.concatenate([batch["valid"] for batch in evaluated])

    sound, replaced, valid = batches(sound_path)
    assert not replaced and valid.all() and sorted(sound) == list(range(200))
    empty, cut = 17, 101
    (tmp_path / "data/train/017.png").write_bytes(b"")
    whole = (tmp_path / "data/train/101.png").read_bytes()
    (tmp_path / "data/train/101.png").write_bytes(whole[: len(whole) // 2])
    again = tmp_path / "again"
    again.mkdir()
    damaged, replaced, valid = batches(pack(kind, tmp_path / "data", again))
    np.testing.assert_array_equal(np.flatnonzero(damaged != sound), np.flatnonzero((sound == empty) | (sound == cut)))
    assert set(damaged[damaged != sound]) == {empty + 1, cut + 1}  # the next readable one stands in
    assert len(replaced) == 2 and "an empty file" in next(v for k, v in replaced.items() if k.endswith("017.png"))
    np.testing.assert_array_equal(np.flatnonzero(~valid), [empty, cut])


def test_a_source_of_every_name_says_in_one_line_that_it_needs_a_path():
    for name in SOURCES:
        if name != "scenes":
            with pytest.raises(UserError) as mistake:
                open_source(config(source=name, path=""), "train")
            assert "\n" not in str(mistake.value), name


def test_an_unreadable_file_is_named_by_its_path(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "1.png").write_bytes(b"nothing")
    with pytest.raises(CorruptExample) as caught:
        files(tmp_path)[0]
    assert caught.value.path == str(tmp_path / "a" / "1.png")
    assert "0x" not in caught.value.reason  # the same reason every time: manifests keep it
    with pytest.raises(CorruptExample, match="1.png"):
        readable(files(tmp_path), 0)
    save(tmp_path / "a" / "0.png")
    for index in range(2):  # past the end it goes on with the first
        np.testing.assert_array_equal(readable(files(tmp_path), index)["image"], files(tmp_path)[0]["image"])
