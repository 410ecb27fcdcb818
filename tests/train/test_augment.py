"""Differentiable augmentation: every part against numpy, gradients, and who is changed alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqgan_jax.train.augment import POLICIES, augment, color, cutout, parse_policy, translation

IMAGES = np.random.default_rng(0).uniform(-1, 1, (16, 12, 16, 3)).astype(np.float32)
EVERYTHING = tuple(POLICIES)


@pytest.fixture(scope="module")
def translated():
    return np.asarray(jax.jit(translation)(IMAGES, jax.random.key(3)))


@pytest.fixture(scope="module")
def cut():
    return np.asarray(jax.jit(cutout)(IMAGES, jax.random.key(3)))


def shifted(x, down, right):
    """Moves a picture [h, w, c], zeros behind it."""
    y = np.zeros_like(x)
    h, w, _ = x.shape
    for i in range(h):
        for j in range(w):
            if 0 <= i - down < h and 0 <= j - right < w:
                y[i, j] = x[i - down, j - right]
    return y


def test_translation_moves_pixels_and_changes_none(translated):
    """Each row is one of the 5 x 5 shifts by up to an eighth (12 / 8 rounds to 2), exactly; many shifts occur."""
    rows, columns = jax.random.split(jax.random.key(3))
    down, right = (np.asarray(jax.random.randint(k, (16, 1, 1), -2, 3)).ravel() for k in (rows, columns))
    for k in range(16):
        np.testing.assert_array_equal(translated[k], shifted(IMAGES[k], down[k], right[k]))
    assert set(down) == {-2, -1, 0, 1, 2} and set(right) >= {-2, -1, 2}


def test_cutout_blanks_one_rectangle_of_half_the_sides(cut):
    rows, columns = jax.random.split(jax.random.key(3))
    for k in range(16):
        top = int(jax.random.randint(rows, (16, 1, 1, 1), 0, 13)[k].item()) - 3
        left = int(jax.random.randint(columns, (16, 1, 1, 1), 0, 17)[k].item()) - 4
        expected = IMAGES[k].copy()
        expected[max(top, 0) : top + 6, max(left, 0) : left + 8] = 0
        np.testing.assert_array_equal(cut[k], expected)
    holes = (cut == 0).all(-1).sum(axis=(1, 2))
    assert holes.max() == 6 * 8 and holes.min() >= 3 * 4  # the centre is never outside


def test_color_is_affine_in_each_row():
    key = jax.random.key(5)
    brightness, saturation, contrast = np.asarray(jax.random.uniform(key, (3, 16)))
    x = IMAGES + (brightness - 0.5)[:, None, None, None]
    grey = x.mean(-1, keepdims=True)
    x = (x - grey) * (2 * saturation)[:, None, None, None] + grey
    mean = x.mean((1, 2, 3), keepdims=True)
    expected = (x - mean) * (contrast + 0.5)[:, None, None, None] + mean
    np.testing.assert_allclose(jax.jit(color)(IMAGES, key), expected, atol=1e-5)


def test_no_policy_changes_nothing():
    assert parse_policy("") == () and augment(IMAGES, jax.random.key(0), ()) is IMAGES
    assert parse_policy("color, cutout") == ("color", "cutout")
    with pytest.raises(ValueError, match="unknown policy 'colour', did you mean 'color'"):
        parse_policy("translation,colour")


def test_real_and_fake_of_a_row_are_changed_alike_and_gradients_flow():
    """One key, one affine map a row: differences of two batches are changed as a map without offset changes them, and
    the gradient is that map's transpose."""
    key = jax.random.key(7)
    other = np.random.default_rng(1).uniform(-1, 1, IMAGES.shape).astype(np.float32)
    apply = jax.jit(lambda x: augment(x, key, EVERYTHING))
    real, fake, middle = apply(IMAGES), apply(other), apply((IMAGES + other) / 2)
    np.testing.assert_allclose((real + fake) / 2, middle, atol=2e-5)
    assert np.abs(np.asarray(real) - IMAGES).max() > 0.5
    towards = np.random.default_rng(2).normal(size=IMAGES.shape).astype(np.float32)
    _, pull = jax.vjp(apply, jnp.asarray(IMAGES))
    (gradient,) = pull(jnp.asarray(towards))
    np.testing.assert_allclose(np.vdot(gradient, IMAGES - other), np.vdot(towards, real - fake), rtol=1e-3)
    assert np.all(np.isfinite(gradient)) and np.all(np.abs(gradient).sum(axis=(1, 2, 3)) > 0)


def test_rows_and_steps_draw_their_own():
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    apply = jax.jit(lambda key: augment(same, key, EVERYTHING))
    one, two = (np.asarray(apply(jax.random.key(k))) for k in (0, 1))
    assert len({row.tobytes() for row in one}) == 16
    assert not any(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
