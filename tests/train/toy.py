"""The toy model that the drills of the loop train, and what they ask of two runs.

Run as a script, it trains: `toy.py WORKDIR slow|pair|MOMENT`, where a MOMENT of test_stops.SABOTAGES kills the process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import ROOT, free_address
from vqgan_jax import cli, storage
from vqgan_jax.stopping import breakable
from vqgan_jax.train import manifests
from vqgan_jax.train.checkpoints import Checkpoints, load
from vqgan_jax.train.loop import Schedule, train
from vqgan_jax.train.metric_writer import open_writer

TOTAL, SAVE = 24, 6

PICTURES = ["val_w_00000012.png", "val_w_00000024.png"]


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
        with open_writer(workdir, resume_step=start, owed=checkpoints.owes(start)) as writer:
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


def assert_equal_looks(a: Path, b: Path) -> None:
    """Pictures, and which checkpoint is the best of those that both keep."""
    for one in (a, b):
        assert sorted(path.name for path in (one / "images").iterdir()) == PICTURES
        events = EventAccumulator(str(one / "tensorboard"), size_guidance={"images": 0}).Reload()
        assert [e.step for e in events.Images("val/w")] == [12, 24]
    assert in_tensorboard(a, "val/loss") == in_tensorboard(b, "val/loss")
    x, y = (manifests.read_all(storage.path(one) / "checkpoints") for one in (a, b))
    assert manifests.best_first(x)[:1] == manifests.best_first(y)[:1]
    assert x[TOTAL]["metrics"] == y[TOTAL]["metrics"] and not x[TOTAL]["owed"]


def toy_process(*args: str, script: str = __file__, **env: str) -> subprocess.Popen:
    settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, script, *args]
    return subprocess.Popen(
        command, env=os.environ | settings | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def toy_pair(workdir: Path, **env: str) -> list[subprocess.Popen]:
    """Two processes that train the toy model together."""
    address = free_address()
    return [toy_process(str(workdir), "pair", RANK=str(rank), ADDRESS=address, **env) for rank in (0, 1)]


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

    def save_then(self, step, *args, seconds, **owed):
        save(self, step, *args, **owed)
        if step == 12:
            time.sleep(seconds)
            die()

    if moment == "orbax":
        Checkpoints.save = lambda self, *args, **owed: save_then(self, *args, seconds=0, **owed)
    if moment == "delay":
        Checkpoints.save = lambda self, *args, **owed: save_then(self, *args, seconds=0.01, **owed)
    if moment == "committed":
        manifests.write = at_12(before=die)(manifests.write)
    if moment == "manifest":
        write = Path.replace
        Path.replace = lambda self, target: die() if "/12/manifest" in str(target) else write(self, target)
    if moment == "sealed":
        manifests.write = at_12(after=die)(manifests.write)


def main(workdir: str, how: str) -> None:
    if how == "slow":
        run(Path(workdir), hook=lambda step: time.sleep(0.05))
    elif how == "pair":
        address = os.environ["ADDRESS"]
        settings = dict(coordinator_bind_address=address, cluster_detection_method="deactivate")
        jax.distributed.initialize(address, 2, int(os.environ["RANK"]), **settings)
        write, slow = manifests.write, float(os.environ.get("SEAL_SECONDS", "0"))
        manifests.write = lambda *args: (time.sleep(slow), write(*args))
        with cli.leave_with_others():
            try:
                run_pair(Path(workdir))
            except SystemExit:
                print(f"left after step {max(manifests.read_all(storage.path(workdir) / 'checkpoints'))} was sealed")
                raise
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
    every, batches = (int(n) for n in os.environ.get("EVALUATE", "0,0").split(","))

    def evaluate(state: State, step: int) -> dict[str, float]:
        """Host 1 has one batch more; what they say meets at the end."""
        for _ in breakable(range(batches + jax.process_index()), at_most=batches + 2):
            print("evaluating", flush=True)
            time.sleep(0.05)
        return {"loss": float(jnp.abs(state.params["w"] - 1).sum())}

    with Checkpoints(workdir / "checkpoints", keep_last=2, keep_best=0) as checkpoints:
        restored = checkpoints.restore(wanted)
        state, start = (born(), 0) if restored is None else (restored[0], restored[1]["step"])
        with open_writer(workdir, resume_step=start) as writer:
            train(
                state,
                step_fn=jax.jit(step_fn, donate_argnums=0, out_shardings=everywhere),
                batches=Sharded(start),
                evaluate=evaluate,
                schedule=Schedule(total=total, log=2, evaluate=every, save=save, images=0),
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
