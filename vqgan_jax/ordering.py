"""The orders in which the tokens of a grid are generated (Figure 47 of arXiv 2012.09841).

Where the released code defines an order (square grids, some of even or power-of-two size only), it is the same here;
the rules below extend each order to a grid of any height and width.
"""

from collections.abc import Iterable

import numpy as np

from vqgan_jax.config import UserError, choose


def order(name: str, height: int, width: int) -> np.ndarray:
    """The raster index (row * width + column) of each grid position, in order of generation.

    `tokens[..., order(...)]` brings raster tokens into this order, `inverse` brings them back.

    Args:
      name: a key of `ORDERS`.
      height: rows of the grid, at least 1.
      width: columns of the grid, at least 1.

    Returns:
      int32 [height * width], a permutation.

    Raises:
      UserError: an unknown name, or an empty grid.
    """
    rule = choose("token order", name, ORDERS)
    if height < 1 or width < 1:
        raise UserError(f"token order '{name}': a grid of {height} x {width} has no positions; both sizes must be >= 1")
    raster = np.arange(height * width, dtype=np.int32).reshape(height, width)
    return np.ascontiguousarray(rule(raster), dtype=np.int32)


def inverse(permutation: np.ndarray) -> np.ndarray:
    """The permutation that undoes another: `x[p][inverse(p)]` is x. int32 [n] -> int32 [n]."""
    return np.argsort(permutation).astype(np.int32)


def _row_major(raster: np.ndarray) -> np.ndarray:
    return raster.ravel()


def _by_bits(raster: np.ndarray, bits: Iterable[int]) -> np.ndarray:
    """Sorts positions by bits of row and column; `bits` from the least to the most weighty, rows above columns."""
    row, column = np.divmod(raster.ravel(), raster.shape[1])
    return np.lexsort([axis >> bit & 1 for bit in bits for axis in (column, row)])


def _bit_count(raster: np.ndarray) -> int:
    return max(1, (max(raster.shape) - 1).bit_length())


def _zcurve(raster: np.ndarray) -> np.ndarray:
    """Quadrant by quadrant, recursively: the Morton code."""
    return _by_bits(raster, range(_bit_count(raster)))


def _subsample(raster: np.ndarray) -> np.ndarray:
    """Coarse to fine: every second row and column first, recursively. The bits of the Morton code, reversed."""
    return _by_bits(raster, reversed(range(_bit_count(raster))))


def _spiral_in(raster: np.ndarray) -> np.ndarray:
    """From the bottom right corner up the last column, then along the top, down the first column, and so on inwards."""
    turns = []
    while raster.size:
        turns.append(raster[::-1, -1])
        raster = np.rot90(raster[:, :-1], -1)
    return np.concatenate(turns)


def _spiral_out(raster: np.ndarray) -> np.ndarray:
    return _spiral_in(raster)[::-1]


def _random(raster: np.ndarray) -> np.ndarray:
    # The released code's permutation, from the same seed; NumPy guarantees the stream of RandomState for good.
    return np.random.RandomState(1).permutation(raster.size)


def _alternate(raster: np.ndarray) -> np.ndarray:
    """Row by row, each odd row from right to left."""
    snake = raster.copy()
    snake[1::2] = raster[1::2, ::-1]
    return snake.ravel()


ORDERS = {
    "row_major": _row_major,
    "subsample": _subsample,
    "zcurve": _zcurve,
    "spiral_out": _spiral_out,
    "spiral_in": _spiral_in,
    "random": _random,
    "alternate": _alternate,
}
