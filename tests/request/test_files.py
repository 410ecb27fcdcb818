"""Conditions in files: what each kind of file says, brought to size as the data's transform does, and its mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from vqgan_jax.config import UserError
from vqgan_jax.images import to_uint8
from vqgan_jax.object_tokens import FLAGS
from vqgan_jax.request.files import DERIVED, KINDS, Expected, find
from vqgan_jax.request.sources import FileConditions, centre_transform

SIZE = (16, 24)
NAMES = ["house", "tree", "sun"]
EXPECTED = Expected(SIZE, segments=5, objects=3, names=NAMES, box_classes=4, flags=["group", "inside"])


def opened(path, key, *, kinds=KINDS, expected=EXPECTED) -> FileConditions:
    transform = centre_transform(None, (), 0, expected.size)
    return FileConditions(str(path), key, kinds[key], expected, transform, flag=f"--condition={key}")


def picture(path, pixels) -> None:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def test_a_mask_of_the_right_size_is_taken_as_it_is_and_another_covers_the_size(tmp_path):
    ids = np.random.default_rng(0).integers(0, 5, SIZE)
    picture(tmp_path / "a.png", ids)
    picture(tmp_path / "b.png", np.pad(ids, ((4, 4), (0, 0)), constant_values=4).repeat(2, 0).repeat(2, 1))
    masks = opened(tmp_path, "segmentation")
    assert len(masks) == 2 and masks.name(1) == "b.png"
    for j in range(2):  # of the second, as wide, the middle is cut out
        row = masks.row(j)["segmentation"]
        assert row.dtype == np.int32
        np.testing.assert_array_equal(row, ids)


def test_masks_of_coco_stuff_are_those_of_its_files(tmp_path):
    picture(tmp_path / "a.png", np.where(np.arange(24) < 12, 255, 3)[None].repeat(16, 0))
    shifted = opened(tmp_path, "segmentation", expected=Expected(SIZE, segments=5, unlabelled=True))
    np.testing.assert_array_equal(np.unique(shifted.row(0)["segmentation"]), [0, 4])


def test_pictures_become_what_the_model_takes(tmp_path):
    ramp = np.linspace(0, 255, 24)[None].repeat(16, 0)
    picture(tmp_path / "ramp.png", ramp)
    depth = opened(tmp_path / "ramp.png", "depth").row(0)["depth"]
    assert depth.shape == (*SIZE, 1) and depth[0, 0] == -1 and depth[0, -1] == 1 and (np.diff(depth[3, :, 0]) > 0).all()
    lines = np.zeros((64, 96))
    lines[:, 48:50] = 255  # two of four pixels that become one
    picture(tmp_path / "lines.png", lines)
    edges = opened(tmp_path / "lines.png", "edges").row(0)["edges"]
    assert edges.shape == (*SIZE, 1) and set(np.unique(edges)) == {-1.0, 1.0}
    assert (edges[:, 12] == 1).all() and (edges[:, :10] == -1).all()
    small = np.random.default_rng(0).integers(0, 255, (2, 3, 3))
    picture(tmp_path / "small.png", small)
    low = opened(tmp_path / "small.png", "low_res").row(0)["low_res"]
    expected = np.asarray(Image.fromarray(small.astype(np.uint8)).resize((24, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose((low + 1) * 127.5, expected, atol=1e-3)
    mask = np.zeros(SIZE)
    mask[4:7, 5:] = 255
    picture(tmp_path / "mask.png", mask)
    np.testing.assert_array_equal(opened(tmp_path / "mask.png", "mask").row(0)["mask"], mask > 0)


def test_photographs_are_derived_from_as_the_data_are(tmp_path):
    photo = np.random.default_rng(1).integers(0, 255, (*SIZE, 3))
    photo[:, 12:] //= 8
    picture(tmp_path / "photo.png", photo)
    for key, channels in (("edges", 1), ("low_res", 3)):
        row = opened(tmp_path / "photo.png", key, kinds=DERIVED).row(0)
        transform = centre_transform(None, (key, "image"), 0, SIZE)
        expected = transform({"image": photo.astype(np.uint8)}, np.random.default_rng(0))
        assert row[key].shape == (*SIZE, channels)
        np.testing.assert_array_equal(row[key], expected[key])
        np.testing.assert_array_equal(to_uint8(row["image"]), photo)  # the original, for the sheet


def test_points_are_drawn_and_skeletons_taken(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps([[0.5, 0.5], None, [0.1, 0.2]]))
    one = opened(tmp_path / "one.json", "keypoints")
    drawn = one.row(0)["keypoints"]
    assert len(one) == 1 and drawn.shape == (*SIZE, 3) and (drawn[8, 12] > -1).any() and (drawn[0, 20] == -1).all()
    (tmp_path / "two.json").write_text(json.dumps([[[0.5, 0.5]], [[0.2, 0.2], [0.3, 0.3]]]))
    two = opened(tmp_path / "two.json", "keypoints")
    assert [two.name(j) for j in range(len(two))] == ["two.json:0", "two.json:1"]
    picture(tmp_path / "pose.png", (drawn + 1) * 127.5)
    np.testing.assert_allclose(opened(tmp_path / "pose.png", "keypoints").row(0)["keypoints"], drawn, atol=1 / 127)


def layout(tmp_path, content) -> FileConditions:
    (tmp_path / "boxes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return opened(tmp_path / "boxes.json", "boxes")


def test_layouts_name_classes_boxes_points_and_flags(tmp_path):
    sun = {"class": "sun", "box": [0.5, 0, 0.25, 0.5], "flags": ["inside", "group"]}
    row = layout(tmp_path, [sun, {"class": 3, "point": [0.5, 1]}]).row(0)
    np.testing.assert_allclose(row["boxes"], [[0.5, 0, 0.25, 0.5], [0.5, 1, 0, 0], [0, 0, 0, 0]])
    assert row["box_classes"].tolist() == [2, 3, -1] and row["box_flags"].tolist() == [9, 0, 0]
    assert row["crop_box"].tolist() == [0, 0, 1, 1]
    several = layout(tmp_path, [[sun], [sun | {"class": "tree"}]])
    assert len(several) == 2
    (tmp_path / "boxes.json").unlink()  # it was read once
    assert several.row(1)["box_classes"][0] == 1
    assert layout(tmp_path, [sun | {"flags": "group"}]).row(0)["box_flags"].tolist()[0] == 1 << FLAGS.index("group")


BOX = {"class": "sun", "box": [0, 0, 1, 1]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{]", "boxes.json: is no JSON"),
        ([], "a layout is a list of objects"),
        ({"class": "sun"}, "a layout is a list of objects"),
        ([BOX] * 4, "holds 4 objects, the model takes at most 3"),
        ([{"class": "sun"}], 'has a "class", and a "box" or a "point"'),
        ([BOX | {"colour": 1}], "unknown key 'colour'"),
        ([BOX | {"box": [0, 0, 1]}], "four numbers"),
        ([BOX | {"box": [0.5, 0, 0.6, 1]}], "reaches outside the picture"),
        ([BOX | {"class": "tre"}], "there is no class 'tre', the ids are 0 to 3, did you mean 'tree'"),
        ([BOX | {"class": 4}], "there is no class '4'"),
        ([BOX | {"flags": ["occluded"]}], "knows no flag 'occluded'"),
    ],
)
def test_mistakes_in_a_layout_name_the_file(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        layout(tmp_path, content)
    assert "boxes.json" in str(error.value) and "\n" not in str(error.value)


def test_mistakes_in_pictures_name_the_file(tmp_path):
    picture(tmp_path / "a.png", np.full(SIZE, 5))
    with pytest.raises(UserError, match=r"--condition=segmentation: .*a.png is no segmentation: the id 5 is outside"):
        opened(tmp_path, "segmentation").row(0)
    picture(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (*SIZE, 3)))
    with pytest.raises(UserError, match="a.png is no segmentation: .*colours"):
        opened(tmp_path, "segmentation").row(0)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="a.png is no edges"):
        opened(tmp_path, "edges").row(0)
    (tmp_path / "a.json").write_text("[[0.5, 2]]")
    with pytest.raises(UserError, match="a.json: holds a point outside"):
        opened(tmp_path / "a.json", "keypoints")


def test_files_folders_and_globs_are_found(tmp_path):
    for name in ("b.png", "a.jpg", "in/c.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(text: str) -> list[str]:
        return [path.name for path in find(str(tmp_path / text), (".png", ".jpg"), "--given")]

    assert names("") == ["a.jpg", "b.png", "c.png"]
    assert names("b.png") == ["b.png"] and names("*.png") == ["b.png"] and names("*/*.png") == ["c.png"]
    for text in ("d.png", "*.gif", "*.txt"):
        with pytest.raises(UserError, match="--given: "):
            names(text)


def test_the_hash_is_that_of_the_contents(tmp_path):
    picture(tmp_path / "a.png", np.zeros(SIZE))
    before = opened(tmp_path, "segmentation").record
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert opened(tmp_path, "segmentation").record == before
    picture(tmp_path / "b.png", np.ones(SIZE))
    assert opened(tmp_path, "segmentation").record != before
