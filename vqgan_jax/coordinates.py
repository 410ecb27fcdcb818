"""Coordinates of picture positions, and tokens of them: a condition for pictures larger than the window.

The paper (arXiv 2012.09841) only says "condition on image coordinates"; the released code's raster scalar is here by
name, beside tokens that tell columns apart. Arrays of numpy or JAX (inside jit as well) go in, the same kind comes out.
"""

import math
from typing import Any

import numpy as np

from vqgan_jax.config import UserError

Array = Any  # numpy or JAX: both give their namespace by __array_namespace__


def pixel_coordinates(height: int, width: int) -> np.ndarray:
    """The centre (y, x) of each pixel of a whole picture, float32 [height, width, 2] in (0, 1). Crop as the picture."""
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height)
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(width)
    return np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)


def coordinate_tokens(coords: Array, vocab: int, factor: int) -> Array:
    """One token a grid position: the joint bin of its (y, x), floor(sqrt(vocab)) equal bins an axis.

    Args:
      coords: float [b, h, w, 2], (y, x) in [0, 1]; values outside go to the nearest bin.
      vocab: number of tokens; the highest token is floor(sqrt(vocab))**2 - 1.
      factor: pixels a grid position, by which h and w divide.

    Returns:
      int32 [b, h / factor, w / factor] in [0, vocab).

    Raises:
      UserError: h or w does not divide by `factor`.
    """
    _check_divides(coords, factor)
    b, h, w, _ = coords.shape
    sections = math.isqrt(vocab)
    xp = coords.__array_namespace__()
    means = coords.reshape(b, h // factor, factor, w // factor, factor, 2).mean(axis=(2, 4))
    bins = xp.clip(xp.floor(means * sections), 0, sections - 1).astype(xp.int32)
    return bins[..., 0] * sections + bins[..., 1]


def coordinates_from_tokens(tokens: Array, vocab: int, factor: int) -> Array:
    """The inverse of `coordinate_tokens` up to half a bin: int32 [b, h, w] to bin centres float32 [b, h * f, w * f, 2].

    Tokens from floor(sqrt(vocab))**2 on stand for no bin; they are read as the last row of bins.
    """
    sections = math.isqrt(vocab)
    xp = tokens.__array_namespace__()
    bins = xp.stack([xp.minimum(tokens // sections, sections - 1), tokens % sections], axis=-1)
    return _enlarge((bins.astype(xp.float32) + 0.5) / sections, factor)


def raster_scalar(coords: Array, height: int, width: int) -> Array:
    """The released code's single coordinate, (row * width + column) / (height * width) in [0, 1).

    Args:
      coords: float [..., 2], `pixel_coordinates` of the whole picture or a crop of them.
      height: rows of the whole picture in pixels.
      width: its columns.

    Returns:
      float [..., 1].
    """
    row, column = coords[..., :1] * height - 0.5, coords[..., 1:] * width - 0.5
    return (row * width + column) / (height * width)


def raster_scalar_tokens(scalar: Array, vocab: int, factor: int) -> Array:
    """The released code's coordinate tokens: the mean of `raster_scalar` over a grid position, times vocab, rounded.

    Kept for its checkpoints: neighbouring columns share tokens (256 x 256 pixels, factor 16, vocab 1024: 5 values for
    16 columns), and a mean above 1 - 1 / (2 vocab) gives the token `vocab`, which an embedding of that size lacks.

    Args:
      scalar: float [b, h, w, 1] in [0, 1].
      vocab: number of tokens.
      factor: pixels a grid position, by which h and w divide.

    Returns:
      int32 [b, h / factor, w / factor] in [0, vocab], both ends included.

    Raises:
      UserError: h or w does not divide by `factor`.
    """
    _check_divides(scalar, factor)
    # Means fall on halves exactly, so the order of the sum decides tokens: pixel by pixel in float32, as released.
    total = sum(scalar[:, i::factor, j::factor, 0] for i in range(factor) for j in range(factor))
    xp = scalar.__array_namespace__()
    return xp.round(total / (factor * factor) * vocab).astype(xp.int32)


def raster_scalar_from_tokens(tokens: Array, vocab: int, factor: int) -> Array:
    """The inverse of `raster_scalar_tokens` up to rounding: int32 [b, h, w] to float32 [b, h * f, w * f, 1]."""
    xp = tokens.__array_namespace__()
    return _enlarge(tokens[..., None].astype(xp.float32) / vocab, factor)


def _check_divides(x: Array, factor: int) -> None:
    _, h, w, _ = x.shape
    if h % factor or w % factor:
        raise UserError(f"coords: a picture of {h} x {w} does not divide by {factor} pixels a token; change its size")


def _enlarge(x: Array, factor: int) -> Array:
    xp = x.__array_namespace__()
    return xp.repeat(xp.repeat(x, factor, axis=1), factor, axis=2)
