"""A sweep's folder: stages done by what they were, plans that stay, and stages that one runner has at a time."""

import dataclasses
import json
import os
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.launch.conftest import Fakes, fakes  # noqa: F401
from vqgan_jax.config import UserError
from vqgan_jax.tools import sweep_folder
from vqgan_jax.tools.sweep_folder import GONE, LEFT, RUNS, Folder, Holder
from vqgan_jax.tools.trials import Plan, Stage, Trial

STAGE = Stage("gpt=0.1-abc", "digest", "job", ("-c", "pass"), (), "runs/gpt")
PLAN = Plan((Trial("t", {}, (STAGE.name,)),), {STAGE.name: STAGE}, {"config": "x.py"})


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path) -> Folder:
    return Folder(str(tmp_path / "sweep") if request.param == "local" else request.getfixturevalue("bucket"))


@pytest.fixture
def alive():
    """The number of a process that runs as long as the test."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def holder(runner, command=None, **changes) -> Holder:
    """As `runner` would have written it while it ran."""
    made = Holder.here(command)
    return dataclasses.replace(made, runner=(runner, sweep_folder._start_of(runner) or "1"), **changes)


def hold(folder, other, number=1):
    assert folder._write_claim(STAGE, number, other)


def test_what_is_done_is_known_by_its_digest(folder):
    """A record of another config under the same name, or of none, is named and never taken for this one's."""
    assert folder.done(PLAN) == set()
    folder.mark(STAGE, 1.0)
    assert folder.done(PLAN) == {STAGE.name} and folder.is_done(STAGE)
    other = dataclasses.replace(STAGE, digest="other")
    with pytest.raises(UserError, match=r"abc.json: tells of another config .*; delete it and runs/gpt"):
        folder.done(dataclasses.replace(PLAN, stages={STAGE.name: other}))
    (folder.path / "done" / f"{STAGE.name}.json").write_text(json.dumps({"seconds": 1.0}))
    with pytest.raises(UserError, match="another config"):
        folder.is_done(STAGE)


def test_plans_are_read_as_they_were_written(folder):
    folder.write_plan(PLAN)
    name = folder.submit_plan(PLAN)
    folder.write_plan(dataclasses.replace(PLAN, trials=(), stages={}))
    assert folder.read_plan(name) == PLAN and folder.read_plan().stages == {} and folder.submit_plan(PLAN) == name
    with pytest.raises(UserError, match="no submitted/none.json there"):
        folder.read_plan("submitted/none.json")
    (folder.path / "sweep.json").write_text(json.dumps({"trials": [], "stages": []}))
    with pytest.raises(UserError, match="written by another version; name the swept config"):
        folder.read_plan()


def test_a_stage_has_one_runner(folder, alive, dead):
    assert folder.claim(STAGE) is None and folder.claim(STAGE) is None  # again by the same
    folder.note_command(STAGE, alive)
    assert folder.holder(STAGE) is None
    folder.release(STAGE)
    hold(folder, holder(alive))
    for found in (folder.claim(STAGE), folder.holder(STAGE)):
        assert found is not None and f"process {alive} on {socket.gethostname()}, since 2" in str(found)
    folder.release(STAGE)
    hold(folder, holder(dead))
    assert folder.holder(STAGE) is None and folder.claim(STAGE) is None
    number, last = folder._last_claim(STAGE)
    assert number == 2 and last.runner[0] == os.getpid()
    folder.release(STAGE)
    assert folder._last_claim(STAGE) == (0, None)


def test_what_a_holder_does(alive, dead):
    assert holder(alive).state() == RUNS and holder(dead).state() == GONE
    assert holder(dead, alive).state() == LEFT and holder(dead, dead).state() == GONE
    assert holder(dead, host="elsewhere").state() == RUNS  # not known from here
    assert dataclasses.replace(holder(alive), runner=(alive, "1")).state() == GONE  # the number was given anew


def test_slurm_knows_its_jobs(fakes, dead, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PATH", fakes.environment["PATH"])
    monkeypatch.setenv("FAKES", str(fakes.folder))
    answers = [("9 gpu sweep R\n", 0), ("", 0), ("ERROR Invalid job id specified", 1), ("ERROR timed out", 1)]
    fakes.answer("squeue", "--jobs=9", answers=answers)
    elsewhere = holder(dead, slurm="9", as_job=True, host="node7")
    assert [elsewhere.state() for _ in range(4)] == [RUNS, GONE, GONE, RUNS]
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert Holder.here(as_job=True).is_the_same_as(elsewhere)  # all tasks of a job, and the job requeued
    monkeypatch.setenv("SLURM_JOB_ID", "10")
    assert not Holder.here(as_job=True).is_the_same_as(elsewhere) and "job 9" in str(elsewhere)


def test_runners_in_one_allocation_are_two(folder, alive, dead, monkeypatch):
    """What a runner of its own holds is known by its process, however long the allocation of both lives."""
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setattr(sweep_folder, "_slurm_knows", lambda job: True)
    hold(folder, holder(alive))
    assert folder.claim(STAGE).runner[0] == alive and folder.holder(STAGE).runner[0] == alive
    assert Folder(str(folder.path), as_job=True).claim(STAGE).runner[0] == alive  # nor is it the whole job's
    assert holder(dead).state() == GONE and holder(dead, alive).state() == LEFT
    assert holder(dead, host="node7").state() == RUNS
    monkeypatch.setattr(sweep_folder, "_slurm_knows", lambda job: False)
    assert holder(dead, host="node7").state() == GONE
    folder.release(STAGE)
    hold(folder, holder(dead))
    assert folder.claim(STAGE) is None and folder.claim(STAGE) is None


def test_of_many_that_find_a_dead_runner_one_takes_over(folder, monkeypatch):
    """Each thread is a host of its own here; what held the stage was a job that Slurm has forgotten."""
    monkeypatch.setattr(sweep_folder, "_slurm_knows", lambda job: False)
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)
    hold(folder, holder(os.getpid(), slurm="77"))
    start = threading.Barrier(6)

    def claim(_):
        start.wait()
        return folder.claim(STAGE)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(claim, range(6)))
    assert found.count(None) == 1 and len({other.host for other in found if other}) == 1


def test_a_claim_that_is_none_is_named(folder):
    folder.path.mkdir(parents=True, exist_ok=True)
    sweep_folder.storage.write_text(folder.claims(STAGE) / "1.json", "{")
    with pytest.raises(UserError, match="1.json: is no claim; delete it"):
        folder.claim(STAGE)
