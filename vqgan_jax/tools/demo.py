"""`make demo`: both stages on the embedded landscapes with the commands a user would type, then scores, pictures and a
page about it. STEPS is the whole demo."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.tools import page, report
from vqgan_jax.tools.steps import SHARPER, Runner, Step, Steps, exit_code, run_child
from vqgan_jax.train.metric_writer import JSON_LINES

RUNS = ("vqgan", "transformer")

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
    steps = Steps(out, STEPS, tool="vqgan_jax.tools.demo", run=run, clock=clock)
    steps.run_all(more=1)
    total = len(STEPS) + 1
    print(f"[{total}/{total}] write the page ({steps.elapsed} elapsed)", flush=True)
    join_metrics(steps.folder)
    summary = summarise(steps.folder, steps.seconds())
    page.write_page(steps.folder / "index.html", title="vqgan_jax demo", **report.gather([steps.folder]))
    print(f"{Path(out) / 'index.html'}: open it in a browser ({steps.elapsed} in all)", flush=True)
    return summary


def join_metrics(folder: Path) -> None:
    """Writes both runs' metrics.jsonl as one, with the names of the run in front: vqgan/loss, transformer/val/nll."""
    lines = []
    for run in RUNS:
        path = folder / run / JSON_LINES
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            place = {"step": row.pop("step"), "time": row.pop("time")}
            lines.append(json.dumps(place | {f"{run}/{name}": value for name, value in row.items()}) + "\n")
    storage.write_text(folder / JSON_LINES, "".join(lines))


def summarise(folder: Path, seconds: float) -> dict[str, Any]:
    """Writes and returns summary.json: the scores of evaluation.json, and `seconds` spent in all starts together."""
    path = folder / report.EVALUATION
    if not path.exists():
        raise UserError(f"{path}: missing, though evaluate.py ended well")
    scores = json.loads(path.read_text())
    summary = {name: value for name, value in scores.items() if name not in ("workdir", "definition")} | {
        "seconds": round(seconds, 1)
    }
    storage.write_json(folder / report.SUMMARY, summary)
    return summary


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
    return exit_code("demo", lambda: run_demo(args.out, run=run))


if __name__ == "__main__":
    sys.exit(main())
