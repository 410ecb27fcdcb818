"""What a job is asked for: which condition picture i has, what is given of it, and the record that tells jobs apart."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.request import models
from vqgan_jax.config import UserError
from vqgan_jax.data.scenes_source import ScenesSource
from vqgan_jax.request import request as request_module
from vqgan_jax.request.completion import open_masks
from vqgan_jax.request.flags import Asked
from vqgan_jax.request.request import Request
from vqgan_jax.sampling.large import LargeOptions
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.trained_transformer import TrainedTransformer

GRID, SIZE = models.GRID, models.SIZE


@pytest.fixture(scope="module")
def trained():
    return functools.cache(models.untrained)


def asked(**fields) -> Asked:
    return Asked(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def test_files_are_taken_in_turn_each_for_so_many_pictures(trained, masks):
    request = Request(asked(condition=[str(masks)], each=2), trained("segmentation"), GRID)
    assert request.number == 6 and request.count == 3
    rows = request.rows(np.array([0, 1, 2, 5, 6, 7]))
    assert list(rows) == ["segmentation"] and rows["segmentation"].dtype == np.int32
    assert rows["segmentation"][:, 0, 0].tolist() == [0, 0, 1, 2, 0, 0]
    larger = Request(asked(condition=[str(masks)]), trained("segmentation"), (9, 12))
    assert larger.encodes and not request.encodes  # those of the trained size are encoded as in training
    assert request.record["each"] == 2 and request.record["condition"]["segmentation"]["files"] == 3
    assert request.arrays()["segmentation"].shape == (6, SIZE, SIZE)


def test_each_row_is_read_once_for_the_arrays_and_many_pictures_not_at_all(trained, masks, monkeypatch):
    fields = dict(condition=[f"segmentation={masks}"], classes=["3", "5"], number=14, each=2)
    opened = Request(asked(**fields), trained("class_segmentation"), GRID)
    expected = opened.rows(np.arange(14))
    read, source = [], opened.parts[1][1]
    take = source.row
    monkeypatch.setattr(source, "row", lambda j: read.append(j) or take(j))
    found = opened.arrays()
    assert set(found) == {"label", "segmentation"} and sorted(read) == [0, 0, 1, 2]  # the first also for its size
    for key, x in found.items():
        np.testing.assert_array_equal(x, expected[key])
        assert x.dtype == expected[key].dtype
    monkeypatch.setattr(request_module, "_READ_AGAIN", 2)
    assert set(opened.arrays()) == {"label"}


def test_points_are_as_many_as_those_of_the_data(trained, tmp_path):
    known = len(ScenesSource.tables["keypoints"])
    for count, name in ((known, "right"), (known + 1, "wrong")):
        (tmp_path / f"{name}.json").write_text(json.dumps([[0.5, 0.5]] * count))
    assert Request(asked(condition=[str(tmp_path / "right.json")]), trained("keypoints"), GRID).count == 1
    with pytest.raises(UserError, match=f"wrong.json: holds {known + 1} points, the model's data have {known}"):
        Request(asked(condition=[str(tmp_path / "wrong.json")]), trained("keypoints"), GRID)


def test_each_part_has_its_own_source(trained, masks):
    model = trained("class_segmentation")
    request = Request(asked(condition=[f"segmentation={masks}"], classes=["3", "noon_lake"]), model, GRID)
    rows = request.rows(np.arange(4))
    noon = models.scenes.CLASSES.index("noon_lake")
    assert rows["label"].tolist() == [3, noon, 3, noon] and rows["segmentation"][:, 0, 0].tolist() == [0, 1, 2, 0]
    assert request.count == 6 and request.number == 3
    # A label that nothing is said of is that of the example which the rest is of.
    held_out = Request(asked(), model, GRID)
    assert held_out.number == 16 and held_out.count == 6
    found = held_out.row(2)
    examples = [held_out.parts[0][1]._source[k] for k in range(6)]
    (match,) = [e for e in examples if (e["segmentation"] == found["segmentation"]).all()]
    assert match["label"] == found["label"] and "image" in found
    chosen = Request(asked(condition=["val:4,1"]), model, GRID)
    assert chosen.count == 2
    np.testing.assert_array_equal(chosen.row(1)["segmentation"], examples[1]["segmentation"])
    # Classes in turn, where files alone are named.
    assert Request(asked(condition=[f"segmentation={masks}"]), model, GRID).rows(np.arange(3))["label"].tolist() == [
        0,
        1,
        2,
    ]


def test_the_order_of_examples_does_not_hang_on_how_many_are_asked_for(trained):
    few, many = (Request(asked(number=n), trained("depth"), GRID) for n in (2, 6))
    np.testing.assert_array_equal(few.rows(np.arange(2))["depth"], many.rows(np.arange(2))["depth"])
    assert few.record == many.record
    assert len({many.row(j)["depth"].tobytes() for j in range(6)}) == 6


def test_coordinates_are_the_place_in_the_picture(trained):
    request = Request(asked(), trained("coordinates"), (4, 8))
    coords = request.rows(np.arange(1))["coords"]
    assert coords.shape == (1, 16, 32, 2) and coords[0, 0, -1, 1] == pytest.approx(31.5 / 32)
    model = models.untrained("coordinates")
    model.record["config"]["data"]["resize_to"] = 32  # of which training sees crops
    coords = Request(asked(), model, GRID).rows(np.arange(1))["coords"]
    assert coords[0, 0, 0].tolist() == [8.5 / 32, 8.5 / 32]


def test_a_layout_of_a_file_is_of_the_place_that_coordinates_tell(tmp_path):
    """Of a model of crops the middle of one: the boxes of the drawn picture are told as training tells them."""
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps([{"class": 1, "box": [0, 0.5, 1, 0.5]}]))
    model = models.untrained("objects")
    for resize_to, crop, box in (
        (0, [0, 0, 1, 1], [0, 0.5, 1, 0.5]),
        (32, [0.25, 0.25, 0.5, 0.5], [0.25, 0.5, 0.5, 0.25]),
    ):
        model.record["config"]["data"]["resize_to"] = resize_to
        rows = Request(asked(condition=[str(file)]), model, GRID).rows(np.arange(1))
        assert rows["crop_box"].tolist() == [crop] and rows["boxes"][0, 0].tolist() == box
    rows = Request(asked(condition=[str(file)]), model, (4, 8)).rows(np.arange(1))
    assert rows["crop_box"].tolist() == [[0, 0, 1, 1]]  # beyond the trained size


def test_conditions_beyond_the_trained_size_are_of_the_whole_picture(trained):
    rows = Request(asked(), trained("segmentation"), (4, 8)).rows(np.arange(2))
    assert rows["segmentation"].shape == (2, 16, 32)
    rows = Request(asked(), trained("objects"), (4, 8)).rows(np.arange(2))
    assert rows["crop_box"].tolist() == [[0, 0, 1, 1]] * 2 and (rows["box_classes"] >= 0).any()


@pytest.mark.parametrize(
    "condition, fields, message",
    [
        ("none", dict(condition=["val"]), "--condition: this model is unconditional"),
        ("none", dict(classes=["1"]), "--classes: this model is unconditional"),
        ("none", dict(mask="upper"), "--mask, --paste: are of pictures that --given names"),
        ("none", dict(given="nowhere/at/all"), "--given: there is no file"),
        ("none", dict(given="val", mask="uper"), "no region, did you mean 'upper'"),
        ("none", dict(given="val", mask="upper:2"), "the share is above 0 and below 1"),
        ("class", dict(classes=["castle"]), "no class 'castle'"),
        ("class", dict(condition=["label=a.png"]), "classes are named with --classes"),
        ("class", dict(condition=["label=val"], classes=["1"]), "a second time"),
        ("segmentation", dict(classes=["1"]), "this model has no classes"),
        ("segmentation", dict(condition=["val:6"]), "the split has the examples 0 to 5"),
        ("segmentation", dict(condition=["segmentatoin=val"]), "did you mean 'segmentation'"),
        ("segmentation", dict(condition=["val", "train"]), "a second time"),
        ("segmentation", dict(condition=["missing.png"]), "there is no file"),
        ("segmentation", dict(condition=["segmentation="]), "--condition=segmentation=: says no source"),
    ],
)
def test_mistakes_name_the_flag(trained, condition, fields, message):
    with pytest.raises(UserError, match=message) as error:
        Request(asked(**fields), trained(condition), GRID)
    assert "\n" not in str(error.value) and str(error.value).startswith("--")


def test_an_imported_model_needs_files(masks):
    model = models.untrained("segmentation")
    del model.record["config"]["data"]
    with pytest.raises(UserError, match="an imported model names no data set; give files"):
        Request(asked(), model, GRID)
    assert Request(asked(condition=[str(masks)]), model, GRID).count == 3


def test_a_data_set_that_was_moved_is_found_where_it_lies_now(tmp_path):
    model = models.untrained("class")
    model.record["config"]["data"] |= dict(source="folder", path="/gone", val_split="val")
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / split / "one" / "0.png")
    with pytest.raises(UserError, match="config.data.path"):
        Request(asked(condition=["val"]), model, GRID)
    assert Request(asked(condition=["val"], data=str(tmp_path)), model, GRID).rows(np.arange(1))["label"].tolist() == [
        0
    ]


@pytest.mark.parametrize(
    "text, kept",
    [
        ("lower", ["1111", "1111", "0000", "0000"]),
        ("upper:0.25", ["0000", "1111", "1111", "1111"]),
        ("left", ["0011"] * 4),
        ("right:0.3", ["1100"] * 4),  # 5 of 16 pixels: a code of which one pixel is anew is not kept
        ("center", ["1111", "1001", "1001", "1111"]),
    ],
)
def test_regions_on_the_grid_of_codes(trained, text, kept):
    request = Request(asked(given="val", mask=text), trained("none"), GRID)
    expected = [[letter == "1" for letter in row] for row in kept]
    np.testing.assert_array_equal(request.rows(np.arange(1))["given"][0], expected)
    whole = [all(row) for row in expected]
    assert request.leading == 4 * (whole.index(False) if False in whole else 4)


def test_a_mask_of_pixels_keeps_codes_that_are_given_whole(trained, tmp_path):
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[7, 9] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    masks = open_masks(str(tmp_path / "mask.png"), trained("none").model, (SIZE, SIZE))
    anew = masks.anew(0)
    assert anew.shape == (SIZE, SIZE) and anew.sum() == 1 and anew[7, 9] and masks.record["files"] == 1
    request = Request(asked(given="val", mask=str(tmp_path / "mask.png")), trained("none"), GRID)
    given = request.rows(np.arange(1))["given"][0]
    assert given.sum() == 15 and not given[1, 2]
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "black.png")
    Image.new("L", (SIZE, SIZE), "white").save(tmp_path / "white.png")
    for name, message in (("black", "nothing of the picture is made anew"), ("white", "keeps no code")):
        with pytest.raises(UserError, match=message):
            Request(asked(given="val", mask=str(tmp_path / f"{name}.png")), trained("none"), GRID)


def test_given_pixels_are_pasted_back(trained):
    request = Request(asked(given="val", mask="right", paste=True), trained("none"), GRID)
    made = np.zeros((SIZE, SIZE, 3), np.uint8)
    pasted = request.finished(1, made)
    original = np.rint((request.row(1)["image"] + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(pasted[:, :8], original[:, :8])
    assert not pasted[:, 8:].any()
    plain = Request(asked(given="val", mask="right"), trained("none"), GRID)
    np.testing.assert_array_equal(plain.finished(1, made), made)


def ids_drawn(model, request, grid, monkeypatch, **settings) -> np.ndarray:
    """The codes that pictures are decoded from."""
    found = []
    tokens, draw, decode = model._programs
    spied = (tokens, lambda *a, **k: found.append(draw(*a, **k)) or found[-1], decode)
    monkeypatch.setitem(vars(model), "_programs", spied)

    def keep(self, shape, mesh, large):
        return lambda ids: found.append(ids) or np.zeros((*ids.shape, 3), np.float32)

    monkeypatch.setattr(TrainedTransformer, "_large_decoder", keep)
    list(model.samples(request.rows, grid, indices=np.arange(6), leading=request.leading, **settings))
    monkeypatch.undo()
    return np.concatenate([np.asarray(ids) for ids in found])[:6]


@pytest.mark.parametrize("grid", [GRID, pytest.param((4, 6), marks=pytest.mark.slow)])
def test_given_codes_are_kept_and_the_others_drawn(trained, monkeypatch, grid):
    model = trained("none")
    request = Request(asked(given="val", mask="center", each=2), model, grid)
    settings = dict(seed=3, batch=8, strategy=Strategy(), large=LargeOptions(stride=2))
    drawn = ids_drawn(model, request, grid, monkeypatch, **settings)
    rows = request.rows(np.arange(6))
    codes, given = jax.jit(model.model.given)(model.frozen, rows)
    np.testing.assert_array_equal(np.where(given, drawn, 0), np.where(given, codes, 0))
    assert len(np.unique(codes)) > 4 and 0 < given.mean() < 1
    assert (drawn[0] != drawn[1]).any()  # of one picture, with two seeds
