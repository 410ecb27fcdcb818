"""`make demo`: both stages on the embedded landscapes with the commands a user would type, then scores, pictures and a
page about it. STEPS is the whole demo."""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import vqgan_jax
from vqgan_jax import cli
from vqgan_jax.config import UserError
from vqgan_jax.tools import page, report
from vqgan_jax.train.loop import PREEMPTED
from vqgan_jax.train.metric_writer import JSON_LINES

ROOT = Path(vqgan_jax.__file__).resolve().parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
RUNS = ("vqgan", "transformer")
SHARPER = ("--temperature=0.9", "--top_p=0.9")  # a transformer trained for minutes is not yet sure of itself

Runner = Callable[[Sequence[str], Mapping[str, str]], int]  # (argv, environment) -> exit code


class Step(NamedTuple):
    """One command: `python ARGS` with {out} for the demo's folder, the seconds it takes on two cores, and a picture
    that it makes with the name under which the demo shows it."""

    title: str
    args: tuple[str, ...]
    seconds: float
    shown: tuple[str, str] | None = None


STEPS = (
    Step(
        "train the VQGAN",
        ("train_vqgan.py", "--config=configs/demo_vqgan.py", "--workdir={out}/vqgan"),
        seconds=200,
    ),
    Step(
        "train the transformer on its codes",
        (
            "train_transformer.py",
            "--config=configs/demo_transformer.py",
            "--config.vqgan={out}/vqgan",
            "--workdir={out}/transformer",
        ),
        seconds=240,
    ),
    Step(
        "score both on held-out images",
        ("evaluate.py", "--workdir={out}/transformer", f"--out={{out}}/{report.EVALUATION}"),
        seconds=50,
        shown=("reconstructions.png", "reconstructions.png"),
    ),
    Step(
        "draw samples of every class",
        ("sample.py", "--workdir={out}/transformer", "--out={out}/samples", "--number=64", *SHARPER),
        seconds=12,
        shown=("samples/grid.png", "samples.png"),
    ),
    Step(
        "draw panoramas",
        ("sample.py", "--workdir={out}/transformer", "--out={out}/panorama", "--number=4", "--size=64x512", *SHARPER),
        seconds=20,
        shown=("panorama/grid.png", "panorama.png"),
    ),
)


class ChildFailed(Exception):
    """A command ended with another exit code than 0, which is `code`."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run_demo(out: str | Path, *, run: Runner, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Runs all steps and writes summary.json, metrics.jsonl and index.html; started again, training goes on.

    Args:
      out: the demo's folder; the commands name it relative to the repository where it lies inside.
      run: runs one command from the repository's root.
      clock: seconds that only grow.

    Returns:
      The summary.

    Raises:
      ChildFailed: a command failed.
      UserError: no checkout to run, a folder that cannot be written, or a command did not write what it should.
    """
    if not (ROOT / STEPS[0].args[0]).exists():
        raise UserError(f"{ROOT}: no {STEPS[0].args[0]} here; the demo needs a clone of the repository")
    folder = cli.check_workdir(str(out)).resolve()
    shown_as = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    variables = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    start, total, planned = clock(), len(STEPS) + 1, sum(step.seconds for step in STEPS)
    done = 0.0
    for number, step in enumerate(STEPS, 1):
        elapsed = clock() - start
        # The pace so far is known only once something slow has run from its beginning.
        estimate = elapsed + (planned - done) * (elapsed / done if elapsed > done > 0 else 1)
        print(
            f"[{number}/{total}] {step.title} ({_clock(elapsed)} elapsed, about {_clock(estimate)} in all)", flush=True
        )
        args = [arg.format(out=shown_as) for arg in step.args]
        command = " ".join([*(f"{k}={shlex.quote(v)}" for k, v in variables.items()), shlex.join(["python", *args])])
        print(f"$ {command}", flush=True)
        began = clock()
        code = run([sys.executable, *args], {**os.environ, **variables})
        _log(folder, {"command": command, "seconds": round(clock() - began, 1), "exit": code})
        if code == PREEMPTED:
            raise ChildFailed(f"stopped and saved; to go on: python -m vqgan_jax.tools.demo --out={out}", code)
        if code != 0:
            raise ChildFailed(f"exit code {code} of: {command}", code)
        if step.shown is not None:
            _show(folder, command, *step.shown)
        done += step.seconds
    print(f"[{total}/{total}] write the page ({_clock(clock() - start)} elapsed)", flush=True)
    join_metrics(folder)
    summary = summarise(folder)
    page.write_page(folder / "index.html", title="vqgan_jax demo", **report.gather([folder]))
    print(f"{Path(out) / 'index.html'}: open it in a browser ({_clock(clock() - start)} in all)", flush=True)
    return summary


def run_child(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command from the repository's root with our terminal and returns its exit code, 128 + n after signal n.

    Told to stop, it lets the command save and end by itself: Ctrl-C reaches both, and SIGTERM is handed on.
    """
    child: subprocess.Popen[bytes] | None = None
    asked = 0
    if not sys.stderr.isatty():
        environment = {"TQDM_MININTERVAL": "10", **environment}  # a log keeps every redraw of a bar

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        if child is not None and number == signal.SIGTERM:
            child.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(argv, cwd=ROOT, env=environment)
        if asked:  # between the two lines above
            child.send_signal(asked)
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked and code == 0:
        return 128 + asked  # it had ended anyway, but we were told to stop
    return code if code >= 0 else 128 - code


def join_metrics(folder: Path) -> None:
    """Writes both runs' metrics.jsonl as one, with the names of the run in front: vqgan/loss, transformer/val/nll."""
    lines = []
    for run in RUNS:
        path = folder / run / JSON_LINES
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            place = {"step": row.pop("step"), "time": row.pop("time")}
            lines.append(json.dumps(place | {f"{run}/{name}": value for name, value in row.items()}) + "\n")
    _write(folder / JSON_LINES, "".join(lines))


def summarise(folder: Path) -> dict[str, Any]:
    """Writes and returns summary.json: the scores of evaluation.json, and `seconds` spent in all starts together."""
    path = folder / report.EVALUATION
    if not path.exists():
        raise UserError(f"{path}: missing, though evaluate.py ended well")
    scores = json.loads(path.read_text())
    seconds = sum(entry["seconds"] for entry in json.loads((folder / report.COMMANDS).read_text()))
    summary = {name: value for name, value in scores.items() if name not in ("workdir", "definition")} | {
        "seconds": round(seconds, 1)
    }
    _write(folder / report.SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def _show(folder: Path, command: str, source: str, target: str) -> None:
    if not (folder / source).exists():
        raise UserError(f"{folder / source}: missing, though this ended well: {command}")
    if source != target:
        shutil.copyfile(folder / source, folder / target)


def _log(folder: Path, entry: Mapping[str, Any]) -> None:
    """Adds a command that ended to commands.json."""
    path = folder / report.COMMANDS
    entries = json.loads(path.read_text()) if path.exists() else []
    _write(path, json.dumps([*entries, entry], indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def main(argv: Sequence[str] | None = None, *, run: Runner = run_child) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vqgan_jax.tools.demo",
        description="Trains a VQGAN and a transformer on landscapes drawn by the code itself, scores them, samples, "
        "and writes index.html about it: about ten minutes on two CPU cores. Stopped, the same command goes on.",
        epilog="example: python -m vqgan_jax.tools.demo --out=runs/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for everything that the demo writes")
    args = parser.parse_args(argv)
    try:
        run_demo(args.out, run=run)
    except ChildFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
