"""The embedded landscapes: pure in (seed, index), alike at any size, and with a ground truth that fits the picture."""

from collections import Counter

import numpy as np
import pytest

from vqgan_jax.data import scene_points
from vqgan_jax.data.scenes import BOX_CLASSES, CLASSES, SEGMENTATION_CLASSES, SEGMENTATION_PALETTE, render
from vqgan_jax.data.transforms import View, sample_keypoints

SKY, CLOUD, FAR, NEAR, MEADOW, LAKE = map(
    SEGMENTATION_CLASSES.index, ("sky", "cloud", "far_ridge", "near_ridge", "meadow", "lake")
)

GOLDEN_LABELS = ["winter_lake", "night_lake", "winter_meadow", "night_lake", "sunset_meadow", "night_meadow"]
GOLDEN_BOXES = [
    {"cloud": 3, "tree": 2},
    {"moon": 1, "cloud": 3, "house": 1, "tree": 3},
    {"cloud": 4, "tree": 2},
    {"moon": 1, "cloud": 1, "tree": 3, "house": 1},
    {"sun": 1, "cloud": 1, "tree": 3, "house": 1},
    {"moon": 1, "cloud": 2, "tree": 2, "house": 1},
]
# Mean colours of the four quarters, in reading order.
GOLDEN_MEANS = [
    [192.53, 205.76, 218.59, 202.96, 214.87, 225.54, 168.86, 189.06, 204.78, 194.13, 210.55, 220.87],
    [36.52, 55.07, 93.59, 64.92, 82.08, 109.79, 25.94, 51.82, 64.50, 32.32, 51.55, 76.47],
    [194.93, 209.09, 216.99, 181.56, 198.61, 207.43, 195.64, 206.14, 211.29, 211.52, 220.43, 227.44],
    [66.04, 76.86, 102.28, 34.86, 48.50, 83.88, 29.06, 49.73, 75.71, 35.46, 53.80, 64.70],
    [140.52, 104.55, 124.55, 160.96, 132.66, 136.47, 106.18, 88.59, 58.05, 103.04, 82.95, 58.55],
    [36.52, 53.53, 86.31, 59.52, 72.87, 99.69, 37.41, 59.89, 65.20, 26.74, 63.31, 65.93],
]


@pytest.fixture(scope="module")
def scenes():
    return [render(11, index) for index in range(480)]


def pixel_box(box, height=64, width=64):
    x, y, w, h = box * np.array([width, height, width, height])
    return round(x), round(y), round(x + w), round(y + h)  # left, top, right, bottom


def block_means(image, size):
    side = image.shape[0] // size
    return image.reshape(size, side, size, side, 3).mean((1, 3))


def seen(scene, name):
    return int((scene["box_classes"] == BOX_CLASSES.index(name)).sum())


def test_constants_agree():
    assert len(CLASSES) == len(set(CLASSES)) == 8
    assert set(BOX_CLASSES) <= set(SEGMENTATION_CLASSES)
    assert SEGMENTATION_PALETTE.shape == (len(SEGMENTATION_CLASSES), 3) and SEGMENTATION_PALETTE.dtype == np.uint8
    assert len(np.unique(SEGMENTATION_PALETTE, axis=0)) == len(SEGMENTATION_CLASSES)


@pytest.mark.parametrize("size", [(64, 64), (37, 91), (91, 37), (64, 512), (256, 256), (8, 8), (1, 1), (2, 300)])
def test_any_size_keeps_the_contract(size):
    for index in range(8):
        scene = render(3, index, *size)
        n, points = len(scene["boxes"]), 6 + 2 * scene_points.slots(size[1] / size[0])
        shapes = {key: (value.shape, value.dtype.name) for key, value in scene.items() if key != "label"}
        assert shapes == {
            "image": ((*size, 3), "uint8"),
            "segmentation": (size, "uint8"),
            "depth": (size, "float32"),
            "boxes": ((n, 4), "float32"),
            "box_classes": ((n,), "int32"),
            "keypoints": ((points, 3), "float32"),
            "keypoints_mirrored": ((points,), "int32"),
        }
        assert type(scene["label"]) is int and 0 <= scene["label"] < len(CLASSES)
        assert scene["image"].flags.c_contiguous
        assert scene["segmentation"].max() < len(SEGMENTATION_CLASSES)
        assert scene["depth"].min() >= 0 and scene["depth"].max() <= 1
        x, y, w, h = scene["boxes"].T
        assert (x >= 0).all() and (y >= 0).all() and (w > 0).all() and (h > 0).all()
        assert (x + w <= 1 + 1e-6).all() and (y + h <= 1 + 1e-6).all()
        assert np.isin(scene["box_classes"], range(len(BOX_CLASSES))).all()


def test_a_scene_depends_on_seed_and_index_alone(scenes):
    for index in (479, 5, 0):
        again = render(11, index)
        for key, value in scenes[index].items():
            np.testing.assert_array_equal(again[key], value, key)
    assert not np.array_equal(render(12, 5)["image"], scenes[5]["image"])
    assert not np.array_equal(render(5, 11)["image"], scenes[5]["image"])


def test_no_two_images_are_alike(scenes):
    means = np.stack([block_means(scene["image"], 8).ravel() for scene in scenes])
    squares = (means**2).sum(1)
    distance = squares[:, None] + squares - 2 * means @ means.T + np.diag(np.full(len(means), np.inf))
    assert np.sqrt(distance.min() / means.shape[1]) > 3  # of 255, root mean square at 8x8


def test_labels_are_balanced_and_free_of_the_index():
    labels = np.array([render(0, index, 4, 4)["label"] for index in range(1600)])
    counts = np.bincount(labels, minlength=8)
    assert counts.min() > 150 and counts.max() < 250  # 200, give or take 3.8 standard deviations
    assert (np.bincount(labels[::8], minlength=8) > 0).all()


def test_the_same_scene_at_another_resolution():
    for index in range(12):
        small, large = render(4, index), render(4, index, 256, 256)
        assert small["label"] == large["label"]
        assert np.abs(block_means(large["image"], 64) - small["image"]).mean() < 1.5
        agree = large["segmentation"][2::4, 2::4] == small["segmentation"]
        assert agree.mean() > 0.96
        assert np.abs(large["depth"][2::4, 2::4] - small["depth"])[agree].mean() < 0.01


def test_edges_are_soft_by_one_pixel_at_any_resolution():
    for index in range(8):
        for size in (64, 256):
            image = render(4, index, size, size)["image"].astype(np.int32)
            one, three = (np.abs(image[step:] - image[:-step]).max() for step in (1, 3))
            assert one > 0.4 * three  # not blurred over three pixels


def test_a_wide_picture_shows_more_land_under_one_sun():
    wide = [render(6, index, 32, 256) for index in range(24)]
    square = [render(6, index, 32, 32) for index in range(24)]
    for name in ("tree", "cloud"):
        assert sum(seen(scene, name) for scene in wide) > 4 * sum(seen(scene, name) for scene in square)
    assert max(seen(scene, "sun") + seen(scene, "moon") for scene in wide) == 1


def test_sun_and_moon_follow_the_class(scenes):
    orbs = {"noon": (1, 0), "sunset": (1, 0), "night": (0, 1), "winter": (0, 0)}
    for scene in scenes:
        time = CLASSES[scene["label"]].split("_")[0]
        assert (seen(scene, "sun"), seen(scene, "moon")) == orbs[time]


def test_a_lake_is_in_the_lake_classes_alone(scenes):
    for scene in scenes:
        share = (scene["segmentation"] == LAKE).mean()
        assert share > 0.04 if CLASSES[scene["label"]].endswith("lake") else share == 0


def test_boxes_hold_the_pixels_of_their_class(scenes):
    for scene in scenes:
        for box_class, name in enumerate(BOX_CLASSES):
            pixels = scene["segmentation"] == SEGMENTATION_CLASSES.index(name)
            covered = np.zeros_like(pixels)
            for box in scene["boxes"][scene["box_classes"] == box_class]:
                left, top, right, bottom = pixel_box(box)
                inside = pixels[top:bottom, left:right]
                covered[top:bottom, left:right] = True
                for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                    assert edge.any(), f"a box of {name} is larger than what it holds"
            assert not (pixels & ~covered).any(), f"{name} outside its boxes"


def test_depth_goes_by_the_order_of_things(scenes):
    for scene in scenes:
        segmentation, depth = scene["segmentation"], scene["depth"]
        orb = np.isin(segmentation, [SEGMENTATION_CLASSES.index(name) for name in ("sun", "moon")])
        assert (depth[(segmentation == SKY) | orb] == 1).all()
        assert (depth[segmentation != SKY][~orb[segmentation != SKY]] < 1).all()
        previous = 1.0
        for layer in (CLOUD, FAR, NEAR):
            if (segmentation == layer).any():
                assert depth[segmentation == layer].max() < previous
                previous = depth[segmentation == layer].min()
        land = np.isin(segmentation, (MEADOW, LAKE))
        assert depth[land].max() < previous
        rows = np.array([depth[y][land[y]].mean() for y in range(64) if land[y].any()])
        assert (np.diff(rows) < 1e-6).all() and rows[-1] < 0.02  # the ground comes nearer towards the lower edge


def test_sky_is_above_and_ground_below(scenes):
    for scene in scenes:
        segmentation = scene["segmentation"]
        assert (segmentation[0] == SKY).any()
        assert not np.isin(segmentation[44:], (SKY, CLOUD, FAR, NEAR)).any()
        assert not np.isin(segmentation[:28], (MEADOW, LAKE)).any()


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_trees_and_houses_stand_on_the_ground(scenes):
    heights = []
    for scene in scenes:
        standing = np.isin(scene["box_classes"], [BOX_CLASSES.index(name) for name in ("tree", "house")])
        boxes = [pixel_box(box) for box in scene["boxes"][standing]]
        for box in boxes:
            left, top, right, bottom = box
            if bottom == 64 or any(overlap(box, other) for other in boxes if other is not box):
                continue  # the foot cannot be seen
            heights.append(bottom - top)
            assert np.isin(scene["segmentation"][bottom, left:right], (MEADOW, LAKE)).mean() > 0.5
            foot = scene["depth"][bottom - 1, left:right].min()  # as far off as the ground it stands on
            assert abs(foot - scene["depth"][bottom, left:right].max()) < 0.05
    assert len(heights) > 400 and np.median(heights) > 12


def test_key_points_stand_on_their_things(scenes):
    names = scene_points.names(slots=4)
    seen = np.zeros(len(names))
    for scene in scenes:
        points = scene["keypoints"]
        assert len(points) == len(names) and not points[points[:, 2] == 0].any()
        assert ((points[:, :2] >= 0) & (points[:, :2] <= 1)).all()
        seen += points[:, 2]
        slots = points[6:10]
        assert (np.floor(slots[slots[:, 2] > 0, 0] * 4) == np.flatnonzero(slots[:, 2])).all()  # left to right
        for slot, kind, fraction in [(k, "tree", 0.3) for k in range(4)] + [(5, "house", 0.3)]:
            top = points[slot + 6 if kind == "tree" else slot]
            foot = points[slot + 10] if kind == "tree" else np.where(points[3, 2] > 0, points[3], points[4])
            if top[2] and foot[2]:  # a part of the way down from its top there is the thing itself
                x, y = top[0], top[1] + fraction * (foot[1] - top[1])
                assert SEGMENTATION_CLASSES[scene["segmentation"][int(y * 64), int(min(x, 0.999) * 64)]] == kind
                boxes = scene["boxes"][scene["box_classes"] == BOX_CLASSES.index(kind)]
                assert (np.abs(boxes[:, 1] - top[1]) < 0.05).any() or kind == "tree"  # another may hide its top
    assert (seen > 0.3 * len(scenes)).all()


def test_key_points_change_sides_in_a_mirrored_picture(scenes):
    for scene in scenes[:40]:
        points, mirrored = scene["keypoints"], scene["keypoints_mirrored"]
        assert (mirrored[mirrored] == np.arange(len(mirrored))).all()
        view = View(0, 0, 64, 64, flip=True)
        moved = sample_keypoints(points, mirrored, view, 64, 64)
        assert moved[:, 2].sum() == points[:, 2].sum()
        trees = moved[6:10]
        assert (np.floor(trees[trees[:, 2] > 0, 0] * 4) == np.flatnonzero(trees[:, 2])).all()  # still left to right
        if points[3:5, 2].all():
            assert moved[3, 0] < moved[4, 0]
        np.testing.assert_allclose(sample_keypoints(moved, mirrored, view, 64, 64), points, atol=1e-6)


def test_the_classes_can_be_told_apart(scenes):
    features = np.stack([block_means(scene["image"], 8).ravel() / 255 for scene in scenes])
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    labels = np.array([scene["label"] for scene in scenes])
    train, test = slice(0, 360), slice(360, None)
    gram = features[train].T @ features[train] + 0.3 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[train].T @ np.eye(8)[labels[train]])
    assert (np.argmax(features[test] @ weights, 1) == labels[test]).mean() > 0.95  # of a linear classifier


def test_the_data_set_has_not_changed():
    """Labels, boxes and coarse colours of the first scenes; a change here makes every trained model's figures stale."""
    scenes = [render(0, index) for index in range(6)]
    assert [CLASSES[scene["label"]] for scene in scenes] == GOLDEN_LABELS
    assert [dict(Counter(BOX_CLASSES[k] for k in scene["box_classes"])) for scene in scenes] == GOLDEN_BOXES
    means = np.stack([block_means(scene["image"], 2) for scene in scenes]).reshape(6, 12)
    np.testing.assert_allclose(means, GOLDEN_MEANS, atol=0.1)
