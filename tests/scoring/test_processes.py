"""Two processes that meet over gloo score a workdir as one does."""

import json
from pathlib import Path

import pytest

from tests.processes import free_address, results_of, run_together

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)
address, processes, index, workdir, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
if processes > 1:
    jax.distributed.initialize(address, processes, index, coordinator_bind_address=address,
                               cluster_detection_method="deactivate")
import evaluate
from tests.evals.nets import small_net
from vqgan_jax.scoring import judges
judges.CLASSIFIER_STEPS = 5
def score(name, **fields):
    asked = evaluate.Asked(preset="torch-fidelity", net=small_net(), **fields)
    found = evaluate.evaluate(workdir, f"{out}/{name}.json", batch=8, examples=0, samples=21, seed=3, asked=asked)
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
print("RESULT", json.dumps([score("plain", memorisation=8), score("rejected", acceptance=0.5)]))
"""


def run(processes: int, devices: int, workdir: Path, out: Path) -> list[list[dict]]:
    out.mkdir()
    address = free_address()
    arguments = [["-c", PROGRAM, address, str(processes), str(k), str(workdir), str(out)] for k in range(processes)]
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return results_of(run_together(arguments, settings, timeout=550))


@pytest.mark.slow
def test_two_processes_score_a_workdir_as_one_does(runs, tmp_path):
    """Four samples a device and batch on both sides, for decoding rounds as its batch size does."""
    (alone,) = run(1, 2, runs / "gpt", tmp_path / "one")
    both = run(2, 1, runs / "gpt", tmp_path / "two")
    assert both[0] == both[1]
    for here, there in zip(alone, both[0], strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            assert there[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    written = json.loads((tmp_path / "two" / "plain.json").read_text())
    assert written["fid"] == both[0][0]["fid"] and (tmp_path / "two" / "nearest.png").exists()
