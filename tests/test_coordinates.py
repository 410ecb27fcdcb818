"""Coordinate tokens: the released raster scalar exactly, and joint bins that tell every position apart."""

from pathlib import Path

import jax
import numpy as np
import pytest

from vqgan_jax import coordinates
from vqgan_jax.config import UserError

GOLDEN = np.load(Path(__file__).parent / "golden" / "coords.npz")
VOCAB, FACTOR = int(GOLDEN["n_embed"]), int(GOLDEN["down_factor"])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["numpy", "jit"])
def test_raster_scalar_tokens_equal_reference(wrap):
    tokens = wrap(lambda x: coordinates.raster_scalar_tokens(x, VOCAB, FACTOR))(GOLDEN["coord"])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, GOLDEN["indices"][:, 0])


def test_raster_scalar_is_the_reference_coordinate_of_pictures_and_crops():
    height, width = GOLDEN["coord"].shape[1:3]
    coords = coordinates.pixel_coordinates(height, width)
    np.testing.assert_allclose(coordinates.raster_scalar(coords, height, width), GOLDEN["coord"][0], atol=1e-7)
    crop = coordinates.raster_scalar(coords[8:24, 16:40], height, width)
    np.testing.assert_allclose(crop, GOLDEN["coord"][0, 8:24, 16:40], atol=1e-7)


def test_raster_scalar_inverts_up_to_rounding_and_may_leave_the_vocabulary():
    tokens = coordinates.raster_scalar_tokens(GOLDEN["coord"], VOCAB, FACTOR)
    back = coordinates.raster_scalar_from_tokens(tokens, VOCAB, FACTOR)
    assert back.shape == GOLDEN["coord"].shape and back.dtype == np.float32
    np.testing.assert_array_equal(coordinates.raster_scalar_tokens(back, VOCAB, FACTOR), tokens)
    means = GOLDEN["coord"].reshape(1, 6, FACTOR, 8, FACTOR).mean((2, 4))
    assert np.abs(back[:, ::FACTOR, ::FACTOR, 0] - means).max() <= 0.5 / VOCAB + 1e-6
    assert coordinates.raster_scalar_tokens(np.ones((1, 8, 8, 1), np.float32), VOCAB, 8).item() == VOCAB


@pytest.mark.parametrize("height, width", [(16, 16), (32, 32), (31, 7)])
def test_joint_tokens_tell_all_positions_apart(height, width):
    coords = coordinates.pixel_coordinates(4 * height, 4 * width)[None]
    tokens = coordinates.coordinate_tokens(coords, 1024, 4)
    assert tokens.shape == (1, height, width) and tokens.dtype == np.int32
    assert len(np.unique(tokens)) == height * width
    assert tokens.min() >= 0 and tokens.max() < 1024


@pytest.mark.parametrize("vocab", [2, 90, 1024, 8192])
def test_joint_tokens_stay_in_the_vocabulary_and_invert(vocab):
    grid = np.linspace(-0.1, 1.1, 64, dtype=np.float32)
    coords = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)[None]
    tokens = coordinates.coordinate_tokens(coords, vocab, 1)
    assert tokens.min() == 0 and tokens.max() == int(vocab**0.5) ** 2 - 1
    back = coordinates.coordinates_from_tokens(tokens, vocab, 1)
    assert np.abs(back - np.clip(coords, 0, 1)).max() <= 0.5 / int(vocab**0.5) + 1e-6
    np.testing.assert_array_equal(coordinates.coordinate_tokens(back, vocab, 1), tokens)


def test_joint_tokens_put_y_above_x_and_enlarge_by_the_factor():
    coords = np.broadcast_to(np.float32([0.8, 0.1]), (1, 4, 8, 2))
    tokens = coordinates.coordinate_tokens(coords, 16, 4)
    np.testing.assert_array_equal(tokens, np.full((1, 1, 2), 3 * 4 + 0))
    back = coordinates.coordinates_from_tokens(tokens, 16, 4)
    np.testing.assert_allclose(back, np.broadcast_to([0.875, 0.125], (1, 4, 8, 2)))
    ends = coordinates.coordinates_from_tokens(np.arange(20, dtype=np.int32).reshape(1, 1, 20), 17, 1)
    assert ends.min() == 0.125 and ends.max() == 0.875


def test_joint_tokens_take_the_mean_of_a_cell():
    coords = np.float32([[[0.0, 0.2], [0.7, 0.5]], [[0.7, 0.9], [0.0, 1.0]]])[None]  # means 0.35 and 0.65
    assert coordinates.coordinate_tokens(coords, 100, 2).item() == 36


def test_joint_tokens_under_jit_equal_numpy():
    coords = np.random.default_rng(0).random((2, 8, 12, 2), np.float32)
    tokens = coordinates.coordinate_tokens(coords, 256, 4)
    jitted = jax.jit(lambda x: coordinates.coordinate_tokens(x, 256, 4))(coords)
    np.testing.assert_array_equal(jitted, tokens)
    back = jax.jit(lambda x: coordinates.coordinates_from_tokens(x, 256, 4))(tokens)
    np.testing.assert_allclose(back, coordinates.coordinates_from_tokens(tokens, 256, 4), rtol=1e-6)


@pytest.mark.parametrize("function", [coordinates.coordinate_tokens, coordinates.raster_scalar_tokens])
def test_sizes_must_divide(function):
    channels = 2 if function is coordinates.coordinate_tokens else 1
    with pytest.raises(UserError, match="16 x 20 does not divide by 8"):
        function(np.zeros((1, 16, 20, channels), np.float32), 1024, 8)
