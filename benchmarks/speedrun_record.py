"""What the speedrun keeps beside its stages: names of what defines them, seconds, and when and by which source."""

import argparse
import datetime
import functools
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from vqgan_jax import storage
from vqgan_jax.train.metric_writer import JSON_LINES
from vqgan_jax.train.run_record import git_state

SECONDS = "seconds.json"  # in a stage's folder: what it took so far
WHEN = ("date", "machine", "revision")


def digest(data: Any) -> str:
    """A short name of plain data."""
    return storage.digest(data)[:12]


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def without_places(data: dict[str, Any]) -> dict[str, Any]:
    """A plain `config.data` without where the data lie and how they are read, which makes no other stage."""
    return {name: x for name, x in data.items() if name not in ("source", "path", "threads", "processes")}


@functools.cache
def stamp() -> dict[str, str]:
    """What tells of figures when, where and by which source they were measured."""
    state, _ = git_state(Path(__file__).resolve().parent.parent)
    revision = state if isinstance(state, str) else state["revision"][:7] + "+" * state["dirty"]
    return {"date": datetime.date.today().isoformat(), "machine": machine(), "revision": revision}


def trained_by(folder: Path) -> dict[str, str]:
    """When, where and by which source the stage in a folder was trained."""
    done = read_json(folder / SECONDS)["trained"]
    return {name: done[name] for name in WHEN}


def say_if_older(folder: Path, done: dict[str, Any]) -> None:
    """One line where something is not done again that another source did."""
    if (by := done.get("revision", "an earlier one")) != stamp()["revision"]:
        ours = stamp()["revision"]
        print(f"{folder.name}: of revision {by}, not of this one ({ours}); another --out measures anew", flush=True)


def minutes(folder: Path, what: str) -> float:
    """That a part took, in all starts together."""
    return read_json(folder / SECONDS).get(what, {}).get("seconds", 0.0) / 60


def speed(folder: Path) -> dict[str, float]:
    """The median over a run's log of milliseconds a step."""
    rows = [json.loads(line) for line in (folder / JSON_LINES).read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return {"ms": 1e3 * statistics.median(seconds) if seconds else float("nan")}


def shown_command(args: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """The command that gave a line, without the places of this machine."""
    kept = set(vars(args)) - {"out", "record"}
    asked = {name: x for name, x in vars(args).items() if name in kept and x != getattr(defaults, name)}
    for name in {"data", "lpips"} & asked.keys():
        asked[name] = ",".join(Path(file).name for file in asked[name].split(","))
    words = [f"--{name}" if x is True else f"--{name}={x}" for name, x in asked.items()]
    return shlex.join(["python", "-m", "benchmarks.speedrun", *words])
