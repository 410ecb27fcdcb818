"""A run that is stopped, preempted or killed and started again equals one that never was, bit for bit."""

import errno
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.toy import (
    SAVE,
    TOTAL,
    assert_equal_looks,
    assert_equal_runs,
    in_tensorboard,
    logged,
    run,
    toy_pair,
    toy_process,
)
from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.stopping import breakable
from vqgan_jax.train import loop, manifests
from vqgan_jax.train.checkpoints import Checkpoints, load


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
    assert_equal_runs(tmp_path, whole)
    assert_equal_looks(tmp_path, whole)


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_signal_in_the_last_step_leaves_only_what_is_owed(tmp_path, evaluate):
    """Its evaluation may take an hour, so it is left to the next start; without one the run is finished."""
    options = dict(total=7) if evaluate else dict(total=7, evaluate=None, draw=None)

    def stop(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    if evaluate:
        with pytest.raises(SystemExit) as exit_:
            run(tmp_path, hook=stop, **options)
        assert exit_.value.code == 42 and "val/loss" not in logged(tmp_path)[-1]
        run(tmp_path, hook=lambda step: pytest.fail("took a batch"), **options)
        assert "val/loss" in logged(tmp_path)[-1]
    else:
        assert int(run(tmp_path, hook=stop, **options).step) == 7
    assert load(tmp_path / "checkpoints")[1]["step"] == 7


@pytest.mark.parametrize("at", [12, TOTAL])
@pytest.mark.parametrize("within", ["evaluate", "draw"])
def test_a_signal_within_an_evaluation_breaks_it_off_and_the_next_start_makes_up_for_it(tmp_path, whole, within, at):
    """Twice: the second start is stopped in what it makes up for. In the end nothing is missing or there twice."""
    usual = {
        "evaluate": lambda state, step: {"loss": float(jnp.abs(state.params["w"] - 1).sum())},
        "draw": lambda state, step: {"val/w": np.full((4, 6, 3), step % 256, np.uint8)},
    }
    seen = []

    def long(state, step):
        for k in breakable(range(9)):
            seen.append((step, k))
            if (step, k) == (at, 2):
                os.kill(os.getpid(), signal.SIGTERM)
        return usual[within](state, step)

    for _ in range(2):
        with pytest.raises(SystemExit) as exit_:
            run(tmp_path, **{within: long})
        assert exit_.value.code == 42 and seen[-1] == (at, 2)
        assert load(tmp_path / "checkpoints")[1]["step"] == at
        assert [line for line in logged(tmp_path) if line["step"] == at and "val/loss" in line] == []
    run(tmp_path)
    assert_equal_runs(tmp_path, whole)
    assert_equal_looks(tmp_path, whole)


def test_killed_between_logging_what_was_owed_and_noting_that_it_is_done(tmp_path, whole, monkeypatch):
    def stopped(state, step):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": float(sum(breakable([float(jnp.abs(state.params["w"] - 1).sum())])))}

    with pytest.raises(SystemExit):
        run(tmp_path, evaluate=stopped)

    def killed(self, step, metrics):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "settle", killed)
        run(tmp_path)
    assert "val/loss" in logged(tmp_path)[-1]
    run(tmp_path)
    assert_equal_runs(tmp_path, whole)
    assert_equal_looks(tmp_path, whole)


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

    monkeypatch.setattr(loop, "say", say)
    with pytest.raises(SystemExit):
        run(tmp_path, hook=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    assert said == [("preempted at step 3: saved", 3)]


def test_the_second_sigint_interrupts(tmp_path):
    def twice(step):
        if step == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)  # two that are pending at once are one

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, hook=twice)
    finally:
        signal.signal(signal.SIGINT, before)


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


def test_two_processes_stop_at_one_step(tmp_path):
    """SIGTERM to one process of two: both save the same step and leave with 42, none before the save is sealed."""
    processes = toy_pair(tmp_path, SEAL_SECONDS="2")
    while "step 4/" not in (line := processes[0].stdout.readline()):
        assert line or processes[0].poll() is None, processes[0].stderr.read()
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [42, 42], outputs
    saved = load(tmp_path / "checkpoints")[1]["step"]
    assert f"preempted at step {saved}: saved" in outputs[0][0] and "preempted" not in outputs[1][0]
    assert 4 <= saved < 400
    assert [f"left after step {saved} was sealed" in out for out, _ in outputs] == [True, True]


@pytest.mark.parametrize("step", [6, 24])
def test_a_save_that_the_storage_does_not_take_at_once_is_repeated(tmp_path, whole, monkeypatch, capsys, step):
    """In the midst of a run from a later state; the last one until it stands."""
    left, write = [2], manifests.write

    def flaky(folder, manifest):
        if manifest["step"] >= step and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "the disk is away")
        write(folder, manifest)

    monkeypatch.setattr(manifests, "write", flaky)
    monkeypatch.setattr(storage, "BACKOFF", (0.0, 0.0, 0.0))
    run(tmp_path)
    assert capsys.readouterr().out.count("was not saved") == 2
    assert_equal_runs(tmp_path, whole)


def test_a_save_that_failed_costs_no_checkpoint_before_it(tmp_path, monkeypatch):
    """Whatever else fails later: of step 6 there is one until another is whole."""
    write = manifests.write

    def fail_from_12(folder, manifest):
        if manifest["step"] >= 12:
            raise OSError(errno.EIO, "the disk is away")
        write(folder, manifest)

    monkeypatch.setattr(manifests, "write", fail_from_12)
    monkeypatch.setattr(storage, "BACKOFF", (0.0,) * 4)
    with pytest.raises(storage.StorageError):
        run(tmp_path)
    assert load(tmp_path / "checkpoints")[1]["step"] == 6


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, storage.StorageError), (errno.ENOSPC, UserError)])
def test_what_storage_never_takes_ends_the_run(tmp_path, monkeypatch, number, kind):
    def fail(folder, manifest):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(manifests, "write", fail)
    monkeypatch.setattr(storage, "BACKOFF", (0.0, 0.0))
    with pytest.raises(kind, match="checkpoint of step .* was not saved"):
        run(tmp_path)


def test_checkpoints_are_sealed_while_the_run_goes_on(tmp_path):
    sealed = []

    def look(step):
        if step > SAVE:
            time.sleep(0.05)
            sealed.append((tmp_path / "checkpoints" / str(SAVE) / "manifest.json").exists())

    run(tmp_path, total=2 * SAVE, hook=look)
    assert sealed[-1]


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
