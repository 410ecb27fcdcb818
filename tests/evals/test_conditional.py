"""Checks of conditions: a real picture agrees with its own condition, another one does not."""

import numpy as np
import pytest

from vqgan_jax import drawing
from vqgan_jax.data import scenes
from vqgan_jax.evals import conditional
from vqgan_jax.evals.conditional import FROM_PICTURE, LEARNT, ColourTable, PositionReader
from vqgan_jax.images import from_uint8


@pytest.fixture(scope="module")
def examples():
    """Scenes by batch key: 160 to learn from, 40 to check."""
    rendered = [scenes.render(0, index, 32, 32) for index in range(200)]
    most = max(len(e["boxes"]) for e in rendered)
    batch = {key: np.stack([e[key] for e in rendered]) for key in ("image", "segmentation")}
    batch["depth"] = np.stack([e["depth"] for e in rendered])[..., None] * 2 - 1
    batch["keypoints"] = np.stack([from_uint8(drawing.keypoints(e["keypoints"], 32, 32)) for e in rendered])
    for key, empty in (("boxes", 0), ("box_classes", -1)):
        rows = [np.pad(e[key], [(0, most - len(e[key])), *[(0, 0)] * (e[key].ndim - 1)], constant_values=empty)
                for e in rendered]  # fmt: skip
        batch[key] = np.stack(rows)
    return tuple({key: x[part] for key, x in batch.items()} for part in (slice(0, 160), slice(160, 200)))


@pytest.mark.parametrize(
    "key,attainable,wrong",
    [("segmentation", 0.8, 0.75), ("depth", 0.82, 0.75), ("keypoints", 0.85, 0.75), ("boxes", 0.8, 0.6)],
)
def test_real_pictures_show_their_own_condition(examples, key, attainable, wrong):
    learnt, held_out = examples
    check = LEARNT[key].make({name: learnt[name] for name in ("image", *LEARNT[key].keys)})
    asked = {name: held_out[name] for name in LEARNT[key].keys}
    (right,) = check(held_out["image"], asked).values()
    (shuffled,) = check(np.roll(held_out["image"], 1, axis=0), asked).values()
    assert right.shape == (40,) and np.nanmean(right) > attainable
    assert np.nanmean(shuffled) < wrong


def test_pictures_are_counted_part_by_part(examples, monkeypatch):
    learnt, held_out = examples
    by_parts = {key: LEARNT[key].make(learnt)(held_out["image"], held_out) for key in LEARNT}
    monkeypatch.setattr(conditional, "_ROWS", len(learnt["image"]))
    for key, parts in by_parts.items():
        for name, whole in LEARNT[key].make(learnt)(held_out["image"], held_out).items():
            np.testing.assert_allclose(parts[name], whole, rtol=1e-6)


def test_what_asks_for_nothing_has_no_measure(examples):
    learnt, held_out = examples
    none = {key: x.copy() for key, x in held_out.items()}
    none["box_classes"][0], none["keypoints"][0], none["depth"][0] = -1, -1, 1
    for key, other in (("boxes", "found"), ("keypoints", "found"), ("depth", "order")):
        found = LEARNT[key].make(learnt)(held_out["image"], none)[other]
        assert np.isnan(found[0]) and np.isfinite(found[1:]).all()


def test_boxes_of_a_larger_picture_are_looked_for_in_the_crop(examples):
    learnt, held_out = examples
    check = LEARNT["boxes"].make(learnt)
    whole = check(held_out["image"], held_out)["found"]
    crop = np.tile(np.float32([0.5, 0.25, 0.5, 0.5]), (40, 1))
    outer = np.concatenate([held_out["boxes"][..., :2] * 0.5 + crop[:, None, :2], held_out["boxes"][..., 2:] * 0.5], -1)
    cropped = check(held_out["image"], held_out | {"boxes": outer, "crop_box": crop})["found"]
    np.testing.assert_allclose(cropped, whole, atol=0.13)
    assert np.mean(cropped == whole) > 0.9


def test_measures_of_equal_and_of_unequal_conditions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (3, 8, 8))
    assert conditional.pixel_agreement(labels, labels)["agreement"].tolist() == [1, 1, 1]
    half = labels.copy()
    half[:, :4] += 1
    assert conditional.pixel_agreement(half, labels)["agreement"].tolist() == [0.5] * 3
    pictures = rng.uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
    same = FROM_PICTURE["low_res"](pictures, pictures)
    assert same["l1"].tolist() == [0, 0] and same["psnr"].tolist() == [100, 100]
    moved = FROM_PICTURE["low_res"](pictures + 0.2, pictures)
    np.testing.assert_allclose(moved["l1"], 0.2, rtol=1e-5)
    np.testing.assert_allclose(moved["psnr"], 10 * np.log10(4 / 0.04), rtol=1e-5)


def test_edges_overlap():
    edges = -np.ones((4, 4, 4, 1))
    edges[0, 0], edges[1, 0], edges[3, 0] = 1, 1, 1
    asked = -np.ones((4, 4, 4, 1))
    asked[0, 0], asked[1, :2], asked[3, 1] = 1, 1, 1
    found = FROM_PICTURE["edges"](edges, asked)
    np.testing.assert_allclose(found["f1"], [1, 2 / 3, 1, 0])
    np.testing.assert_allclose(found["f1_near"], [1, 1, 1, 1])
    far = FROM_PICTURE["edges"](edges, np.roll(asked, 2, axis=1))
    assert found["f1_near"][3] > far["f1_near"][3] == 0


def test_depth_order_is_of_pairs_in_a_row():
    asked = np.tile(np.linspace(-1, 1, 8), (1, 4, 1))
    order = lambda guess: conditional.depth_order(guess, asked)["order"].item()  # noqa: E731
    assert order(asked**3) == 1 and order(-asked) == 0 and order(0 * asked) == 0.5
    by_row = np.tile(np.linspace(-1, 1, 4)[:, None], (1, 1, 8))  # knows how height goes with depth, and no more
    assert order(by_row) == 0.5


def test_filled_parts_are_compared_by_colour():
    originals = np.full((2, 4, 4, 3), 100, np.uint8)
    given = np.zeros((2, 4, 4), bool)
    given[:, :2] = True
    pictures = originals.copy()
    pictures[:, :2] = 0  # given: does not count
    pictures[1, 2:] = 110
    assert conditional.filled_colour(pictures, originals, given).tolist() == [0, 10]


def test_a_colour_never_seen_takes_the_nearest():
    pictures = np.zeros((1, 1, 2, 3), np.uint8)
    pictures[0, 0, 1] = 250
    new = np.array([[[[40, 30, 20], [200, 230, 255]]]], np.uint8)
    assert ColourTable.of_labels(pictures, np.array([[[3, 7]]]))(new).tolist() == [[[3, 7]]]
    assert ColourTable.of_means(pictures, np.array([[[-0.5, 0.25]]]))(new).tolist() == [[[-0.5, 0.25]]]


def test_a_transform_derives_its_key_again():
    def transform(example, rng):
        return {"low_res": example["image"][::2, ::2].astype(np.float32) / 127.5 - 1}

    pictures = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    derive = conditional.from_transform(transform, "low_res")
    check = conditional.check_of_picture("low_res", derive)
    assert derive(pictures).shape == (2, 2, 2, 3)
    assert check(pictures, {"low_res": derive(pictures)})["psnr"].tolist() == [100, 100]


def test_a_crop_tells_its_height_in_the_picture(examples):
    learnt, held_out = examples
    rng = np.random.default_rng(0)

    def crops(pictures):
        corners = rng.integers(0, 17, (len(pictures), 2))
        cut = np.stack([p[y : y + 16, x : x + 16] for p, (y, x) in zip(pictures, corners, strict=True)])
        return cut, (corners + 8) / 32

    reader = PositionReader(*crops(np.tile(learnt["image"], (4, 1, 1, 1))))
    cut, centres = crops(held_out["image"])
    error = np.abs(reader(cut) - centres)[:, 0].mean()
    assert error < 0.6 * np.abs(centres[:, 0] - np.roll(centres[:, 0], 1)).mean()
