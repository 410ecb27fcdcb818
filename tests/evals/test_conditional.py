"""Derived conditions: a real picture agrees with its own, another one does not."""

import numpy as np
import pytest

from vqgan_jax.data import scenes
from vqgan_jax.evals import conditional
from vqgan_jax.evals.conditional import CHECKS, ColourTable


def test_measures_of_equal_and_of_unequal_conditions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (3, 8, 8))
    assert CHECKS["segmentation"](labels, labels)["agreement"].tolist() == [1, 1, 1]
    half = labels.copy()
    half[:, :4] += 1
    assert CHECKS["segmentation"](half, labels)["agreement"].tolist() == [0.5] * 3
    pictures = rng.uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
    same = CHECKS["low_res"](pictures, pictures)
    assert same["l1"].tolist() == [0, 0] and same["psnr"].tolist() == [100, 100]
    moved = CHECKS["low_res"](pictures + 0.2, pictures)
    np.testing.assert_allclose(moved["l1"], 0.2, rtol=1e-5)
    np.testing.assert_allclose(moved["psnr"], 10 * np.log10(4 / 0.04), rtol=1e-5)


def test_edges_overlap():
    edges = -np.ones((3, 4, 4, 1))
    edges[0, 0], edges[1, 0] = 1, 1
    asked = -np.ones((3, 4, 4, 1))
    asked[0, 0] = 1
    asked[1, :2] = 1
    assert CHECKS["edges"](edges, asked)["f1"].tolist() == [1.0, pytest.approx(2 / 3), 1.0]


def test_colours_tell_the_segmentation_of_scenes():
    examples = [scenes.render(0, index, 32, 32) for index in range(60)]
    pictures, labels = (np.stack([e[key] for e in examples]) for key in ("image", "segmentation"))
    table = ColourTable()
    for part in (slice(0, 20), slice(20, 40)):
        table.add(pictures[part], labels[part])
    derived = table(pictures[40:])["segmentation"]
    right = CHECKS["segmentation"](derived, labels[40:])["agreement"].mean()
    wrong = CHECKS["segmentation"](derived, labels[:20])["agreement"].mean()
    majority = np.bincount(labels[40:].ravel()).max() / labels[40:].size
    assert right > majority + 0.2 and right > wrong + 0.1


def test_a_colour_never_seen_takes_the_nearest():
    table = ColourTable()
    pictures = np.zeros((1, 1, 2, 3), np.uint8)
    pictures[0, 0, 1] = 250
    table.add(pictures, np.array([[[3, 7]]]))
    new = np.array([[[[40, 30, 20], [200, 230, 255]]]], np.uint8)
    assert table(new)["segmentation"].tolist() == [[[3, 7]]]
    with pytest.raises(ValueError, match="has seen no labelled picture"):
        ColourTable()(new)


def test_a_transform_derives_its_key_again():
    def transform(example, rng):
        return {"low_res": example["image"][::2, ::2].astype(np.float32) / 127.5 - 1}

    pictures = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    derived = conditional.from_transform(transform, "low_res")(pictures)
    assert derived["low_res"].shape == (2, 2, 2, 3)
    assert CHECKS["low_res"](derived["low_res"], derived["low_res"])["psnr"].tolist() == [100, 100]
