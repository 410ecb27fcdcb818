"""A run that is stopped, preempted or killed and started again equals one that never was, bit for bit.

Run as a script, this file trains the toy model: `test_loop.py WORKDIR [SABOTAGE]`, where SABOTAGE kills the process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqgan_jax import cli, storage
from vqgan_jax.config import UserError
from vqgan_jax.train import checkpoints as checkpoints_module
from vqgan_jax.train import loop as loop_module
from vqgan_jax.train.checkpoints import Checkpoints, load
from vqgan_jax.train.loop import Schedule, train
from vqgan_jax.train.metric_writer import open_writer

TOTAL, SAVE = 24, 6


@struct.dataclass
class State:
    step: jax.Array
    key: jax.Array
    params: dict
    opt_state: tuple
    skipped: jax.Array


class Batches:
    """Batch k is a function of k alone; `bad` steps hold a NaN."""

    def __init__(self, start_step: int, bad: tuple[int, ...] = (), hook=lambda step: None):
        self.step, self.bad, self.hook, self.closed, self.wait_seconds = start_step, bad, hook, False, 0.25

    def __next__(self) -> dict:
        self.hook(self.step)
        rng = np.random.default_rng(self.step)
        x = rng.standard_normal((8, 3)).astype(np.float32)
        if self.step in self.bad:
            x[0, 0] = np.nan
        self.step += 1
        return {"x": jax.device_put(x), "codes/top": jax.device_put(np.arange(8))}

    def close(self) -> None:
        self.closed = True


OPTIMIZER = optax.adam(0.05)


@jax.jit
def initial() -> State:
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    return State(jnp.int32(0), jax.random.key(3), params, OPTIMIZER.init(params), jnp.int32(0))


def step_fn(state: State, batch: dict) -> tuple[State, dict]:
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (8,))

    def loss_of(params):
        return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["x"].sum(1) - 0.1 * noise) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
    new = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state, key=None)
    kept = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(loss), a, b), new, state.replace(key=None))
    bad = ~jnp.isfinite(loss)
    state = kept.replace(key=state.key, step=state.step + 1, skipped=state.skipped + bad)
    return state, {"loss": loss, "norm": optax.tree.norm(state.params), "skipped": bad.astype(jnp.float32)}


STEP = jax.jit(step_fn, donate_argnums=0)


def run(workdir: Path, *, total=TOTAL, bad=(), hook=lambda step: None, budget=0, save=SAVE, **options) -> State:
    """What an entry script does: restore, cut the logs back, train."""
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        jax.eval_shape(initial),
    )
    schedule = Schedule(total=total, log=2, evaluate=4, save=save, images=12)
    settings = dict(keep_last=2, keep_best=1, best_metric="val/loss")
    with Checkpoints(workdir / "checkpoints", **settings) as checkpoints:
        restored = checkpoints.restore(wanted)
        state, start = (initial(), 0) if restored is None else (restored[0], restored[1]["step"])
        with open_writer(workdir, resume_step=start) as writer:
            return train(
                state,
                **dict(
                    step_fn=STEP,
                    batches=Batches(start, bad, hook),
                    schedule=schedule,
                    checkpoints=checkpoints,
                    writer=writer,
                    record={"format_version": 1, "seed": 3},
                    start_step=start,
                    start_examples=8 * start,
                    workdir=workdir,
                    nonfinite_budget=budget,
                    examples_per_step=8,
                    evaluate=lambda state, step: {"loss": float(jnp.abs(state.params["w"] - 1).sum())},
                    draw=lambda state, step: {"val/w": np.full((4, 6, 3), step % 256, np.uint8)},
                )
                | options,
            )


def logged(workdir: Path) -> list[dict]:
    timed = ("time", "images/s", "step_seconds", "step_seconds_p99", "data_wait_seconds", "data_wait_share")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def in_tensorboard(workdir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def assert_equal_runs(a: Path, b: Path, total: int = TOTAL) -> None:
    (x, x_record), (y, y_record) = load(a / "checkpoints"), load(b / "checkpoints")
    assert x_record == y_record and x["step"] == total
    jax.tree.map(np.testing.assert_array_equal, x, y)
    assert logged(a) == logged(b)
    assert in_tensorboard(a, "loss") == in_tensorboard(b, "loss")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return workdir


def test_order_and_schedule(tmp_path):
    events = []

    class Recorder(Checkpoints):
        def save(self, step, state, record, metrics):
            events.append(("save", step, metrics and sorted(metrics)))
            super().save(step, state, record, metrics)

    batches = Batches(0, hook=lambda step: events.append(("batch", step)))
    with (
        Recorder(tmp_path / "c", keep_last=1, keep_best=0) as checkpoints,
        open_writer(tmp_path, resume_step=0) as writer,
    ):
        train(
            initial(),
            step_fn=STEP,
            batches=batches,
            schedule=Schedule(total=5, log=0, evaluate=2, save=2, images=3),
            checkpoints=checkpoints,
            writer=writer,
            record={},
            start_step=0,
            start_examples=0,
            workdir=tmp_path,
            nonfinite_budget=0,
            examples_per_step=8,
            evaluate=lambda state, step: events.append(("evaluate", step, int(state.step))) or {"val/loss": 1.0},
            draw=lambda state, step: events.append(("draw", step)) or {"a/b": np.zeros((2, 2, 3), np.uint8)},
        )
        assert checkpoints.latest_step() == 5
    assert events == [
        ("batch", 0),
        ("batch", 1),
        ("evaluate", 2, 2),
        ("save", 2, ["val/loss"]),
        ("batch", 2),
        ("draw", 3),
        ("batch", 3),
        ("evaluate", 4, 4),
        ("save", 4, ["val/loss"]),
        ("batch", 4),
        ("evaluate", 5, 5),
        ("draw", 5),
        ("save", 5, ["val/loss"]),
    ]
    assert batches.closed


def test_what_is_logged(whole):
    lines = logged(whole)
    losses = {line["step"]: line for line in lines if "loss" in line}
    assert list(losses) == list(range(2, TOTAL + 1, 2))
    assert [line["step"] for line in lines if "val/loss" in line] == list(range(4, TOTAL + 1, 4))
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["images/s"] == pytest.approx(8 / last["step_seconds"])
    assert last["step_seconds_p99"] >= last["step_seconds"] * 0.5 and last["data_wait_seconds"] == 0.25
    pictures = sorted(path.name for path in (whole / "images").iterdir())
    assert pictures == ["val_w_00000012.png", "val_w_00000024.png"]
    assert np.asarray(Image.open(whole / "images" / pictures[0]))[0, 0, 0] == 12
    # The number logged at step 2 is the loss of the second step itself, not of a later one.
    state, batches = initial(), Batches(0)
    for _ in range(2):
        state, metrics = STEP(state, next(batches))
    assert losses[2]["loss"] == float(metrics["loss"])


def test_units_and_plain_lines(tmp_path, capsys):
    run(tmp_path, total=8, units={"tokens/s": 16})
    out = capsys.readouterr().out.splitlines()
    steps = [line.split(":")[0] for line in out]
    assert [s for s in steps if "/" in s] == ["step 2/8", "step 4/8", "step 6/8", "step 8/8"]
    assert "loss=" in out[0] and "images/s" in out[-2]
    line = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()][-2]
    assert line["tokens/s"] == pytest.approx(2 * line["images/s"])


def test_speeds_leave_out_evaluations(tmp_path, monkeypatch):
    """On a clock that moves 1 s a batch and 100 s an evaluation, the second interval runs at 1 s a step."""
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run(
        tmp_path,
        total=8,
        schedule=Schedule(total=8, log=4, evaluate=4, save=0, images=0),
        hook=lambda step: pass_time(1.0),
        evaluate=lambda state, step: pass_time(100.0) or {"loss": 0.0},
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    speed = next(line for line in lines if line["step"] == 8 and "images/s" in line)
    assert (speed["images/s"], speed["step_seconds"]) == (8.0, 1.0)


def test_dispatches_before_it_reads(tmp_path, monkeypatch):
    """The metrics of step n are read only once step n + 1 is dispatched, but where something is due."""
    events = []
    read = jax.device_get

    def spy(tree):
        if isinstance(tree, dict) and "loss" in tree:
            events.append("read")
        return read(tree)

    def step(state, batch):
        events.append("dispatch")
        return STEP(state, batch)

    monkeypatch.setattr(jax, "device_get", spy)
    run(tmp_path, total=3, step_fn=step, evaluate=None, draw=None)
    assert events == ["dispatch", "dispatch", "read", "dispatch", "read", "read"]


def test_finished_run_returns_at_once(tmp_path, capsys):
    run(tmp_path, total=6)
    before = logged(tmp_path)
    run(tmp_path, total=6, hook=lambda step: pytest.fail("took a batch"))
    assert "already finished: 6 of 6" in capsys.readouterr().out
    assert logged(tmp_path) == before


def test_an_exception_keeps_the_last_checkpoint_whole(tmp_path, whole):
    class Broken(Exception): ...

    def fail(step):
        if step == 14:
            raise Broken

    batches = Batches(0, hook=fail)
    with pytest.raises(Broken):
        run(tmp_path, batches=batches)
    assert batches.closed and load(tmp_path / "checkpoints")[1]["step"] == 12
    run(tmp_path)
    assert_equal_runs(tmp_path, whole)


def test_save_0_is_never(tmp_path):
    run(tmp_path, total=4, save=0)
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "checkpoints")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 4, 11])
def test_a_signal_saves_and_exits_42(tmp_path, whole, capsys, number, at):
    """The signal arrives while the batch of step `at` is taken, so at + 1 steps are completed."""
    previous = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, hook=lambda step: os.kill(os.getpid(), number) if step == at else None)
    assert exit_.value.code == 42
    assert f"preempted at step {at + 1}: saved" in capsys.readouterr().out
    assert load(tmp_path / "checkpoints")[1]["step"] == at + 1
    assert signal.getsignal(number) is previous
    run(tmp_path)
    (x, _), (y, _) = load(whole / "checkpoints"), load(tmp_path / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, x, y)
    assert in_tensorboard(tmp_path, "loss") == in_tensorboard(whole, "loss")


def test_a_signal_in_the_last_step_finishes(tmp_path):
    state = run(tmp_path, total=6, hook=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    assert int(state.step) == 6 and load(tmp_path / "checkpoints")[1]["step"] == 6
    assert "val/loss" in logged(tmp_path)[-1]


def test_a_signal_without_saves_saves_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, save=0, hook=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    assert exit_.value.code == 42
    assert "preempted at step 3: nothing to save" in capsys.readouterr().out
    assert not list((tmp_path / "checkpoints").iterdir())


def test_saved_is_said_once_it_is_true(tmp_path, monkeypatch):
    said = []

    def say(text):
        if "preempted" in text:
            said.append((text, load(tmp_path / "checkpoints")[1]["step"]))

    monkeypatch.setattr(loop_module, "say", say)
    with pytest.raises(SystemExit):
        run(tmp_path, hook=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    assert said == [("preempted at step 3: saved", 3)]


def test_checkpoints_are_sealed_while_the_run_goes_on(tmp_path):
    sealed = []

    def look(step):
        if step > SAVE:
            time.sleep(0.05)
            sealed.append((tmp_path / "checkpoints" / str(SAVE) / "manifest.json").exists())

    run(tmp_path, total=2 * SAVE, hook=look)
    assert sealed[-1]


def test_the_second_sigint_interrupts(tmp_path):
    def twice(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, hook=twice)


def test_nonfinite_steps_are_counted_and_kept_over_a_resumption(tmp_path, capsys):
    run(tmp_path, total=6, bad=(2, 3), budget=3)
    out = capsys.readouterr().out
    assert "step 3 was not finite (loss): the old state was kept (1 of 3 allowed)" in out
    assert {line["step"]: line["skipped"] for line in logged(tmp_path) if "skipped" in line} == {2: 0, 4: 2, 6: 2}
    assert sorted(p.name for p in (tmp_path / "nonfinite").iterdir()) == ["step_00000003.npz", "step_00000004.npz"]
    with pytest.raises(UserError, match=r"step 10 was not finite \(loss\).*allows 3.*step_00000010.npz"):
        run(tmp_path, total=12, bad=(7, 9), budget=3)
    batch = np.load(tmp_path / "nonfinite" / "step_00000010.npz")
    assert np.isnan(batch["x"][0, 0]) and batch["x"].shape == (8, 3)
    np.testing.assert_array_equal(batch["codes/top"], np.arange(8))
    assert load(tmp_path / "checkpoints")[1]["step"] == 6


def test_profile_writes_a_trace(tmp_path):
    run(tmp_path, total=6, profile=(2, 4))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(tmp_path, total=6, headline=("norm",))
    captured = capsys.readouterr()
    assert "6/6" in captured.err and "norm=" in captured.err and "loss=" not in captured.err
    assert "step 2/6" not in captured.out and "step 4: val/loss=" in captured.out


def toy_process(*args: str, script: str = __file__, **env: str) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    settings = {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, script, *args]
    return subprocess.Popen(
        command, env=os.environ | settings | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def toy_pair(workdir: Path, **env: str) -> list[subprocess.Popen]:
    """Two processes that train the toy model together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [toy_process(str(workdir), "pair", RANK=str(rank), PORT=port, **env) for rank in (0, 1)]


def test_sigterm_to_a_process(tmp_path, whole):
    process = toy_process(str(tmp_path), "slow")
    while "step 4/" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 42, err
    assert "preempted at step" in out and "Traceback" not in err
    run(tmp_path)
    assert in_tensorboard(tmp_path, "loss") == in_tensorboard(whole, "loss")
    (x, _), (y, _) = load(whole / "checkpoints"), load(tmp_path / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, x, y)


# Where the process kills itself with SIGKILL in the save of step 12, and the newest step that must survive.
SABOTAGES = {"orbax": 6, "delay": None, "committed": 6, "manifest": 6, "sealed": 12}


@pytest.mark.parametrize("moment", SABOTAGES)
def test_killed_in_a_save(tmp_path, whole, moment):
    process = toy_process(str(tmp_path), moment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    survived = load(tmp_path / "checkpoints")[1]["step"]
    assert survived == (SABOTAGES[moment] or survived) and survived in (6, 12)
    run(tmp_path)
    assert_equal_runs(tmp_path, whole)


def test_killed_in_a_save_in_a_bucket(tmp_path, whole, bucket):
    process = toy_process(bucket, "committed")
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    workdir = storage.path(bucket)
    assert load(workdir / "checkpoints")[1]["step"] == 6 and (workdir / "checkpoints" / "12" / "state").exists()
    run(workdir)
    for file in storage.files(workdir):
        storage.write_bytes(tmp_path / file.relative_to(workdir), file.read_bytes())
    assert_equal_runs(tmp_path, whole)
    assert {p.name for p in (tmp_path / "images").iterdir()} == {p.name for p in (whole / "images").iterdir()}


def test_two_processes_stop_at_one_step(tmp_path):
    """SIGTERM to one process of two: both save the same step and leave with 42."""
    processes = toy_pair(tmp_path)
    while "step 4/" not in (line := processes[0].stdout.readline()):
        assert line or processes[0].poll() is None, processes[0].stderr.read()
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [42, 42], outputs
    saved = load(tmp_path / "checkpoints")[1]["step"]
    assert f"preempted at step {saved}: saved" in outputs[0][0] and "preempted" not in outputs[1][0]
    assert 4 <= saved < 400


def sabotage(moment: str) -> None:
    """Replaces a function of the checkpoints by one that kills the process in the save of step 12."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def at_12(before=None, after=None):
        def wrap(original):
            def wrapped(folder, *args):
                doomed = "/12" in str(folder)
                if doomed and before:
                    before()
                original(folder, *args)
                if doomed and after:
                    after()

            return wrapped

        return wrap

    save = Checkpoints.save

    def save_then(self, step, *args, seconds):
        save(self, step, *args)
        if step == 12:
            time.sleep(seconds)
            die()

    if moment == "orbax":
        Checkpoints.save = lambda self, step, *args: save_then(self, step, *args, seconds=0)
    if moment == "delay":
        Checkpoints.save = lambda self, step, *args: save_then(self, step, *args, seconds=0.01)
    if moment == "committed":
        checkpoints_module._write_manifest = at_12(before=die)(checkpoints_module._write_manifest)
    if moment == "manifest":
        write = Path.replace
        Path.replace = lambda self, target: die() if "/12/manifest" in str(target) else write(self, target)
    if moment == "sealed":
        checkpoints_module._write_manifest = at_12(after=die)(checkpoints_module._write_manifest)


def main(workdir: str, how: str) -> None:
    if how == "slow":
        run(Path(workdir), hook=lambda step: time.sleep(0.05))
    elif how == "pair":
        address = f"127.0.0.1:{os.environ['PORT']}"
        settings = dict(coordinator_bind_address=address, cluster_detection_method="deactivate")
        jax.distributed.initialize(address, 2, int(os.environ["RANK"]), **settings)
        with cli.leave_with_others():
            run_pair(Path(workdir))
    else:
        sabotage(how)
        run(storage.path(workdir))


def run_pair(workdir: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    class Sharded(Batches):
        def __next__(self):
            time.sleep(0.02)
            batch = super().__next__()
            x = np.asarray(batch["x"])
            return {"x": jax.make_array_from_callback(x.shape, rows, lambda index: x[index])}

    born = jax.jit(initial, out_shardings=everywhere)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(initial)
    )
    total, save = (int(n) for n in os.environ.get("STEPS", "400,50").split(","))
    with Checkpoints(workdir / "checkpoints", keep_last=2, keep_best=0) as checkpoints:
        restored = checkpoints.restore(wanted)
        state, start = (born(), 0) if restored is None else (restored[0], restored[1]["step"])
        with open_writer(workdir, resume_step=start) as writer:
            train(
                state,
                step_fn=jax.jit(step_fn, donate_argnums=0, out_shardings=everywhere),
                batches=Sharded(start),
                schedule=Schedule(total=total, log=2, evaluate=0, save=save, images=0),
                checkpoints=checkpoints,
                writer=writer,
                record={},
                start_step=start,
                start_examples=8 * start,
                workdir=workdir,
                nonfinite_budget=0,
                examples_per_step=8,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
