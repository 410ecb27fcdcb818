"""Two-dimensional rotary positions over the grid of codes (RoFormer, arXiv 2104.09864), with LlamaGen's frequencies.

Of each head's width the first half of the angles turns with the row, the second with the column. Dimension j is paired
with j + k/2, where LlamaGen pairs neighbours: an import moves the columns of the query and key kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BASE = 10000.0  # LlamaGen's
Coordinates = tuple[tuple[int, int] | None, ...]  # row and column of each place; None: see `rotations`
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines


@functools.lru_cache(maxsize=8)
def rotations(coordinates: Coordinates, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every place, float32 [places, width / 2].

    A place without coordinates has zeros for both, so its query and key vanish: such are the condition's places in
    LlamaGen, whose tokens every code sees with a score of 0, whatever they say.

    Args:
      coordinates: (row, column) of each place, or None.
      width: of a head, k; a multiple of 4.
    """
    half = width // 2
    frequencies = BASE ** -(np.arange(0, half, 2) / half)
    cosines, sines = np.zeros((2, len(coordinates), half), np.float32)
    for place, at in enumerate(coordinates):
        if at is not None:
            angles = np.concatenate([at[0] * frequencies, at[1] * frequencies])
            cosines[place], sines[place] = np.cos(angles), np.sin(angles)
    return cosines, sines


def rotation_at(coordinates: Coordinates, width: int, positions_bt: jax.Array) -> Rotation:
    """What `rotate` takes for tokens at these places, [b, t, 1, k/2] each."""
    cosines, sines = (jnp.asarray(table)[positions_bt][:, :, None] for table in rotations(coordinates, width))
    return cosines, sines


def rotate(x_btd: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns each head of folded queries or keys [b, t, n*k] by its place; in float32."""
    cosines, sines = rotation
    b, t, _ = x_btd.shape
    x = x_btd.astype(jnp.float32).reshape(b, t, -1, 2, cosines.shape[-1])
    first, second = x[..., 0, :], x[..., 1, :]
    turned = jnp.stack([first * cosines - second * sines, second * cosines + first * sines], axis=-2)
    return turned.reshape(x_btd.shape).astype(x_btd.dtype)
