"""The sheet shows what the model is fed, and what is printed is true."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import common
from vqgan_jax import drawing
from vqgan_jax.config import UserError
from vqgan_jax.data import scenes
from vqgan_jax.images import from_uint8, to_uint8
from vqgan_jax.tools import show

ROOT = Path(__file__).parents[2]
SHOWN = show.Shown(scenes.CLASSES, {"segmentation": scenes.SEGMENTATION_CLASSES, "box_classes": scenes.BOX_CLASSES})


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(show, "_MEASURED", 16)


@pytest.fixture
def config():
    config = common.vqgan()
    config.data = common.data("scenes")
    config.data.train_examples, config.data.val_examples, config.data.image_size = 20, 6, 16
    config.data.threads = 1
    return config


def row(size=224):
    scene = scenes.render(0, 1, size, size)
    crop = np.float32([0.5, 0.5, 0.5, 0.5])
    return {"image": from_uint8(scene["image"]), "segmentation": scene["segmentation"].astype(np.int32)} | {
        "depth": scene["depth"][..., None] * 2 - 1,
        "label": np.int32(scene["label"]),
        "boxes": np.float32([[0.5, 0.5, 0.25, 0.25]]),
        "box_classes": np.int32([2]),
        "crop_box": crop,
    }


def test_cells_are_the_picture_its_map_and_both_over_each_other():
    one = row()
    drawn = show.draw({key: one[key] for key in ("image", "segmentation", "label")}, SHOWN)
    picture, colours = to_uint8(one["image"]), drawing.segmentation(one["segmentation"])
    cell = 224 + 2
    np.testing.assert_array_equal(drawn[:224, :224], picture)
    np.testing.assert_array_equal(drawn[:224, cell : cell + 224], colours)
    both = drawn[:224, 2 * cell : 2 * cell + 224].astype(int)
    assert np.abs(both - (picture.astype(int) + colours) / 2).max() <= 1
    assert drawn[224:, :224].min() < 100  # the label's name


def test_boxes_of_a_crop_are_drawn_where_they_are_seen():
    one = row()
    inside = {key: one[key] for key in ("image", "boxes", "box_classes")}
    edge = drawing.palette(3)[2]

    def extent(drawn):
        found = (drawn[:448, 226:] == edge).all(-1)
        return [np.flatnonzero(found.any(axis))[[0, -1]].tolist() for axis in (0, 1)]

    whole, cropped = (extent(show.draw(keys, SHOWN)) for keys in (inside, inside | {"crop_box": one["crop_box"]}))
    np.testing.assert_allclose(whole, [[224, 335], [224, 335]], atol=3)
    np.testing.assert_allclose(cropped, [[0, 223], [0, 223]], atol=3)


def test_depth_and_coords_are_cells_of_their_own():
    one = row()
    places = np.random.default_rng(0).random((224, 224, 2), np.float32)
    edges = np.where(places[..., :1] > 0.8, np.float32(1), np.float32(-1))
    others = {"depth": one["depth"], "coords": places, "edges": edges, "low_res": one["image"]}
    drawn = show.draw({"image": one["image"]} | others, SHOWN)
    np.testing.assert_array_equal(drawn[:224, 226:450], drawing.depth(one["depth"]))
    np.testing.assert_array_equal(drawn[:224, 452:676], drawing.coords(places))
    np.testing.assert_array_equal(drawn[:224, 678:902], to_uint8(edges).repeat(3, axis=-1))
    np.testing.assert_array_equal(drawn[:224, 904:1128], to_uint8(one["image"]))


def test_a_sheet_holds_every_row():
    one = row()
    rows = [{"image": np.full((16, 16, 3), level, np.float32)} for level in (-1, -0.5, 0, 0.5, 0.9)]
    sheet = show.sheet(rows, SHOWN)
    for made in rows:
        assert (sheet == to_uint8(made["image"])[0, 0]).all(-1).sum() >= 224 * 224
    assert show.sheet([one], SHOWN).ndim == 3


@pytest.mark.parametrize("split, examples", [("train", 20), ("val", 6)])
def test_what_is_printed_and_written(tmp_path, config, capsys, split, examples):
    out = tmp_path / "new" / "sheet.png"
    out.parent.mkdir()
    show.show(
        config, out=str(out), number=5, split=split, keys=("image", "segmentation", "label", "boxes", "box_classes")
    )
    printed = capsys.readouterr().out
    assert f"{split}: {examples} examples" in printed and "classes      8: " in printed
    assert "16 to 16 wide, 16 to 16 high" in printed and "images/s a core" in printed and "5 examples" in printed
    assert f"crop {'random' if split == 'train' else 'center'}, flip {split == 'train'}" in printed
    line = next(line for line in printed.splitlines() if line.startswith("image  "))
    assert "float32 [16, 16, 3]" in line
    assert Image.open(out).size[0] > 224


def test_validation_rows_are_the_rows_of_evaluation(config):
    source, transform = _opened(config, ("image",), "val")
    rows = list(show.examples(config.data, source, transform, "val", 3))
    for made, index in zip(rows, (0, 2, 4), strict=True):
        np.testing.assert_array_equal(to_uint8(made["image"]), source[index]["image"])


def _opened(config, keys, split):
    source = show.open_source(config.data, split)
    return source, show.Transform.from_config(config.data, keys=keys, classes=8, train=split == "train")


def test_unreadable_files_are_named(tmp_path, config, capsys):
    for n in range(6):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (20, 30)).save(tmp_path / "train" / f"{n}.png")
    (tmp_path / "train" / "2.png").write_bytes(b"")
    config.data.update(source="folder", path=str(tmp_path))
    show.show(config, out=str(tmp_path / "out.png"), number=6, split="train", keys=None)
    printed = capsys.readouterr().out
    assert "unreadable" in printed and "2.png" in printed and "20 to 20 wide, 30 to 30 high" in printed


@pytest.mark.parametrize(
    "condition, keys",
    [
        (dict(name="none"), ("image",)),
        (dict(name="class", classes=8), ("image", "label")),
        (dict(name="image", input_key="depth"), ("image", "depth")),
        (dict(name="coordinates", codes=16, factor=4, scheme="joint"), ("image", "coords")),
        (
            dict(name="objects", kind="boxes", max_objects=3, vocab=100, classes=5, crop=True, flags=(), trim=True),
            ("image", "boxes", "box_classes", "box_flags", "crop_box"),
        ),
        (
            dict(name="joint", b=dict(name="class", classes=8), a=dict(name="image", input_key="edges")),
            ("image", "edges", "label"),
        ),
    ],
)
def test_keys_are_those_of_the_model(config, condition, keys):
    two = common.transformer()
    two.model.condition = condition
    assert show.keys_of(two) == keys
    config.model.input_key = "segmentation"
    assert show.keys_of(config) == ("image", "segmentation")


def test_mistakes_are_one_line(tmp_path, config):
    out = str(tmp_path / "x.png")
    for fields, message in (
        (dict(keys=("imgae",)), "--keys.*'image'"),
        (dict(split="trian"), "--split.*'train'"),
        (dict(number=0), "--number"),
        (dict(keys=("label",)), "nothing of label can be drawn"),
    ):
        with pytest.raises(UserError, match=message):
            show.show(config, **dict(out=out, number=1, split="train", keys=None) | fields)
    Image.new("RGB", (20, 30)).save(tmp_path / "1.png")
    config.data.update(source="folder", path=str(tmp_path), train_split="", val_split="", val_share=0.0)
    with pytest.raises(UserError, match="has no classes"):
        show.show(config, out=out, number=1, split="train", keys=("image", "label"))


def test_the_command_line(tmp_path):
    command = [sys.executable, "-m", "vqgan_jax.tools.show", "--config=configs/demo_vqgan.py:runlocal", "--number=2"]
    command += ["--config.data.image_size=16", f"--out={tmp_path / 'x.png'}", "--split=val"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "val: 16 examples" in done.stdout and (tmp_path / "x.png").is_file()
    done = subprocess.run([*command, "--keys=imag"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "did you mean 'image'" in done.stderr
