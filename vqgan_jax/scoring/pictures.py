"""Pictures as the scores take them: uint8 batches with their indices in the set, each row on one host only."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from vqgan_jax import parallel
from vqgan_jax.config import UserError
from vqgan_jax.evals.features import Images
from vqgan_jax.images import to_uint8


def own_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Which of this host's rows of a global batch it hands in, bool [rows]: where hosts share rows the first one."""
    holders: dict[int, int] = {}
    for device, (index,) in parallel.batch_sharding(mesh).devices_indices_map((batch,)).items():
        for row in range(*index.indices(batch)):
            holders[row] = min(holders.get(row, device.process_index), device.process_index)
    return np.array([holders[row] == jax.process_index() for row in parallel.host_rows(mesh, batch)])


def positions(mesh: Mesh, batch: int, count: int, step: int, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of this host's rows of evaluation batch `step` it hands in, bool [rows], and the positions of these.

    Raises:
      UserError: one of the `count` examples could not be read.
    """
    place = step * batch + parallel.host_rows(mesh, batch)
    if (missing := place[(place < count) & ~valid]).size:
        raise UserError(
            f"config.data: example {missing[0]} of {count} cannot be read, and a score of the rest would be one of "
            "another set; mend or remove it"
        )
    kept = valid & own_rows(mesh, batch)
    return kept, place[kept]


def of_batches(batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, batch: int, count: int) -> Images:
    """The pictures of evaluation batches (`setup.evaluation_batches`) of `count` examples, and their positions."""
    for step, arrays in enumerate(batches):
        kept, place = positions(mesh, batch, count, step, arrays["valid"])
        yield to_uint8(arrays["image"][kept]), place
