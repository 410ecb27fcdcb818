"""Pictures and the masks or depths of the same name: ids as published, and one line for what does not fit."""

import io
import logging
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from configs import common
from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data import tables
from vqgan_jax.data.pairs import Ids, decode_depth
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.data.sources import open_source


def config(path, source="pairs", **fields):
    data = common.data(source)
    data.update(path=str(path), resize="bilinear_no_antialias", **fields)
    return data


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mask(height=6, width=9, below=5, seed=0):
    return np.random.default_rng(seed).integers(0, below, (height, width), np.uint8)


def float_png(depth):
    """A depth map as the reference keeps it: the bytes of a float32 as RGBA."""
    return png(np.ascontiguousarray(depth, "<f4").view(np.uint8).reshape(*depth.shape, 4))


@pytest.fixture
def folders(tmp_path):
    for split, names in {"train": ("a/1", "a/2", "b/1"), "val": ("é",)}.items():
        for k, name in enumerate(names):
            save(tmp_path / "images" / split / f"{name}.png", photo(seed=k))
            save(tmp_path / "masks" / split / f"{name}.png", mask(seed=k))
            save(tmp_path / "depth" / split / f"{name}.png", mask(seed=k + 9))
    return tmp_path


def test_pictures_meet_the_mask_and_depth_of_their_name(folders):
    data = config(folders, masks="masks", depths="depth")
    train, val = (open_source(data, split) for split in ("train", "val"))
    assert len(train) == 3 and len(val) == 1 and train.classes == ()
    for k, example in enumerate(train[i] for i in range(3)):
        np.testing.assert_array_equal(example["image"], photo(seed=k))
        np.testing.assert_array_equal(example["segmentation"], mask(seed=k))
        np.testing.assert_array_equal(example["depth"], mask(seed=k + 9).astype(np.float32) / 255)
    assert train.names == ("a/1.png", "a/2.png", "b/1.png")
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(again[2]["segmentation"], train[2]["segmentation"])
    encoded = train.encoded(1)
    assert encoded["image_bytes"] == (folders / "images/train/a/2.png").read_bytes() and "image" not in encoded
    np.testing.assert_array_equal(encoded["segmentation"], mask(seed=1))


def test_one_folder_is_split_by_name_and_archives_serve_as_well(folders):
    archive = folders / "all.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in sorted((folders / "images").rglob("*.png")):
            zipped.write(file, file.relative_to(folders))
            zipped.write(
                folders / "masks" / file.relative_to(folders / "images"),
                f"masks/{file.relative_to(folders / 'images')}",
            )
    for path in (folders, archive):
        data = config(path, masks="masks", val_split="", val_share=0.5)
        train, val = (open_source(data, split) for split in ("train", "val"))
        assert sorted((*train.names, *val.names)) == ["train/a/1.png", "train/a/2.png", "train/b/1.png", "val/é.png"]
        assert len(train) and len(val)
        np.testing.assert_array_equal(train[0]["image"], photo(seed=["a/1", "a/2", "b/1"].index(train.names[0][6:9])))


def test_a_bucket_serves_as_well(bucket, folders):
    for file in folders.rglob("*.png"):
        storage.write_bytes(f"{bucket}/{file.relative_to(folders)}", file.read_bytes())
    source = open_source(config(bucket, masks="masks", depths="depth"), "train")
    assert source.names == ("a/1.png", "a/2.png", "b/1.png")
    np.testing.assert_array_equal(source[2]["segmentation"], mask(seed=2))
    with pytest.raises(UserError, match="'mask/train'"):
        open_source(config(bucket, masks="mask"), "train")


def test_files_without_their_counterpart_are_left_out_in_one_line(folders, caplog):
    save(folders / "images/train/alone.jpg", photo())
    save(folders / "masks/train/lost.png", mask())
    with caplog.at_level(logging.WARNING):
        source = open_source(config(folders, masks="masks"), "train")
    assert len(source) == 3
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "alone.jpg" in lines[0] and "no mask" in lines[0] and "lost.png" in lines[1]


def test_what_is_missing_is_named(folders):
    for fields, message in (
        ({}, r"config\.data\.masks"),
        ({"masks": "mask"}, r"'mask/train'.*'images' and 'mask'"),
        ({"masks": "depth", "depths": "masks", "images": "image"}, r"'image/train'"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(config(folders, **fields), "train")
    with pytest.raises(UserError, match=r"config\.data\.path: name what"):
        open_source(config("", masks="masks"), "train")
    for name in ("1.png", "2.png"):
        (folders / "masks/train/a" / name).unlink()
    (folders / "masks/train/b/1.png").rename(folders / "masks/train/b/2.png")
    with pytest.raises(UserError, match=r"none of 3 images, such as 'a/1.png', has a mask of its name"):
        open_source(config(folders, masks="masks"), "train")


def test_a_mask_of_another_size_serves_and_one_of_other_proportions_is_corrupt(folders):
    save(folders / "masks/train/a/1.png", mask(12, 18))
    save(folders / "masks/train/a/2.png", mask(9, 6))
    source = open_source(config(folders, masks="masks"), "train")
    assert source[0]["segmentation"].shape == (12, 18)
    with pytest.raises(CorruptExample, match=r"a/2\.png: its segmentation is 6 x 9 pixels, the picture 9 x 6"):
        source[1]


def test_ids_outside_the_table_are_corrupt(folders):
    data = config(folders, masks="masks", segments=5)
    assert open_source(data, "train")[0]["segmentation"].max() == 4
    with pytest.raises(CorruptExample, match=r"masks/train/a/1\.png: the id 4 is outside the table of 4 ids"):
        open_source(config(folders, masks="masks", segments=4), "train")[0]


def test_damaged_masks_are_corrupt_examples(folders):
    (folders / "masks/train/a/1.png").write_bytes(b"")
    save(folders / "masks/train/a/2.png", photo())
    source = open_source(config(folders, masks="masks"), "train")
    for index in (0, 1):
        with pytest.raises(CorruptExample, match="masks/train/a"):
            source[index]


def test_coco_ids_are_shifted_and_unlabelled_is_0():
    ids = np.array([[0, 1, 181, 255]], np.uint8)
    np.testing.assert_array_equal(Ids(183, shift=True)(png(ids), "x"), [[1, 2, 182, 0]])
    with pytest.raises(CorruptExample, match="the id 182 is outside"):
        Ids(183, shift=True)(png(ids + (ids == 181)), "x")
    assert len(tables.COCO_STUFF) == 182 and tables.COCO_STUFF[0] == "person" and tables.COCO_STUFF[181] == "wood"
    assert len(tables.ADE20K) == 151 and tables.ADE20K[:4] == ("unknown", "wall", "building", "sky")


@pytest.mark.parametrize(
    "source, images, masks, count",
    [
        ("ade20k", "images/{}", "annotations/{}", 151),
        ("ade20k", "ADEChallengeData2016/images/{}", "ADEChallengeData2016/annotations/{}", 151),
        ("coco_stuff", "{}", "stuffthingmaps/{}", 183),
        ("sflckr", "images/{}", "segmentations/{}", 182),
    ],
)
def test_published_layouts(tmp_path, source, images, masks, count):
    folders = {"ade20k": ("training", "validation"), "coco_stuff": ("train2017", "val2017"), "sflckr": ("train", "val")}
    for k, folder in enumerate(folders[source]):
        save(tmp_path / images.format(folder) / "1.jpg", photo(seed=k))
        save(tmp_path / masks.format(folder) / "1.png", mask(below=count - (source == "coco_stuff"), seed=k))
    for k, split in enumerate(("train", "val")):
        opened = open_source(config(tmp_path, source), split)
        expected = mask(below=count - (source == "coco_stuff"), seed=k).astype(int) + (source == "coco_stuff")
        np.testing.assert_array_equal(opened[0]["segmentation"], expected)
        assert len(opened.tables["segmentation"]) == count
    with pytest.raises(UserError, match="belong"):
        open_source(config(tmp_path / "nowhere", source), "train")


def test_depths_in_floats_fill_the_range_and_grey_ones_are_divided():
    depth = np.array([[200.5, 6000.25], [1000, 3000]], np.float32)
    expected = (depth - 200.5) / (6000.25 - 200.5)
    np.testing.assert_allclose(decode_depth(float_png(depth), "x"), expected, atol=1e-6)
    np.testing.assert_array_equal(decode_depth(float_png(np.full((2, 2), 7.0)), "x"), np.zeros((2, 2)))
    grey = np.array([[0, 65535], [13107, 5]], np.uint16)
    np.testing.assert_allclose(decode_depth(png(grey), "x"), grey / 65535, atol=1e-7)
    np.testing.assert_allclose(decode_depth(png(np.array([[0, 51, 255]], np.uint8)), "x"), [[0, 0.2, 1]], atol=1e-7)
    with pytest.raises(CorruptExample, match="not finite"):
        decode_depth(float_png(np.array([[1, np.nan]])), "x")
    with pytest.raises(CorruptExample, match="in colours"):
        decode_depth(png(photo()), "x")
