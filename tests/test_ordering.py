"""Token orders: equal to the released code's, and permutations with the named property on every grid."""

from pathlib import Path

import numpy as np
import pytest

from vqgan_jax.config import UserError
from vqgan_jax.ordering import ORDERS, inverse, order

GOLDEN = np.load(Path(__file__).parent / "golden" / "permutations.npz")
GRIDS = [(1, 1), (1, 5), (4, 1), (3, 3), (4, 8), (5, 7), (22, 27)]


@pytest.mark.parametrize("key", sorted(GOLDEN))
def test_equals_reference(key):
    name, grid, way = key.split("/")
    forward = order(name, *map(int, grid.split("x")))
    assert forward.dtype == np.int32
    np.testing.assert_array_equal(forward if way == "forward" else inverse(forward), GOLDEN[key])


def test_the_reference_pins_every_order_but_identity():
    assert {key.split("/")[0] for key in GOLDEN} == set(ORDERS) - {"row_major"}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ORDERS)
def test_visits_each_position_once_and_inverts(name, grid):
    forward = order(name, *grid)
    np.testing.assert_array_equal(np.sort(forward), np.arange(grid[0] * grid[1]))
    x = np.random.default_rng(0).integers(99, size=forward.size)
    np.testing.assert_array_equal(x[forward][inverse(forward)], x)


@pytest.mark.parametrize("grid", GRIDS)
def test_row_major_is_the_identity(grid):
    np.testing.assert_array_equal(order("row_major", *grid), np.arange(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["spiral_out", "spiral_in", "alternate"])
def test_paths_move_to_a_neighbour(name, grid):
    row, column = np.divmod(order(name, *grid), grid[1])
    steps = np.abs(np.diff(row)) + np.abs(np.diff(column))
    np.testing.assert_array_equal(steps, 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_subsample_draws_the_coarse_grid_first(grid):
    row, column = np.divmod(order("subsample", *grid), grid[1])
    for stride in (2, 4, 8):
        coarse = -(-grid[0] // stride) * -(-grid[1] // stride)
        assert not np.any(row[:coarse] % stride) and not np.any(column[:coarse] % stride)


def test_zcurve_finishes_a_block_before_the_next():
    row, column = np.divmod(order("zcurve", 5, 7), 7)
    for size in (2, 4):
        block = (row // size) * 7 + column // size
        assert np.count_nonzero(np.diff(block)) == len(np.unique(block)) - 1


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'zcurve'"):
        order("z_curve", 4, 4)


@pytest.mark.parametrize("grid", [(0, 4), (4, 0), (-2, 2)])
def test_empty_grid_is_refused(grid):
    with pytest.raises(UserError, match="no positions"):
        order("spiral_in", *grid)
