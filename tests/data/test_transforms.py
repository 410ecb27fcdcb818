"""Transforms: image, segmentation, depth and boxes are resized, cropped and mirrored as one."""

import dataclasses
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vqgan_jax import drawing
from vqgan_jax.config import UserError
from vqgan_jax.data import scenes, transforms
from vqgan_jax.data.transforms import (
    FILTERS,
    KEYS,
    Transform,
    View,
    choose_view,
    sample_boxes,
    sample_image,
    sample_keypoints,
    sample_segmentation,
)
from vqgan_jax.images import from_uint8
from vqgan_jax.object_tokens import ObjectTokens


def transform(**fields):
    base = Transform(tuple(KEYS), 16, "box", "center", (0.5, 1.0), False, 8, len(scenes.CLASSES), 0, 8)
    return dataclasses.replace(base, **fields)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_shapes_dtypes_and_ranges_for_any_source_size():
    for height, width in ((16, 16), (37, 91), (91, 37), (7, 5)):
        for crop in ("random", "center", "random_resized"):
            example = scenes.render(0, 1, height, width)
            row = transform(crop=crop, flip=True)(example, rng())
            shapes = {key: value.shape for key, value in row.items()}
            pictures = {"image": (16, 16, 3), "segmentation": (16, 16), "depth": (16, 16, 1)}
            pictures |= {"edges": (16, 16, 1), "low_res": (16, 16, 3)}
            assert shapes == pictures | {
                "label": (),
                "boxes": (8, 4),
                "box_classes": (8,),
                "box_flags": (8,),
                "crop_box": (4,),
                "coords": (16, 16, 2),
                "keypoints": (16, 16, 3),
            }
            for key, value in row.items():
                whole = key in ("label", "segmentation", "box_classes", "box_flags")
                assert value.dtype == (np.int32 if whole else np.float32), key
            for key in ("image", "depth", "edges", "low_res"):
                assert -1 <= row[key].min() <= row[key].max() <= 1


def test_only_the_keys_asked_for_are_made():
    class Untouchable(dict):
        def __getitem__(self, key):
            assert key in ("image", "label")
            return super().__getitem__(key)

    row = transform(keys=("image", "label"))(Untouchable(scenes.render(0, 0, 16, 16)), rng())
    assert row.keys() == {"image", "label"}


def test_same_size_is_the_identity():
    scene = scenes.render(0, 3, 16, 16)
    row = transform(keys=("image", "segmentation", "depth", "crop_box"))(scene, rng())
    np.testing.assert_array_equal(row["image"], from_uint8(scene["image"]))
    np.testing.assert_array_equal(row["segmentation"], scene["segmentation"])
    np.testing.assert_allclose(row["depth"][..., 0], scene["depth"] * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(row["crop_box"], [0, 0, 1, 1])


@pytest.mark.parametrize("name", ["box", "bilinear", "bicubic", "lanczos"])
def test_is_the_resize_of_the_short_side_followed_by_a_crop(name):
    image = noise(50, 81)
    resized = Image.fromarray(image).resize((26, 16), getattr(Image.Resampling, name.upper()))
    expected = np.asarray(resized)[:, 5:21]
    view = choose_view(50, 81, 16, "center", (), False, rng())
    np.testing.assert_allclose(sample_image(image, view, 16, name).astype(int), expected, atol=1)


def test_no_antialias_is_linear_between_neighbours():
    ramp = np.repeat(np.arange(0, 96, 2, np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    view = View(0, 0, 48, 48)
    out = sample_image(ramp, view, 16, "bilinear_no_antialias")
    np.testing.assert_array_equal(out[3, :, 0], np.arange(16) * 6 + 2)  # source pixel 3 i + 1
    up = sample_image(np.array([[[0] * 3, [100] * 3]] * 2, np.uint8), View(0, 0, 2, 2), 4, "bilinear_no_antialias")
    np.testing.assert_array_equal(up[0, :, 0], [0, 25, 75, 100])  # half-pixel centres, clamped at the border


@pytest.mark.parametrize("height,width,size", [(50, 81, 16), (81, 50, 33), (7, 9, 20), (16, 16, 16), (375, 500, 256)])
def test_opencv_changes_no_crop_and_no_pixel_by_more_than_one_level(monkeypatch, height, width, size):
    pytest.importorskip("cv2")
    image = noise(height, width)
    crops = ("random", "center")
    views = [choose_view(height, width, size, crop, (), True, rng(i)) for i in range(4) for crop in crops]
    fast = [sample_image(image, view, size, "bilinear_no_antialias") for view in views]
    if height != size:
        assert all(transforms._crop_of_resized(image, view, size) is not None for view in views)
        assert transforms._crop_of_resized(image, View(0.3, 0.2, 5.1, 5.1), size) is None
    monkeypatch.setattr(transforms, "cv2", None)
    for view, ours in zip(views, fast, strict=True):
        theirs = sample_image(image, view, size, "bilinear_no_antialias")
        assert ours.shape == theirs.shape == (size, size, 3) and ours.dtype == theirs.dtype == np.uint8
        np.testing.assert_allclose(ours.astype(int), theirs, atol=1)


def test_only_the_filter_without_antialias_keeps_a_fine_pattern():
    stripes = np.tile(np.array([0, 255], np.uint8), 48)[None, :, None].repeat(96, 0).repeat(3, 2)
    spread = {name: int(np.ptp(sample_image(stripes, View(0, 0, 96, 96), 32, name)[:, 4:-4])) for name in FILTERS}
    assert spread.pop("bilinear_no_antialias") == 255
    assert max(spread.values()) < 100


def test_segmentation_is_never_blended():
    segmentation = np.where(rng().random((40, 60)) < 0.5, 3, 250).astype(np.uint8)
    example = {"image": noise(40, 60), "segmentation": segmentation}
    for seed in range(5):
        for size in (13, 16, 100):
            row = transform(keys=("segmentation",), size=size, crop="random_resized", flip=True)(example, rng(seed))
            assert set(np.unique(row["segmentation"])) == {3, 250}


def test_segmentation_takes_the_pixel_under_the_centre():
    ids = np.arange(9 * 9).reshape(9, 9)
    np.testing.assert_array_equal(sample_segmentation(ids, View(0, 0, 9, 9), 3), ids[1::3, 1::3])
    np.testing.assert_array_equal(sample_segmentation(ids, View(3, 0, 3, 3, flip=True), 3), ids[:3, 5:2:-1])


def test_everything_moves_together():
    """A square of one colour, id and depth with its box stays one thing under every crop and flip, and its places."""
    image, segmentation = np.zeros((60, 90, 3), np.uint8), np.zeros((60, 90), np.int32)
    depth = np.zeros((60, 90), np.float32)
    spot = slice(21, 39), slice(30, 54)
    image[spot], segmentation[spot], depth[spot] = 255, 7, 1
    boxes = np.array([[30 / 90, 21 / 60, 24 / 90, 18 / 60]], np.float32)
    example = {"image": image, "segmentation": segmentation, "depth": depth, "boxes": boxes}
    example |= {"box_classes": np.array([4], np.int32), "label": 0}
    seen = set()
    for seed in range(20):
        for crop in ("random", "random_resized"):
            keys = tuple(key for key in KEYS if key not in ("crop_box", "keypoints"))
            seen_by = transform(keys=keys, size=48, crop=crop, flip=True, resize="bilinear", resize_to=56)
            row = seen_by(example, rng(seed))
            inside = row["segmentation"] == 7
            for soft in (row["image"][..., 0], row["depth"][..., 0]):
                assert (inside != (soft > 0)).mean() < 0.05
            if row["box_classes"][0] < 0:
                assert not inside.any()
                continue
            assert row["box_classes"][0] == 4
            x, y, w, h = row["boxes"][0] * 48
            ys, xs = np.nonzero(inside)
            extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose([x, y, x + w, y + h], extent, atol=1)
            whole = dataclasses.replace(seen_by, keys=("boxes", "box_classes", "crop_box"))(example, rng(seed))
            view = choose_view(60, 90, 48, crop, (0.5, 1.0), True, rng(seed), resize_to=56)
            corner, extent = whole["crop_box"][:2], whole["crop_box"][2:]
            np.testing.assert_allclose(extent, [view.width / 90, view.height / 60], atol=1e-5)
            middle = row["boxes"][0, :2] + row["boxes"][0, 2:] / 2
            y, x = row["coords"][min(47, int(middle[1] * 48)), min(47, int(middle[0] * 48))]
            np.testing.assert_allclose([x, y], corner + middle * extent, atol=0.02)
            seen.add((round(float(corner[0]), 3), view.flip))
    assert len(seen) > 10 and {flip for _, flip in seen} == {True, False}


def test_boxes_beside_their_crop_are_those_of_the_whole_picture():
    """Boxes relative to the view are the whole picture's, mapped through `crop_box` and clipped: the same objects."""
    random = rng()
    seen = 0
    for seed in range(60):
        height, width = random.integers(20, 90, 2)
        corners = np.sort(random.random((7, 2, 2)), axis=1)
        boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1).astype(np.float32)
        example = {"image": noise(height, width), "boxes": boxes, "box_classes": np.arange(7, dtype=np.int32)}
        keys = ("boxes", "box_classes", "box_flags")
        view = transform(keys=keys, crop=("random", "center", "random_resized")[seed % 3], flip=True, max_boxes=4)
        inner = view(example, rng(seed))
        outer = dataclasses.replace(view, keys=(*keys, "crop_box"))(example, rng(seed))
        np.testing.assert_array_equal(inner["box_classes"], outer["box_classes"])
        real = inner["box_classes"] >= 0
        crop = outer["crop_box"]
        low = np.clip((outer["boxes"][:, :2] - crop[:2]) / crop[2:], 0, 1)
        high = np.clip((outer["boxes"][:, :2] + outer["boxes"][:, 2:] - crop[:2]) / crop[2:], 0, 1)
        np.testing.assert_allclose(np.concatenate([low, high - low], 1)[real], inner["boxes"][real], atol=1e-5)
        kept = boxes[outer["box_classes"][real]]
        if _flipped(view, height, width, seed):
            kept[:, 0] = 1 - kept[:, 0] - kept[:, 2]
        np.testing.assert_allclose(outer["boxes"][real], kept, atol=1e-5)
        layout = ObjectTokens("boxes", 4, 8192, 7, crop=False, flags=(), trim=True)
        ours, theirs = inner.values(), outer.values()
        np.testing.assert_array_equal(layout.tokens(*ours), layout.tokens(*theirs))
        seen += not np.allclose(inner["boxes"], outer["boxes"])
    assert seen > 30


def _flipped(view, height, width, seed):
    """Whether the transform mirrors a picture of this size with this seed: by what it does to a ramp."""
    ramp = np.tile(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, 1, 3))
    row = dataclasses.replace(view, keys=("image",))({"image": ramp}, rng(seed))["image"][0, :, 0]
    return row[0] > row[-1]


def test_masks_and_depths_of_another_size_are_seen_through_the_same_view():
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 15:45] = 255
    small, large = (np.kron(image[::10, ::5, 0] > 0, np.ones((n, n))).astype(np.uint8) for n in (1, 7))
    small = np.repeat(small, 2, axis=0)
    for segmentation in (small[::2], large):
        example = {"image": image, "segmentation": segmentation, "depth": segmentation.astype(np.float32)}
        for seed in range(8):
            row = transform(keys=("image", "segmentation", "depth"), crop="random_resized", flip=True)(
                example, rng(seed)
            )
            inside = row["image"][..., 0] > 0
            assert 0.2 < inside.mean() < 0.9
            assert (inside != (row["segmentation"] > 0)).mean() < 0.15
            assert (inside != (row["depth"][..., 0] > 0)).mean() < 0.15


def test_resize_to_is_a_resize_followed_by_a_smaller_crop():
    image = noise(60, 90)
    resized = np.asarray(Image.fromarray(image).resize((30, 20), Image.Resampling.BICUBIC))
    crops = [transform(keys=("image",), resize="bicubic", crop="random", resize_to=20)] * 8
    rows = [crop({"image": image}, rng(seed))["image"] for seed, crop in enumerate(crops)]
    corners = set()
    for row in rows:
        picture = np.rint((row + 1) * 127.5)
        errors = {(y, x): np.abs(picture - resized[y : y + 16, x : x + 16]).max() for y in range(5) for x in range(15)}
        best = min(errors, key=errors.get)
        assert errors[best] <= 1
        corners.add(best)
    assert len(corners) > 4
    centre = transform(keys=("image",), resize="bicubic", resize_to=20)({"image": image}, rng())["image"]
    np.testing.assert_allclose(np.rint((centre + 1) * 127.5), resized[2:18, 7:23], atol=1)
    with pytest.raises(UserError, match=r"config\.data\.resize_to: 12"):
        transform(resize_to=12)


@pytest.mark.parametrize("resize", ["box", "bilinear_no_antialias"])
def test_a_size_of_other_proportions_is_the_middle_of_the_square(resize):
    example = scenes.render(0, 3, 32, 32)
    keys = ("image", "segmentation", "depth", "coords")
    square, wide, tall = (
        transform(keys=keys, size=size, resize=resize)(example, rng()) for size in (16, (8, 16), (16, 10))
    )
    for key in keys:
        np.testing.assert_allclose(wide[key], square[key][4:12], atol=1e-6, err_msg=key)
        np.testing.assert_allclose(tall[key], square[key][:, 3:13], atol=1e-6, err_msg=key)
    assert transform(size=(8, 16))(example, rng())["keypoints"].shape == (8, 16, 3)
    view = choose_view(40, 60, (8, 16), "random_resized", (0.25, 0.25), False, rng())
    assert (view.width, view.height) == pytest.approx((30, 15))


def test_flip_mirrors_pixels_and_boxes():
    example = scenes.render(0, 5, 16, 16)
    keys = tuple(key for key in KEYS if key not in ("crop_box", "keypoints"))
    straight = transform(keys=keys)(example, rng())
    flipped = next(
        row
        for row in (transform(keys=keys, flip=True)(example, rng(seed)) for seed in range(20))
        if not np.array_equal(row["image"], straight["image"])
    )
    for key in ("image", "segmentation", "depth", "edges"):
        np.testing.assert_allclose(flipped[key], straight[key][:, ::-1], atol=1e-6)
    np.testing.assert_allclose(flipped["low_res"], straight["low_res"][:, ::-1], atol=2 / 255)
    real = straight["box_classes"] >= 0
    expected = straight["boxes"][real]
    expected[:, 0] = 1 - expected[:, 0] - expected[:, 2]
    np.testing.assert_allclose(flipped["boxes"][real], expected, atol=1e-6)


def test_edges_are_lines_where_the_seen_picture_changes():
    image = np.full((60, 90, 3), 40, np.uint8)
    image[:, 45:] = 220
    for size, resize_to, at in ((48, 0, 24), (32, 64, 16)):
        edges = transform(keys=("edges",), size=size, resize_to=resize_to)({"image": image}, rng())["edges"][..., 0]
        assert set(np.unique(edges)) == {-1.0, 1.0}
        found = np.flatnonzero((edges > 0).any(axis=0))
        assert set(found) <= {at - 1, at, at + 1}
        assert (edges[2:-2] > 0).any(axis=1).all()
    assert (transform(keys=("edges",))({"image": image[:, :40]}, rng())["edges"] == -1).all()


def test_low_res_keeps_means_of_areas_and_loses_what_is_finer():
    fine = np.indices((64, 64)).sum(0) % 2 * np.uint8(200)
    make = transform(keys=("low_res",), size=64)
    grey = make({"image": np.repeat(fine[..., None].astype(np.uint8), 3, 2)}, rng())["low_res"]
    np.testing.assert_allclose(grey, 100 / 127.5 - 1, atol=1e-6)
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 200
    for factor, width in ((8, 12), (2, 4)):
        row = dataclasses.replace(make, low_res_factor=factor)({"image": halves}, rng())["low_res"][20, :, 0]
        blurred = np.flatnonzero(np.abs(row - from_uint8(halves)[20, :, 0]) > 0.02)
        assert 0 < blurred.max() - blurred.min() < 3 * width and blurred.min() >= 32 - 3 * factor
        assert np.abs(np.diff(row)).max() < (0.4 if factor == 8 else 1.2)
    with pytest.raises(UserError, match=r"config\.data\.low_res_factor: 0"):
        transform(keys=("low_res",), low_res_factor=0)


def test_boxes_are_clipped_and_those_outside_are_dropped():
    boxes = np.array(
        [[0, 0, 0.25, 0.25], [0.4, 0.4, 0.2, 0.2], [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.05, 0.1]], np.float32
    )
    inner = View(25, 25, 50, 50)
    moved, visible = sample_boxes(boxes, inner, 100, 100)
    assert visible.tolist() == [False, True, True, False]
    np.testing.assert_allclose(moved[1:3], [[0.3, 0.3, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5]], atol=1e-6)


def test_keypoints_move_with_the_picture_and_change_sides_with_it():
    points = np.array([[0.25, 0.5, 1], [0.5, 0.5, 1], [0.75, 0.5, 0], [0.9, 0.1, 1]], np.float32)
    mirrored = np.array([1, 0, 2, 3])
    whole = sample_keypoints(points, mirrored, View(0, 0, 80, 40), 40, 80)
    np.testing.assert_allclose(whole[[0, 1, 3]], points[[0, 1, 3]])
    assert not whole[2].any()
    inner = sample_keypoints(points, mirrored, View(20, 10, 40, 20), 40, 80)
    np.testing.assert_allclose(inner, [[0, 0.5, 1], [0.5, 0.5, 1], [0, 0, 0], [0, 0, 0]])
    flipped = sample_keypoints(points, mirrored, View(20, 10, 40, 20, flip=True), 40, 80)
    np.testing.assert_allclose(flipped, [[0.5, 0.5, 1], [1, 0.5, 1], [0, 0, 0], [0, 0, 0]])
    example = {"image": noise(16, 16), "keypoints": points, "keypoints_mirrored": mirrored}
    row = transform(keys=("keypoints",))(example, rng())
    np.testing.assert_array_equal(row["keypoints"], from_uint8(drawing.keypoints(whole, 16, 16)))


def test_padding_and_the_largest_boxes():
    example = {"image": noise(16, 16), "boxes": np.array([[0, 0, s, s] for s in (0.1, 0.5, 0.2, 0.9)], np.float32)}
    example["box_classes"] = np.array([0, 1, -1, 3], np.int32)
    example["box_flags"] = np.array([5, 6, 7, 8], np.int32)
    row = transform(keys=("boxes", "box_classes", "box_flags"), max_boxes=2)(example, rng())
    assert row["box_classes"].tolist() == [1, 3] and row["box_flags"].tolist() == [6, 8]
    row = transform(keys=("boxes", "box_classes", "box_flags"), max_boxes=5)(example, rng())
    assert row["box_classes"].tolist() == [0, 1, 3, -1, -1] and row["boxes"][3:].tolist() == [[0] * 4] * 2
    assert row["box_flags"].tolist() == [5, 6, 8, 0, 0]


def test_small_pictures_are_upscaled():
    row = transform(keys=("image",), size=64, crop="random")({"image": np.full((5, 9, 3), 255, np.uint8)}, rng())
    np.testing.assert_array_equal(row["image"], np.ones((64, 64, 3), np.float32))


def test_random_crops_reach_both_ends_and_the_scale_range():
    views = [choose_view(20, 32, 20, "random", (), False, rng(seed)) for seed in range(200)]
    assert {view.x for view in views} == set(range(13)) and {view.y for view in views} == {0}
    views = [choose_view(100, 140, 20, "random_resized", (0.25, 0.64), False, rng(seed)) for seed in range(300)]
    sides = [view.width for view in views]
    assert 50 <= min(sides) < 52 and 78 < max(sides) <= 80
    assert all(view.x >= 0 and view.x + view.width <= 140 and view.y + view.height <= 100 for view in views)


def test_what_the_source_lacks_or_gets_wrong_is_named():
    with pytest.raises(UserError, match=r"no 'segmentation'"):
        transform(keys=("segmentation",))({"image": noise(4, 4)}, rng())
    for label in (-1, 8):
        with pytest.raises(UserError, match=f"label {label}"):
            transform(keys=("label",))({"image": noise(4, 4), "label": label}, rng())
    with pytest.raises(UserError, match="'segmentation'"):
        transform(keys=("segmentatoin",))
    with pytest.raises(UserError, match=r"config\.data\.resize.*'bicubic'"):
        transform(resize="bicubik")
    with pytest.raises(UserError, match=r"config\.data\.crop.*'center'"):
        transform(crop="centre")
    with pytest.raises(UserError, match=r"config\.data\.crop_scale"):
        transform(crop="random_resized", crop_scale=(0.0, 1.0))


def test_from_config_evaluates_with_the_centre_crop():
    data = ConfigDict(
        {"image_size": 16, "resize": "box", "crop": "random", "crop_scale": [0.5, 1], "flip": True, "max_boxes": 8}
        | {"resize_to": 0, "low_res_factor": 8}
    )
    train, val = (Transform.from_config(data, keys=tuple(KEYS), classes=8, train=train) for train in (True, False))
    assert train == transform(crop="random", flip=True) and val == transform()
    assert pickle.loads(pickle.dumps(train)) == train and hash(train) != hash(val)
