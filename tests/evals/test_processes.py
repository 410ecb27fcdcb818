"""Two real processes that meet over gloo score what one does: sums are exact, each reads its own part."""

from pathlib import Path

import numpy as np
import pytest

from tests.evals.nets import pictures
from tests.processes import free_address, results_of, run_together
from vqgan_jax.images import save_png

PROGRAM = """
import json, sys
import jax
address, processes, index, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if processes > 1:
    jax.distributed.initialize(address, processes, index, coordinator_bind_address=address,
                               cluster_detection_method="deactivate")
import numpy as np
from tests.evals.nets import small_net
from vqgan_jax import parallel
from vqgan_jax.evals.features import PRESETS, make_extractor
from vqgan_jax.evals.moments import Moments, all_hosts, gather
from vqgan_jax.evals.references import collect_pairs, compare, open_reference

mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
extract = make_extractor(small_net(), PRESETS["torch-fidelity"], mesh, 4)
cache = f"{folder}/cache_{processes}" + (f"_{index}" if sys.argv[5] == "apart" else "")
with jax.set_mesh(mesh):  # as the scripts have it
    opened = [open_reference(f"{folder}/{name}", extract, cache=cache, preset_stated=True, keep=20)
              for name in ("a", "b.npz") * 2]

def pairs():
    mine = np.arange(index, 11, processes)
    pixels = np.load(f"{folder}/b.npz")["arr_0"]
    yield pixels[mine], pixels[::-1][mine] // 2, mine

originals, rebuilt = collect_pairs(pairs(), extract, count=11, source={})
# What float32 cannot hold, and what a sum in another order would change
exact = all_hosts(Moments(index + 1, np.array([1 + 2.0**-40 * (index + 1)]), np.array([[1e17 * index + 1]])))
print("RESULT", json.dumps({
    "generation": compare(opened[0], opened[1]), "again": compare(opened[2], opened[3]),
    "rfid": compare(rebuilt, originals),
    "mean": opened[0].pool.mean.tolist(), "features": opened[0].features.tolist(),
    "sums": [exact.count, (exact.total - 2).tolist(), exact.outer.tolist(), gather(np.array([2**40 + index])).tolist()],
}))
"""


def run(folder: Path, processes: int, cache: str = "shared") -> list[dict]:
    address = free_address()
    arguments = [["-c", PROGRAM, address, str(processes), str(k), str(folder), cache] for k in range(processes)]
    return results_of(run_together(arguments, {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}, timeout=300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for k, image in enumerate(pictures(27, seed=1)):
        save_png(folder / "a" / f"{k:02d}.png", image)
    np.savez(folder / "b.npz", arr_0=pictures(70, seed=2))  # pieces of 32 rows: more of them for the first process
    return folder


def test_two_processes_equal_one(folder):
    (alone,) = run(folder, 1)
    both = run(folder, 2)
    assert both[0] == both[1]  # to the bit, on every host
    for name in ("generation", "again", "rfid"):
        assert both[0][name].keys() == alone[name].keys()
        assert both[0][name] == pytest.approx(alone[name], rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(both[0]["mean"], alone["mean"], rtol=1e-6)
    np.testing.assert_allclose(both[0]["features"], alone["features"], atol=2e-6)
    count, total, outer, gathered = both[0]["sums"]
    assert count == 3 and total == [3 * 2.0**-40] and outer == [[1e17 + 2]] and gathered == [[2**40], [2**40 + 1]]


def test_the_cache_of_hosts_that_share_no_folder(folder):
    apart = run(folder, 2, "apart")
    assert apart[0] == apart[1] and apart[0]["again"] == apart[0]["generation"]
    for index in range(2):
        assert len(list((folder / f"cache_2_{index}").iterdir())) == 2
