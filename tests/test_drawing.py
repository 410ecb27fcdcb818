"""Drawings say what the arrays hold."""

import numpy as np

from vqgan_jax import drawing


def test_palette_tells_ids_apart_and_does_not_depend_on_the_count():
    colours = drawing.palette(256).astype(int)
    np.testing.assert_array_equal(drawing.palette(7), colours[:7])
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(256, dtype=int)
    assert apart.min() >= 6 and np.sort(apart, axis=1)[:, 0].mean() > 25


def test_segmentation_is_the_palette_at_the_ids():
    ids = np.array([[0, 3], [255, -1]])
    drawn = drawing.segmentation(ids)
    np.testing.assert_array_equal(drawn[0, 1], drawing.palette(4)[3])
    np.testing.assert_array_equal(drawn[1, 1], [0, 0, 0])
    own = np.array([[9, 9, 9], [8, 8, 8]], np.uint8)
    np.testing.assert_array_equal(drawing.segmentation(ids, own)[..., 0], [[9, 0], [0, 0]])


def test_depth_grows_brighter():
    ramp = np.linspace(-1.2, 1.2, 64, dtype=np.float32)[None, :, None]
    drawn = drawing.depth(ramp).astype(int)
    assert drawn.shape == (1, 64, 3)
    brightness = drawn @ [0.3, 0.59, 0.11]
    assert (np.diff(brightness[0]) > -0.6).all() and brightness[0, 0] < 5 and brightness[0, -1] > 220


def test_coords_grow_down_and_to_the_right():
    drawn = drawing.coords(np.array([[[0, 0], [0, 1]], [[1, 0], [1, 1]]], np.float32))
    assert drawn[..., 0].tolist() == [[0, 0], [255, 255]] and drawn[..., 1].tolist() == [[0, 255], [0, 255]]


def test_a_box_is_drawn_on_its_edge_in_its_colour():
    picture = np.zeros((200, 200, 3), np.uint8)
    rectangles = np.array([[0.25, 0.25, 0.5, 0.5], [0, 0, 1, 1]], np.float32)
    drawn = drawing.boxes(picture, rectangles, np.array([5, -1]), ("no",) * 5 + ("dog",))
    colour = drawing.palette(6)[5]
    np.testing.assert_array_equal(drawn[100, 50], colour)
    np.testing.assert_array_equal(drawn[149, 100], colour)
    assert not drawn[100, 100].any() and not drawn[199, 199].any() and not picture.any()


def test_labels_make_room_for_each_other():
    picture = np.zeros((200, 200, 3), np.uint8)
    same = np.tile(np.float32([0.1, 0.1, 0.8, 0.8]), (3, 1))
    drawn = drawing.boxes(picture, same, np.array([1, 2, 3]), ("a", "bbbbbb", "cccccc", "dddddd"))
    for k in (1, 2, 3):
        assert (drawn == drawing.palette(4)[k]).all(-1).sum() > 100  # no patch hides another


def test_keypoints_draw_what_is_seen():
    points = np.zeros((18, 3), np.float32)
    points[1], points[2] = [0.25, 0.5, 1], [0.75, 0.5, 1]
    drawn = drawing.keypoints(points, 64, 64)
    assert drawn[32, 32].any() and drawn[32, 16].any() and not drawn[:8].any() and not drawn[60:].any()
    points[2, 2] = 0
    assert not drawing.keypoints(points, 64, 64)[32, 32].any()


def test_legend_names_the_largest_first():
    ids = np.array([[4, 4, 4], [4, 2, -1]])
    wide = drawing.segmentation_legend(ids, ("a", "b", "c", "d", "e"), 100, 1)
    assert wide.shape == (drawing.LINE, 100, 3)
    np.testing.assert_array_equal(wide[6, 5], drawing.palette(5)[4])
    assert (wide == drawing.palette(3)[2]).all(-1).any()
    narrow = drawing.segmentation_legend(ids, ("a", "b", "c", "d", "e"), 24, 1)
    assert not (narrow == drawing.palette(3)[2]).all(-1).any()


def test_captions_and_enlarging_keep_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    larger = drawing.enlarged(picture, 12)
    assert larger.shape == (15, 27, 3)
    np.testing.assert_array_equal(larger[1::3, 1::3], picture)
    captioned = drawing.captioned(larger, "dog")
    np.testing.assert_array_equal(captioned[:15], larger)
    assert captioned.shape == (15 + drawing.LINE, 27, 3) and captioned[15:].min() < 100
