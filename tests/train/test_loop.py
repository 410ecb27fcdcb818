"""The order of events in the loop, what is logged, and what an exception leaves."""

import json
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests.train.toy import PICTURES, STEP, TOTAL, Batches, assert_equal_runs, initial, logged, run
from vqgan_jax.config import UserError
from vqgan_jax.train.checkpoints import Checkpoints, load
from vqgan_jax.train.loop import Schedule, train
from vqgan_jax.train.metric_writer import open_writer


def test_order_and_schedule(tmp_path):
    events = []

    class Recorder(Checkpoints):
        def save(self, step, state, record, metrics, **owed):
            events.append(("save", step, metrics and sorted(metrics)))
            super().save(step, state, record, metrics, **owed)

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
    assert pictures == PICTURES
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
