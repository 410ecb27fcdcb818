"""Checkpoints come back bit for bit or not at all, and a damaged one is never trusted."""

import json
import os
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.processes import free_address, run_together
from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.train import manifests
from vqgan_jax.train.checkpoints import Checkpoints, load


@struct.dataclass
class State:
    step: jax.Array
    key: jax.Array
    params: dict
    opt_state: tuple
    empty: dict


def make_state(step: int = 0) -> State:
    params = {"kernel": jnp.full((4, 3), step + 0.5, jnp.bfloat16), "bias": jnp.arange(3.0)}
    return State(jnp.int32(step), jax.random.key(step), params, optax.adam(1e-3).init(params), {})


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a: State, b: State) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def open_checkpoints(directory: Path, keep_last: int = 3, keep_best: int = 0, **options) -> Checkpoints:
    return Checkpoints(directory, keep_last=keep_last, keep_best=keep_best, **options)


def save_steps(directory: Path, steps, metrics=None, **options) -> None:
    with open_checkpoints(directory, **options) as checkpoints:
        for step in steps:
            scalars = None if metrics is None else metrics.get(step)
            checkpoints.save(step, make_state(step), {"step": step, "config": {"a": None}}, scalars)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def largest_file(folder: Path) -> Path:
    return max((p for p in (folder / "state" / "d").iterdir() if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": lambda folder: flip(largest_file(folder)),
    "truncated": lambda folder: os.truncate(largest_file(folder), 3),
    "missing": lambda folder: largest_file(folder).unlink(),
    "record": lambda folder: flip(folder / "record" / "metadata"),
    "unsealed": lambda folder: (folder / "manifest.json").unlink(),
    "manifest": lambda folder: os.truncate(folder / "manifest.json", 20),
}


def test_round_trip_and_record(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None
        checkpoints.save(3, make_state(3), {"seed": 7, "config": {"a": [1, None]}}, None)
        state, record = checkpoints.restore(abstract(make_state()))
    assert_same(state, make_state(3))
    assert record == {"seed": 7, "config": {"a": [1, None]}}


def test_read_only_leaves_a_run_that_may_be_going_on_as_it_is(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    (tmp_path / "30" / "manifest.json").unlink()  # its save is under way
    flip(largest_file(tmp_path / "20"))
    (tmp_path / "40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with open_checkpoints(tmp_path, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(abstract(make_state()))
    assert_same(state, make_state(10))
    assert sorted(tmp_path.rglob("*")) == before


def test_saved_values_survive_donation(tmp_path):
    step = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda p: p * 0 - 1, s.params)), donate_argnums=0)
    state = make_state(5).replace(params={"kernel": jnp.full((512, 512), 5.5), "bias": jnp.arange(3.0)})
    wanted = abstract(state)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {}, None)
        for _ in range(3):
            state = step(state)
        restored, _ = checkpoints.restore(wanted)
    np.testing.assert_array_equal(restored.params["kernel"], np.full((512, 512), 5.5))
    assert float(state.params["kernel"][0, 0]) == -1


def test_poll_seals_without_wait(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {}, None)
        deadline = time.monotonic() + 20
        while checkpoints.latest_step() is None and time.monotonic() < deadline:
            checkpoints.poll()
            time.sleep(0.005)
        assert checkpoints.latest_step() == 1
        assert load(tmp_path)[0]["step"] == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_passed_over_and_can_be_saved_again(tmp_path, caplog, damage):
    save_steps(tmp_path, [10, 20])
    DAMAGE[damage](tmp_path / "20")
    with open_checkpoints(tmp_path) as checkpoints:
        state, record = checkpoints.restore(abstract(make_state()))
        assert_same(state, make_state(10))
        assert record["step"] == 10
        assert (tmp_path / "20.damaged").is_dir()
        assert [r.getMessage().count("20.damaged") for r in caplog.records if "damaged" in r.getMessage()] == [1]
        checkpoints.save(20, make_state(20), {"step": 20}, None)
    assert load(tmp_path)[1] == {"step": 20}


def test_all_damaged_is_an_error_and_moves_nothing(tmp_path):
    save_steps(tmp_path, [10, 20])
    for step in (10, 20):
        DAMAGE["flipped"](tmp_path / str(step))
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="every checkpoint is damaged.*20: state/d/.*10: state/d/"):
            checkpoints.restore(abstract(make_state()))
    assert steps_in(tmp_path) == [10, 20]
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)


def test_killed_in_its_first_save_starts_afresh(tmp_path):
    save_steps(tmp_path, [10])
    DAMAGE["unsealed"](tmp_path / "10")
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(abstract(make_state())) is None
    assert steps_in(tmp_path) == []


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s.replace(step=jax.ShapeDtypeStruct((), jnp.float32)), "step: int32.* there, float32"),
        (lambda s: s.replace(step=jax.ShapeDtypeStruct((2,), jnp.int32)), r"step: int32\[\] there, int32\[2\]"),
        (lambda s: s.replace(params={"bias": s.params["bias"]}), "params/kernel: bfloat16.* there, nothing here"),
        (lambda s: s.replace(empty={"new": s.step}), "empty/new: nothing there, int32"),
        (lambda s: s.replace(opt_state=(s.opt_state[0]._replace(count=s.key), s.opt_state[1])), "opt_state/0/count"),
    ],
)
def test_mismatched_trees_name_their_leaves(tmp_path, change, named):
    save_steps(tmp_path, [1])
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=named):
            checkpoints.restore(change(abstract(make_state())))


def test_keep_last_and_keep_best(tmp_path):
    values = {1: float("nan"), 2: 0.1, 3: 5.0, 4: 0.2, 6: 3.0}
    losses = {step: {"loss": value} for step, value in values.items()}
    save_steps(tmp_path, range(1, 9), losses, keep_last=2, keep_best=2, best_metric="loss")
    assert steps_in(tmp_path) == [2, 4, 7, 8]
    with open_checkpoints(tmp_path, 2, 2, best_metric="loss") as checkpoints:  # the ranking survives a restart
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (8, 2)
        checkpoints.save(9, make_state(9), {}, {"loss": 0.01})
        checkpoints.wait()
        assert checkpoints.best_step() == 9
    assert steps_in(tmp_path) == [2, 8, 9]
    assert load(tmp_path, best=True)[0]["step"] == 9


def test_best_mode_max(tmp_path):
    save_steps(
        tmp_path, [1, 2, 3, 4], {k: {"psnr": -abs(k - 2)} for k in range(1, 5)}, keep_best=1, best_metric="psnr",
        best_mode="max", keep_last=2,
    )  # fmt: skip
    assert steps_in(tmp_path) == [2, 3, 4]
    assert load(tmp_path, best=True)[0]["step"] == 2


def test_keep_last_1_keeps_a_whole_one_at_any_time(tmp_path, monkeypatch):
    """Between Orbax's commit of step 2 and its manifest, step 1 must still be there."""
    seen = []
    write = manifests.write

    def look_and_write(*args):
        seen.append(int(load(tmp_path)[0]["step"]))
        write(*args)

    with open_checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, make_state(1), {}, None)
        checkpoints.wait()
        monkeypatch.setattr(manifests, "write", look_and_write)
        checkpoints.save(2, make_state(2), {}, None)
    assert seen == [1]


def test_load_only_and_by_step(tmp_path):
    save_steps(tmp_path, [1, 2])
    arrays, record = load(tmp_path, step=1, only=("params", "empty"))
    assert set(arrays) == {"params", "empty"} and record["step"] == 1
    assert type(arrays["params"]["kernel"]) is np.ndarray and arrays["params"]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(arrays["params"]["kernel"], np.full((4, 3), 1.5))
    np.testing.assert_array_equal(load(tmp_path)[0]["key"], jax.random.key_data(jax.random.key(2)))
    with pytest.raises(UserError, match="no entry 'param', did you mean 'params'"):
        load(tmp_path, only=("param",))
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        load(tmp_path, step=3)
    assert load(tmp_path, best=True)[1] == load(tmp_path)[1]  # none was evaluated: the newest
    with pytest.raises(UserError, match="no checkpoint there"):
        load(tmp_path / "nowhere")
    DAMAGE["flipped"](tmp_path / "2")
    assert load(tmp_path)[1]["step"] == 1
    assert steps_in(tmp_path) == [1, 2]  # a reader moves nothing


@pytest.mark.parametrize(
    "options, named",
    [
        ({"keep_last": 0}, "keep_last"),
        ({"keep_best": 1}, "keep_best"),
        ({"best_mode": "mim"}, "did you mean 'min'"),
    ],
)
def test_contradictory_policies_are_refused(tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        open_checkpoints(tmp_path, **options)


def test_unknown_best_metric_names_the_near_one(tmp_path):
    with open_checkpoints(tmp_path, keep_best=1, best_metric="val/los") as checkpoints:
        with pytest.raises(UserError, match="did you mean 'val/loss'"):
            checkpoints.save(1, make_state(1), {}, {"val/loss": 1.0})


def test_unwritable_workdir_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/checkpoints: cannot be written"):
        open_checkpoints(tmp_path / "file" / "checkpoints")


FULL_DISK = """
import resource, signal, sys
import numpy as np
from vqgan_jax.config import UserError
from vqgan_jax.train.checkpoints import Checkpoints, load
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = sys.argv[1]
state = {"w": np.random.default_rng(0).standard_normal(1 << 18)}
checkpoints = Checkpoints(directory, keep_last=2, keep_best=0)
checkpoints.save(1, state, {}, None)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, state, {}, None)
    checkpoints.wait()
except UserError as error:
    print("REFUSED", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.close()
print("latest", checkpoints.latest_step(), load(directory)[0]["w"].shape)
"""


def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path):
    done = run_python(FULL_DISK, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 2 was not saved" in done.stdout and "of step 1" in done.stdout
    assert len([line for line in done.stdout.splitlines() if "REFUSED" in line]) == 1
    assert "latest 1 (262144,)" in done.stdout
    assert steps_in(tmp_path) == [1]
    assert "Traceback" not in done.stderr
    save_steps(tmp_path, [2])
    assert load(tmp_path)[1]["step"] == 2


TWO_PROCESSES = """
import os, sys
import jax
rank, address, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, rank, coordinator_bind_address=address, cluster_detection_method="deactivate")
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vqgan_jax import storage
from vqgan_jax.train.checkpoints import Checkpoints
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
values = np.arange(8, dtype=np.float32)
make = lambda k: {"w": jax.make_array_from_callback((8,), sharding, lambda index: (values + k)[index])}
with Checkpoints(directory, keep_last=2, keep_best=0) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, make(step), {"step": step}, None)
        checkpoints.poll()
    checkpoints.wait()
    jax.experimental.multihost_utils.sync_global_devices("saved")
    if rank == 0:
        (storage.path(directory) / "3" / "manifest.json").write_text("{")
    abstract = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}
    state, record = checkpoints.restore(abstract)
    assert record == {"step": 2}
    for shard in state["w"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), (values + 2)[shard.index])
    checkpoints.save(3, make(3), {"step": 3}, None)
    checkpoints.wait()
print("whole", rank)
"""


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_two_processes_agree_on_the_step(tmp_path, kind, request):
    directory = str(tmp_path) if kind == "local" else request.getfixturevalue("bucket")
    address = free_address()
    arguments = [["-c", TWO_PROCESSES, str(rank), address, directory] for rank in (0, 1)]
    for process in run_together(arguments, ONE_DEVICE, timeout=120):
        assert process.returncode == 0, process.stderr
    assert load(directory)[1]["step"] == 3
    np.testing.assert_array_equal(load(directory)[0]["w"], np.arange(8, dtype=np.float32) + 3)
    assert (storage.path(directory) / "3.damaged").is_dir()


def test_restores_onto_another_sharding(tmp_path):
    save_steps(tmp_path, [4])
    replicated = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), jax.eval_shape(lambda: make_state())
    )
    with open_checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(wanted)
    assert_same(state, make_state(4))
    assert state.params["bias"].sharding == replicated


def test_the_manifest_lists_every_file(tmp_path):
    save_steps(tmp_path, [1])
    named = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    there = {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert set(named) == there - {"manifest.json"}


ONE_DEVICE = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}


def run_python(code: str, *args: str) -> subprocess.CompletedProcess:
    return run_together([["-c", code, *args]], ONE_DEVICE, timeout=120)[0]
