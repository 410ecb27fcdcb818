"""The run record names the source, the command and the versions of every start."""

import json
import subprocess

import jax
import ml_collections
import numpy as np
import pytest

from vqgan_jax.train import run_record
from vqgan_jax.train.run_record import git_state, write_run_record


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    (root / "a.txt").write_text("one\n")
    name = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "a.txt"], [*name, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def test_every_start_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_vqgan.py", "--config=demo.py"])
    config = ml_collections.ConfigDict({"model": {"width": 8, "levels": (1, 2)}, "path": None})
    for _ in range(3):
        write_run_record(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model": {"width": 8, "levels": [1, 2]},
        "path": None,
    }
    assert sorted(p.name for p in (tmp_path / "run").glob("*.json")) == ["0.json", "1.json", "2.json"]
    record = json.loads((tmp_path / "run" / "2.json").read_text())
    assert record["argv"] == ["train_vqgan.py", "--config=demo.py"]
    assert record["versions"]["jax"] == jax.__version__ and record["versions"]["numpy"] == np.__version__
    assert set(record["versions"]) == {
        "python", "vqgan_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
    }  # fmt: skip
    assert (
        record["devices"]["count"] == jax.device_count() and record["devices"]["kind"] == jax.devices()[0].device_kind
    )


def test_git_state_of_clean_and_changed_trees(repository):
    revision = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert git_state(repository) == ({"revision": revision, "dirty": False, "diff_truncated": False}, b"")
    (repository / "a.txt").write_text("two\n")
    state, diff = git_state(repository)
    assert state == {"revision": revision, "dirty": True, "diff_truncated": False}
    assert b"-one" in diff and b"+two" in diff


def test_a_large_diff_is_cut(repository):
    (repository / "a.txt").write_text("x\n" * run_record.MAX_DIFF_BYTES)
    state, diff = git_state(repository)
    assert state["diff_truncated"] and len(diff) == run_record.MAX_DIFF_BYTES


def test_no_git(tmp_path, repository, monkeypatch):
    assert git_state(tmp_path)[0] == "no git"
    inside = repository / "site-packages"  # a tree that holds the source is not the source's own
    inside.mkdir()
    assert git_state(inside)[0] == "no git"
    monkeypatch.setenv("PATH", "")
    assert git_state(repository)[0] == "no git"


def test_the_diff_lies_beside_the_record(tmp_path, monkeypatch):
    state = {"revision": "abc", "dirty": True, "diff_truncated": False}
    monkeypatch.setattr(run_record, "git_state", lambda root: (state, b"+two\n"))
    write_run_record(tmp_path, {})
    assert (tmp_path / "run" / "0.diff").read_bytes() == b"+two\n"
    assert json.loads((tmp_path / "run" / "0.json").read_text())["git"] == state


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write_run_record(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
