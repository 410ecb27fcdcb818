"""Rows of evaluation batches become pictures with their positions, and nothing is left out in silence."""

import jax
import numpy as np
import pytest

from vqgan_jax import parallel
from vqgan_jax.config import UserError
from vqgan_jax.scoring import pictures, result


@pytest.fixture(scope="module")
def mesh():
    return parallel.make_mesh({"data": 4, "fsdp": 1, "tensor": 2})


def batch(valid):
    return {"image": np.linspace(-1, 1, 8 * 2 * 2 * 3).reshape(8, 2, 2, 3).astype(np.float32), "valid": np.array(valid)}


def test_positions_go_on_from_batch_to_batch_and_padding_is_left_out(mesh):
    batches = [batch([True] * 8), batch([True] * 3 + [False] * 5)]
    found = list(pictures.of_batches(batches, mesh, 8, 11))
    assert np.concatenate([place for _, place in found]).tolist() == list(range(11))
    assert [len(x) for x, _ in found] == [8, 3] and found[0][0].dtype == np.uint8
    assert found[0][0][0, 0, 0, 0] == 0 and found[0][0][-1, -1, -1, -1] == 255


def test_an_example_that_cannot_be_read_is_named(mesh):
    with pytest.raises(UserError, match="example 9 of 11 cannot be read"):
        list(pictures.of_batches([batch([True] * 8), batch([True, False, True] + [False] * 5)], mesh, 8, 11))


def test_rows_that_devices_share_are_one_hosts_own(mesh):
    assert pictures.own_rows(mesh, 8).tolist() == [True] * 8
    x = np.arange(16.0).reshape(8, 2)
    placed = jax.device_put(x, parallel.batch_sharding(mesh))
    np.testing.assert_array_equal(parallel.local_rows(placed), x)


def test_the_digest_of_parameters_knows_names_and_values():
    tree = {"a": np.arange(3.0), "b": {"c": np.ones(2, np.float32)}}
    digest = lambda tree: result.describe_checkpoint({"step": 3}, tree)["parameters_sha256"]  # noqa: E731
    assert digest(tree) == digest({"b": {"c": np.ones(2, np.float32)}, "a": np.arange(3.0)})
    others = [{"a": np.arange(3.0), "b": {"d": tree["b"]["c"]}}, {"a": np.arange(3.0) + 1e-9, "b": tree["b"]}]
    assert len({digest(x) for x in (tree, *others)}) == 3


def test_the_line_names_figures_preset_and_counts():
    line = result.line({"fid": 1.23456, "samples": 10, "reference_samples": 20, "definition": {"preset": "adm"}})
    assert line == "fid 1.235 [preset adm] [10 samples against 20 images]"
