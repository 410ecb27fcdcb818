"""Every task of the paper on the embedded landscapes: trains, samples and scores each with the commands a user would
type, and draws one sheet of all. TASKS is the whole."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from vqgan_jax import images, storage
from vqgan_jax.config import choose
from vqgan_jax.tools import report
from vqgan_jax.tools.steps import SHARPER, Runner, Step, Steps, exit_code, run_child
from vqgan_jax.tools.task_scores import Figure, Shown, open_task
from vqgan_jax.tools.task_sheet import draw_sheet

NUMBER = 96  # samples of each, all of them scored
BATCH = 48
SHEET, TABLE = "sheet.png", "table.md"


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the sheet.

    Attributes:
      title: what the paper calls it.
      condition: of configs/demo_transformer.py.
      figure: what is said about its samples.
      inputs: of configs/demo_vqgan.py, the conditions that are encoded.
      start: the task whose transformer this one's starts from: it has learnt where a code's condition stands.
      config: flags of its training.
      each: samples a condition.
      size: of the samples in pixels.
      given: flags of what is completed.
      enlarged: how much larger it is drawn than the others.
    """

    title: str
    condition: str
    figure: Figure
    inputs: tuple[str, ...] = ()
    start: str = ""
    config: tuple[str, ...] = ()
    each: int = 2
    size: int = 64
    given: tuple[tuple[str, str], ...] = ()
    enlarged: int = 1

    @property
    def transformer(self) -> str:
        """Its folder: tasks of one condition share a model."""
        return f"transformer_{self.condition}"


SHORT = ("--config.steps=700",)
TUNED = ("--config.steps=500",)  # from a start
OTHER_TOKENS = (*TUNED, '--config.init_exclude=("transformer/token_embedding",)')  # of a condition of another size
TASKS = {
    "unconditional": Task(
        "unconditional", "none", Figure("val/nll", "nats a code of held-out pictures"), config=SHORT, each=1
    ),
    "class": Task(
        "class-conditional",
        "class",
        Figure("class_agreement", "show their class"),
        start="unconditional",
        config=OTHER_TOKENS,
    ),
    "segmentation": Task(
        "semantic synthesis",
        "segmentation",
        Figure("segmentation_agreement", "of the pixels show the class asked for"),
        inputs=("segmentation",),
    ),
    "depth": Task(
        "depth to image",
        "depth",
        Figure("depth_order", "of pairs of pixels in a row in the order asked for"),
        inputs=("depth",),
        start="segmentation",
        config=TUNED,
    ),
    "edges": Task(
        "edges to image",
        "edges",
        Figure("edges_f1_near", "F1 of edges within a pixel"),
        inputs=("edges",),
        start="segmentation",
        config=OTHER_TOKENS,
    ),
    "low_res": Task(
        "stochastic super-resolution, x8",
        "low_res",
        Figure("low_res_psnr", "dB when made small again"),
        inputs=("low_res",),
        start="segmentation",
        config=TUNED,
    ),
    "keypoints": Task(
        "key points to image",
        "keypoints",
        Figure("keypoints_found", "of the points have their thing"),
        inputs=("keypoints",),
        start="segmentation",
        config=OTHER_TOKENS,
    ),
    "layout": Task("scene layout", "objects", Figure("boxes_found", "of the boxes hold their object"), enlarged=2),
    "coordinates": Task(
        "coordinates, beyond the trained 64 x 64",
        "coordinates",
        Figure("height_error", "of the height off, as windows are read"),
        each=4,
        size=128,
    ),
    "completion": Task(
        "completion of the upper half",
        "none",
        Figure("filled_colour", "levels off in the mean colour of what was filled in"),
        config=SHORT,
        given=(("given", "val"), ("mask", "lower")),
    ),
    "inpainting": Task(
        "inpainting",
        "none",
        Figure("filled_colour", "levels off in the mean colour of what was filled in"),
        config=SHORT,
        given=(("given", "val"), ("mask", "center")),
    ),
}


def steps_of(names: Sequence[str]) -> list[Step]:
    """The commands of some tasks, each once: VQGANs, transformers, samples."""
    starts = dict.fromkeys(TASKS[name].start for name in names if TASKS[name].start)
    chosen = [TASKS[name] for name in [*starts, *names]]
    found = {"vqgan": _train_vqgan("image", "vqgan", 200)}
    for task in chosen:
        found |= {key: _train_vqgan(key, key, 70) for key in task.inputs}
    for task in chosen:
        found |= {task.transformer: _train_transformer(task)}
    found |= {f"samples of {name}": _sample(name, TASKS[name]) for name in names}
    return list(found.values())


def _train_vqgan(key: str, folder: str, seconds: float) -> Step:
    config = "configs/demo_vqgan.py" + (f":input={key}" if key != "image" else "")
    title = "train the VQGAN" + (f" of {key}" if key != "image" else "")
    return Step(title, ("train_vqgan.py", f"--config={config}", f"--workdir={{out}}/{folder}"), seconds)


def _train_transformer(task: Task) -> Step:
    args = [f"--config=configs/demo_transformer.py:condition={task.condition}", "--config.vqgan={out}/vqgan"]
    args += [f"--config.cond_vqgan={','.join(f'{{out}}/{key}' for key in task.inputs)}"] if task.inputs else []
    args += [f"--config.init_from={{out}}/{TASKS[task.start].transformer}"] if task.start else []
    args += [*task.config, f"--workdir={{out}}/{task.transformer}"]
    return Step(f"train the transformer of {task.condition}", ("train_transformer.py", *args), 150)


def _sample(name: str, task: Task) -> Step:
    args = [f"--workdir={{out}}/{task.transformer}", f"--out={{out}}/samples/{name}", f"--number={NUMBER}"]
    args += [f"--each={task.each}"] if task.each > 1 else []
    args += [f"--{flag}={value}" for flag, value in task.given]
    args += [f"--size={task.size}x{task.size}"] if task.size != 64 else []
    return Step(f"sample: {task.title}", ("sample.py", *args, f"--batch={BATCH}", *SHARPER), 25)


def run_tasks(
    out: str | Path, names: Sequence[str], *, run: Runner, clock: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Runs what of the tasks has not run yet, scores their samples and writes sheet.png, table.md and summary.json.

    Args:
      out: the folder of all; the commands name it relative to the repository where it lies inside.
      names: of TASKS.
      run: runs one command from the repository's root.
      clock: seconds that only grow.

    Returns:
      The summary: figures by task, and `seconds` of all starts together.

    Raises:
      ChildFailed: a command failed.
      UserError: an unknown task, no checkout to run, or a folder that cannot be written.
    """
    steps = Steps(out, steps_of(names), tool="vqgan_jax.tools.tasks", run=run, clock=clock)
    steps.run_all(more=1, skip_finished=True)
    print(f"score the samples ({steps.elapsed} elapsed)", flush=True)
    shown: dict[str, Shown] = {}
    for name in names:
        task = TASKS[name]
        opened = open_task(steps.folder / task.transformer, steps.folder / "samples" / name, _asked(task), task.size)
        shown[name] = opened.shown(task.title, task.figure, task.enlarged)
        print(f"{task.title}: {shown[name].caption}", flush=True)
    images.save_png(steps.folder / SHEET, draw_sheet(shown.values()))
    storage.write_text(steps.folder / TABLE, table(shown))
    summary = {name: one.figures for name, one in shown.items()} | {"seconds": round(steps.seconds(), 1)}
    storage.write_json(steps.folder / report.SUMMARY, summary)
    print(f"{Path(out) / SHEET}, {Path(out) / TABLE} ({steps.elapsed} in all)", flush=True)
    return summary


def _asked(task: Task) -> dict[str, Any]:
    """The fields of `request.flags.Asked`, as the command of its samples has them."""
    return {"number": NUMBER, "each": task.each, **dict(task.given)}


def table(shown: dict[str, Shown]) -> str:
    """Markdown: the figure of each task, the same for shuffled conditions and for real pictures."""
    lines = ["| task | measure | samples | shuffled conditions | real pictures |", "|---|---|---|---|---|"]
    for one in shown.values():
        lines.append(f"| {one.title} | {one.figure.meaning} | {' | '.join(one.texts)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None, *, run: Runner = run_child) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vqgan_jax.tools.tasks",
        description="Trains, samples and scores every task of the paper on landscapes drawn by the code itself, and "
        "draws one sheet: about forty minutes on two CPU cores. Stopped, the same command goes on.",
        epilog="example: python -m vqgan_jax.tools.tasks --out=runs/tasks --only=segmentation,layout",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for everything that is written")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"some of {', '.join(TASKS)}")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")

    def work() -> None:
        names = [name for name in args.only.split(",") if name] or list(TASKS)
        for name in names:
            choose("--only", name, TASKS)
        run_tasks(args.out, names, run=run)

    return exit_code("tasks", work)


if __name__ == "__main__":
    sys.exit(main())
