"""Two real processes that meet over gloo train as one does, on meshes whose model axes span both; what they save is
restored on one device and on four."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from tests.processes import free_address, results_of, run_together
from tests.test_parallel import STEPS, mesh_of, on_one_device, transformer_case, vqgan_case
from vqgan_jax import parallel
from vqgan_jax.train import setup
from vqgan_jax.train.checkpoints import Checkpoints

SAVED = 3  # steps that the two processes train
CASES = {"transformer": transformer_case, "vqgan": vqgan_case}
MESHES = {  # of two hosts with two devices each: a model axis spans the hosts
    "tensor": ("transformer", dict(data=1, fsdp=1, tensor=4)),
    "fsdp": ("transformer", dict(data=1, fsdp=4, tensor=1)),
    "gan": ("vqgan", dict(data=1, fsdp=4, tensor=1)),
}


def train(workdir: Path, case: str, sizes: dict[str, int], total: int) -> list[float]:
    """Goes on from the newest checkpoint, else from the start, to `total` steps, and saves: the loss of each step."""
    init, step, rows, *frozen = CASES[case]()
    mesh = mesh_of(sizes)
    mine, losses = parallel.host_rows(mesh, 8), []
    settings = dict(keep_last=1, keep_best=0)
    with Checkpoints(workdir, **settings) as checkpoints, jax.set_mesh(mesh):
        restored = checkpoints.restore(parallel.abstract_sharded(init, mesh, jax.random.key(0)))
        state = restored[0] if restored else parallel.init_sharded(init, mesh, jax.random.key(0))
        frozen = parallel.put_tree(frozen[0] if frozen else {}, mesh)
        compiled = setup.jit_step(step, lambda step: 0.001, state)
        for k in range(int(state.step), total):
            batch = parallel.put_batch({name: x[k][mine] for name, x in rows.items()}, mesh, 8)
            parallel.check_hosts_agree(batch, mesh)
            state, metrics = compiled(state, batch, frozen)
            losses.append(float(metrics["loss"]))
        checkpoints.save(total, state, {"step": total}, None)
        checkpoints.wait()
    return losses


class OwnRow:
    """Eight examples; one of them differs from host to host."""

    classes = ()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> np.ndarray:
        return np.int32(index + 100 * (index == 5) * jax.process_index())


def as_label(example: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"label": example}


def disagree() -> str:
    """What the trainers say where the second host reads a row of its own."""
    config = common.run()
    config.batch_size, config.data = 8, common.data()
    try:
        setup.training_batches(config, mesh_of(MESHES["tensor"][1]), OwnRow(), as_label, 0).close()
    except parallel.UserError as error:
        return str(error)
    return ""


def main(address: str, index: int, folder: Path, stage: str) -> None:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        address, 2, index, coordinator_bind_address=address, cluster_detection_method="deactivate"
    )
    runs = {name: sizes for name, (case, sizes) in MESHES.items() if case == stage}
    losses = {name: train(folder / name, stage, sizes, SAVED) for name, sizes in runs.items()}
    alone = {name: train(folder / "alone" / name, stage, sizes, STEPS) for name, sizes in runs.items()}
    print("RESULT", json.dumps({"losses": losses, "alone": alone, "disagree": disagree()}))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """By stage: what both processes say, and the folder with their checkpoints."""
    return functools.cache(lambda stage: run_hosts(stage, tmp_path_factory.mktemp("hosts")))


def run_hosts(stage: str, folder: Path):
    runs = [name for name, (case, _) in MESHES.items() if case == stage]
    train(folder / "alone" / runs[0], stage, dict(data=1, fsdp=1, tensor=1), SAVED)
    for name in runs[1:]:
        shutil.copytree(folder / "alone" / runs[0], folder / "alone" / name)
    address = free_address()
    arguments = [[__file__, address, str(index), str(folder), stage] for index in range(2)]
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return results_of(run_together(arguments, settings, timeout=400)), folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_two_hosts_train_as_one_and_restore_on_one_device_and_four(hosts, name, tmp_path):
    case, _ = MESHES[name]
    (first, second), folder = hosts(case)
    expected = [float(metrics["loss"]) for metrics in on_one_device(CASES[case])[1]]
    assert first["losses"][name] == second["losses"][name]
    # From the second step on the adaptive weight of a GAN is only as exact as a gradient that nearly cancels.
    exact = dict(rtol=1e-5) if case == "transformer" else dict(rtol=2e-3)
    np.testing.assert_allclose(first["losses"][name], expected[:SAVED], **exact)
    np.testing.assert_allclose(first["losses"][name][0], expected[0], rtol=1e-5)
    four = dict(data=2, fsdp=2, tensor=1) if name == "gan" else dict(data=2, fsdp=1, tensor=2)
    for k, sizes in enumerate((dict(data=1, fsdp=1, tensor=1), four)):
        copied = tmp_path / str(k)
        subprocess.run(["cp", "-r", folder / name, copied], check=True)
        np.testing.assert_allclose(train(copied, case, sizes, STEPS), expected[SAVED:], **exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_two_hosts_go_on_from_what_one_device_saved(hosts, name):
    case, _ = MESHES[name]
    (first, second), _ = hosts(case)
    expected = [float(metrics["loss"]) for metrics in on_one_device(CASES[case])[1]]
    assert first["alone"][name] == second["alone"][name]
    exact = dict(rtol=1e-5) if case == "transformer" else dict(rtol=2e-3)
    np.testing.assert_allclose(first["alone"][name], expected[SAVED:], **exact)


@pytest.mark.slow
def test_hosts_that_read_other_rows_of_one_shard_are_named(hosts):
    for said in hosts("transformer")[0]:
        assert said["disagree"].startswith("config.data: hosts 0, 1 share data shard 0 of 1 but read different")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
