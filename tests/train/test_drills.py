"""Drills: a run that is killed again and again, or loses its disk, ends in the very state of one that was left alone.

Run as a script, this file trains the toy model of toy.py for LONG steps: `test_drills.py WORKDIR`.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.test_checkpoints import abstract, assert_same, flip, make_state, open_checkpoints, save_steps
from tests.train.toy import assert_equal_runs, logged, run, toy_pair, toy_process
from vqgan_jax import cli, storage
from vqgan_jax.config import UserError
from vqgan_jax.exit_codes import USER_ERROR
from vqgan_jax.train import manifests
from vqgan_jax.train.checkpoints import load

LONG, KILLS = 1200, 20


def train_long(workdir: Path, pace: float = 0.0) -> None:
    run(workdir, total=LONG, hook=lambda step: time.sleep(pace))


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    """Every kill comes while the run steps, logs, draws or saves (every sixth step); nothing is lost or done twice."""
    random_moment = random.Random(0)
    killed, unsealed = 0, 0
    while killed < KILLS:
        process = toy_process(str(tmp_path / "killed"), script=__file__)
        while "step " not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        time.sleep(random_moment.uniform(0, 0.8))
        process.kill()
        _, error = process.communicate(timeout=60)
        assert process.returncode == -9, f"it ended by itself after {killed} kills: {error}"
        killed += 1
        steps = [p for p in (tmp_path / "killed" / "checkpoints").iterdir() if p.name[0].isdigit()]
        unsealed += any(not (p / "manifest.json").exists() for p in steps)
    assert unsealed >= 3, "the kills must meet saves too"
    assert load(tmp_path / "killed" / "checkpoints")[1]["step"] < LONG
    train_long(tmp_path / "killed")
    train_long(tmp_path / "whole")
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole", total=LONG)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_five_times(tmp_path):
    """The other leaves with a message, and in a bounded time; the rerun goes on from the last whole checkpoint."""
    random_moment, steps = random.Random(1), "200,8"
    for kill in range(5):
        pair = toy_pair(tmp_path / "killed", STEPS=steps)
        while "step " not in (line := pair[0].stdout.readline()):
            assert line, pair[0].stderr.read()
        time.sleep(random_moment.uniform(0.2, 1.2))
        victim, survivor = pair[kill % 2], pair[1 - kill % 2]
        victim.kill()
        assert victim.wait(timeout=30) == -9, f"it ended by itself at kill {kill}"
        _, error = survivor.communicate(timeout=150)  # 100 s where it waits for the other to commit a checkpoint
        assert survivor.returncode in (134, -6), error  # JAX's own abort is quicker at times where host 0 is gone
        assert "lost another one" in error or "another task died" in error
        assert 'toy.py", line' not in error  # no exception came through; Orbax logs what it waited for, though
        victim.communicate(timeout=30)
    assert 0 < load(tmp_path / "killed" / "checkpoints")[1]["step"] < 200
    for name in ("killed", "whole"):
        pair = toy_pair(tmp_path / name, STEPS=steps)
        outputs = [process.communicate(timeout=120) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], outputs
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole", total=200)


@pytest.mark.slow
def test_two_processes_break_an_evaluation_off_and_make_up_for_it(tmp_path):
    """SIGTERM to one of them within an evaluation of minutes: both save that step and leave; no number is missing."""
    for name, long in (("stopped", "6,4000"), ("stopped", "6,3"), ("whole", "6,3")):
        pair = toy_pair(tmp_path / name, STEPS="12,6", EVALUATE=long)
        if long == "6,4000":
            while "evaluating" not in (line := pair[1].stdout.readline()):
                assert line, pair[1].stderr.read()
            pair[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120) for process in pair]
        assert [process.returncode for process in pair] == [42 if long == "6,4000" else 0] * 2, outputs
        if long == "6,4000":
            assert load(tmp_path / name / "checkpoints")[1]["step"] == 6
            assert not any("val/loss" in line for line in logged(tmp_path / name))
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole", total=12)
    assert [line["step"] for line in logged(tmp_path / "whole") if "val/loss" in line] == [6, 12]


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog):
    save_steps(tmp_path / "whole", [10, 20])
    names = [p.relative_to(tmp_path / "whole" / "20") for p in storage.files(tmp_path / "whole" / "20")]
    assert len(names) > 5
    for k, name in enumerate(names):
        if not (tmp_path / "whole" / "20" / name).stat().st_size:
            continue
        damaged = tmp_path / str(k)
        shutil.copytree(tmp_path / "whole", damaged)
        flip(damaged / "20" / name)
        caplog.clear()
        assert load(damaged)[1]["step"] == 10
        assert f"{name} " in caplog.text
    with open_checkpoints(damaged) as checkpoints:  # the trainers' way, once: the other test has all kinds of damage
        state, _ = checkpoints.restore(abstract(make_state()))
    assert_same(state, make_state(10))


@pytest.mark.parametrize("share", [0.25, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_run_whose_newest_checkpoint_has_a_flipped_byte_ends_as_one_left_alone(tmp_path, whole, share):
    run(tmp_path / "stopped", total=12)
    newest = tmp_path / "stopped" / "checkpoints" / "12"
    names = [p.relative_to(newest) for p in storage.files(newest) if p.stat().length]
    for k, name in enumerate(names[:: round(1 / share)]):
        shutil.copytree(tmp_path / "stopped", tmp_path / str(k))
        flip(tmp_path / str(k) / "checkpoints" / "12" / name)
        run(tmp_path / str(k))
        assert (tmp_path / str(k) / "checkpoints" / "12.damaged").exists()
        assert_equal_runs(tmp_path / str(k), whole)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "left"), [(0, 200_000), (13, 0)])  # a save meets it first, or a log
def test_a_disk_that_runs_full_while_training(tmp_path, small_disk, capsys, at, left):
    """One line says so, the checkpoint before stays, and with room again the run ends as if nothing had been."""
    room = small_disk / "room"

    def fill(step):
        if step == at:
            room.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - left))

    assert cli.exit_code(lambda: run(small_disk, save=2, hook=fill)) == USER_ERROR
    assert len(re.findall("^error: ", said := capsys.readouterr().err, re.M)) == 1 and "Traceback" not in said
    room.unlink()
    survived = load(small_disk / "checkpoints")[1]["step"]
    assert 0 < survived < 24
    run(small_disk, save=2)
    run(tmp_path / "whole", save=2)
    assert_equal_runs(small_disk, tmp_path / "whole")


def test_a_workdir_that_vanishes_while_training_is_one_line(tmp_path):
    workdir = tmp_path / "run"

    def vanish(step):
        if step == 13:
            workdir.rename(tmp_path / "gone")

    # What is said depends on what is missed first.
    with pytest.raises((UserError, storage.StorageError), match="was not saved|run") as gone:
        run(workdir, hook=vanish)
    assert "\n" not in str(gone.value)


if __name__ == "__main__":
    write = manifests.write
    manifests.write = lambda *args: (time.sleep(0.04), write(*args))  # so that a save is under way half the time
    train_long(Path(sys.argv[1]), pace=0.01)
