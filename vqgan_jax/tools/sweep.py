"""Runs the trials of a config's sweep, each stage once, resumes what is unfinished, and ends in a table and a page.

    python launch/sweep.py --config=configs/demo_sweep.py --out=runs/sweep --list
    python launch/sweep.py --config=configs/demo_sweep.py --out=runs/sweep --jobs=2
    python launch/sweep.py --config=configs/demo_sweep.py --out=gs://B/sweep --on=gke -- --image=IMAGE --tpu=v5e-16
    python launch/sweep.py --config=configs/demo_sweep.py --out=/shared/sweep --on=slurm -- --nodes=2 --gpus-per-node=8

What is behind -- goes to the launcher. What a config may define: vqgan_jax/tools/trials.py.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

from vqgan_jax import storage
from vqgan_jax.config import UserError, choose
from vqgan_jax.tools import report, tables
from vqgan_jax.tools.trials import ROOT, Plan, Stage, make_plan
from vqgan_jax.train.loop import PREEMPTED
from vqgan_jax.train.metric_writer import JSON_LINES

PLAN, DONE, LOGS = "sweep.json", "done", "logs"  # in the sweep's folder
SCRIPT = "launch/sweep.py"
TASK = "SLURM_ARRAY_TASK_ID"
# How each platform is asked for one command, and the python of that command.
LAUNCHERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "local": (("launch/local.sh", "--with-parent"), sys.executable),
    "gke": ((sys.executable, "launch/gke.py", "--wait"), "python"),
    "tpu_vm": (("launch/tpu_vm.sh",), "python"),
    "slurm": (("launch/slurm.sbatch",), "python"),
}


class Started(Protocol):
    """A command that runs: what `subprocess.Popen` offers."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int) -> None: ...


class Folder:
    """A sweep's folder: its plan, and which stages have ended well."""

    def __init__(self, out: str):
        self.path = storage.path(out)

    def write_plan(self, plan: Plan) -> None:
        """Raises UserError where the folder cannot be written."""
        storage.make_folder(self.path, f"--out={self.path}")
        storage.write_json(self.path / PLAN, plan.to_json())

    def read_plan(self) -> Plan:
        """Raises UserError where there is none."""
        try:
            return Plan.from_json(json.loads((self.path / PLAN).read_text()))
        except FileNotFoundError:
            raise UserError(f"--out={self.path}: no {PLAN} there; name the swept config with --config") from None

    def done(self) -> set[str]:
        """Names of the stages that have ended well, in this start or an earlier one."""
        return {file.stem for file in storage.files(self.path / DONE)}

    def mark(self, stage: Stage, seconds: float) -> None:
        """Notes that a stage has ended well."""
        record = {"command": shlex.join(["python", *stage.words]), "seconds": round(seconds, 1)}
        storage.write_json(self.path / DONE / f"{stage.name}.json", record)


def run_stages(
    plan: Plan,
    folder: Folder,
    start: Callable[[Stage], Started],
    *,
    jobs: int,
    told_to_stop: Callable[[], bool] = lambda: False,
    pause: float = 0.2,
) -> dict[str, str]:
    """Runs every stage that is not done, at most `jobs` at once, each after those that it needs.

    Args:
      plan: what to run.
      folder: where what is done is noted.
      start: starts a stage's command.
      jobs: at most so many at once.
      told_to_stop: asked again and again; once true, nothing is started any more and SIGTERM goes to what runs.
      pause: seconds between two looks.

    Returns:
      What did not end well by the stage's name, with the reason: "exit code 3", "needs NAME", "stopped".
    """
    done, failed = folder.done(), {}
    waiting = [stage for stage in plan.stages.values() if stage.name not in done]
    running: dict[str, tuple[Stage, Started, float]] = {}
    total, stopped = len(plan.stages), False
    while waiting or running:
        if not stopped and told_to_stop():
            stopped = True
            failed |= {stage.name: "stopped" for stage in waiting}
            waiting = []
            for _, command, _ in running.values():
                command.send_signal(signal.SIGTERM)
        for stage in list(waiting):
            if lost := next((need for need in stage.needs if need in failed), ""):
                failed[stage.name] = f"needs {lost}"
                waiting.remove(stage)
            elif len(running) < jobs and done.issuperset(stage.needs):
                print(f"[{len(done) + len(running) + 1}/{total}] {shlex.join(['python', *stage.words])}", flush=True)
                running[stage.name] = (stage, start(stage), time.monotonic())
                waiting.remove(stage)
        for name, (stage, command, began) in list(running.items()):
            if (code := command.poll()) is None:
                continue
            del running[name]
            if code == 0:
                folder.mark(stage, time.monotonic() - began)
                done.add(name)
            else:
                failed[name] = "stopped" if stopped else f"exit code {code}"
                print(f"{name}: {failed[name]}", file=sys.stderr, flush=True)
        if running:
            time.sleep(pause)
    return failed


def launcher(on: str, flags: Sequence[str], folder: Folder, jobs: int) -> Callable[[Stage], Started]:
    """Returns what starts a stage on a platform. With several jobs each writes a log of its own."""

    def start(stage: Stage) -> Started:
        if jobs == 1 or storage.is_remote(folder.path):
            return subprocess.Popen(_line(on, flags, stage), cwd=ROOT, start_new_session=True)
        logs = storage.make_folder(folder.path / LOGS, f"--out={folder.path}")
        with open(logs / f"{stage.name}.log", "ab") as file:
            return subprocess.Popen(
                _line(on, flags, stage), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    return start


def _line(on: str, flags: Sequence[str], stage: Stage) -> list[str]:
    """The launcher's command line for a stage."""
    command, python = LAUNCHERS[on]
    return [*command, f"--name={stage.job}", *flags, "--", python, *stage.words]


def slurm_lines(plan: Plan, done: set[str], out: str, flags: Sequence[str], jobs: int) -> Iterator[list[str]]:
    """The submissions of a sweep: an array for each depth of the chain, after the array before it, and the report.

    Yields:
      Command lines without --dependency; each prints the job that the next depends on.
    """
    command, python = LAUNCHERS["slurm"]
    depths: dict[str, int] = {}
    levels: dict[int, list[int]] = {}
    for index, stage in enumerate(plan.stages.values()):
        depths[stage.name] = 1 + max((depths[need] for need in stage.needs), default=0)
        if stage.name not in done:
            levels.setdefault(depths[stage.name], []).append(index)
    for depth, indices in sorted(levels.items()):
        array = f"--array={','.join(map(str, indices))}%{jobs}"
        yield [*command, f"--name=sweep-{depth}", array, *flags, "--", python, SCRIPT, f"--out={out}", "--run"]
    yield [
        *command,
        "--name=sweep-report",
        *flags,
        "--nodes=1",
        "--ntasks=1",
        "--",
        python,
        SCRIPT,
        f"--out={out}",
        "--report",
    ]


def submit(lines: Iterator[list[str]]) -> None:
    """Runs submissions, each to begin when the one before has ended, well or not. Raises UserError."""
    job = ""
    for line in lines:
        line = [*line[:1], *([f"--dependency=afterany:{job}"] if job else []), *line[1:]]
        try:
            found = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            raise UserError(f"could not submit ({error}): {shlex.join(line)}") from None
        job = found.stdout.strip().partition(";")[0]
        print(f"submitted {job}: {shlex.join(line)}", flush=True)


def run_one(plan: Plan, folder: Folder, index: int) -> int:
    """Runs the stage number `index` here, in every process of its job, and notes that it is done. Its exit code."""
    stages = list(plan.stages.values())
    if not 0 <= index < len(stages):
        raise UserError(f"--run={index}: there are stages 0 to {len(stages) - 1}")
    stage = stages[index]
    if lost := sorted(set(stage.needs) - folder.done()):
        raise UserError(f"{stage.name}: needs {', '.join(lost)}, which did not end well")
    began = time.monotonic()
    with _stop_request() as told_to_stop:
        command = subprocess.Popen([sys.executable, *stage.words], cwd=ROOT)
        handed_on = False
        while (code := command.poll()) is None:
            if told_to_stop() and not handed_on:
                command.send_signal(signal.SIGTERM)
                handed_on = True
            time.sleep(0.2)
    if code == 0 and os.environ.get("SLURM_PROCID", "0") == "0":
        folder.mark(stage, time.monotonic() - began)
    return code if code >= 0 else 128 - code


def write_report(plan: Plan, folder: Folder, title: str) -> list[Any]:
    """Writes report.html, .md, .csv, .tex and .png: a row a trial with all that its stages have told, curves of all.

    Raises:
      UserError: nothing is there yet.
    """
    done = folder.done()
    results = {stage.name: _results(stage) for stage in plan.stages.values() if stage.name in done}
    rows = {}
    for trial in plan.trials:
        row: dict[str, Any] = {}
        for name in trial.stages:
            for found in report.gather_rows(results.get(name, [])).values():
                row |= found
        if row:
            rows[tables.named(trial.name, row)] = row
    workdirs = [path for paths in results.values() for path in paths if not path.endswith(".json")]
    if not rows:
        raise UserError(f"{folder.path}: no results yet; --list says what is done")
    files = report.report(workdirs, str(folder.path / "report.html"), title, rows)
    print(tables.markdown(rows), flush=True)
    return files


def _results(stage: Stage) -> list[str]:
    """What a report reads of a stage: a workdir, or a JSON of scores; nothing of one that has no figures."""
    place = storage.absolute(stage.out if storage.is_remote(stage.out) else ROOT / stage.out)
    found = [str(place)] if (place / JSON_LINES).exists() else []
    scores = place.parent / f"{place.name}.json"
    return [*found, *([str(scores)] if scores.exists() else [])]


def describe(plan: Plan, done: set[str]) -> str:
    """The trials with their stages, and which of these are done."""
    lines = []
    for trial in plan.trials:
        lines.append(trial.name)
        lines += [f"  {'done' if name in done else '    '} {name}" for name in trial.stages]
    left = sum(name not in done for name in plan.stages)
    lines.append(f"{len(plan.trials)} trials, {len(plan.stages)} stages, {left} to do")
    return "\n".join(lines)


def check_flags(words: Sequence[str]) -> None:
    """Lets a script that has no config check its flags. Raises UserError with what it says."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *words, "--only_check_args"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        said = [line.removeprefix("error: ") for line in found.stderr.splitlines() if line.strip()]
        raise UserError(f"{words[0]}: {said[-1] if said else f'exit code {found.returncode}'}")


def check_once() -> Callable[[Sequence[str]], None]:
    """`check_flags` of what it has not seen: places aside, most trials have the same flags."""
    seen = set()

    def check(words: Sequence[str]) -> None:
        flags = tuple(word for word in words if not word.startswith(("--workdir=", "--out=")))
        if flags not in seen:
            check_flags(words)
            seen.add(flags)

    return check


@contextlib.contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGTERM or Ctrl-C has come since."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def named_from_root(out: str) -> str:
    """A sweep's folder as commands that run from the repository's root name it."""
    if storage.is_remote(out):
        return out
    folder = storage.path(out).resolve()
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `flags` is what stands behind --."""
    argv, behind = list(argv), []
    if "--" in argv:
        argv, behind = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog=f"python {SCRIPT}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the sweep; gs:// for GKE and TPU VMs")
    parser.add_argument(
        "--config", default="", metavar="FILE[:ARG]", help="what is swept; once begun, sweep.json says it"
    )
    parser.add_argument(
        "--sweep", default="", metavar="NAME,NAME", help="sweep_NAME() of the config; the product of several"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override of all trials")
    parser.add_argument("--on", default="local", help=f"platform: {', '.join(LAUNCHERS)}")
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument(
        "--report", action="store_true", help="write the table and the page of what is done, and no more"
    )
    parser.add_argument(
        "--run", nargs="?", const=-1, type=int, metavar="N", help=f"run stage N alone (by default ${TASK})"
    )
    args = parser.parse_args(argv)
    args.flags = behind
    return args


def sweep(args: argparse.Namespace) -> int:
    """Does what was asked and returns the exit code. Raises UserError."""
    choose("--on", args.on, LAUNCHERS)
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: write 1 or more")
    if args.on in ("gke", "tpu_vm") and not storage.is_remote(args.out):
        raise UserError(f"--out={args.out}: machines of {args.on} cannot read it; name a bucket, gs://BUCKET/FOLDER")
    out, folder = named_from_root(args.out), Folder(args.out)
    if args.run is not None:
        index = int(os.environ.get(TASK, "-1")) if args.run < 0 else args.run
        return run_one(folder.read_plan(), folder, index)
    if args.config:
        quick = args.list or args.report or args.dry_run
        names = args.sweep.split(",") if args.sweep else ()
        plan = make_plan(args.config, out, sweeps=names, settings=args.set, check=None if quick else check_once())
        if not quick:
            folder.write_plan(plan)
    else:
        plan = folder.read_plan()
    if args.list:
        print(describe(plan, folder.done()), flush=True)
        return 0
    failed: dict[str, str] = {}
    if args.on == "slurm" and not args.report:
        lines = slurm_lines(plan, folder.done(), out, args.flags, args.jobs)
        if args.dry_run:
            for line in lines:
                print(shlex.join(line), flush=True)
        else:
            submit(lines)
        return 0
    if args.dry_run:
        for stage in plan.stages.values():
            if stage.name not in folder.done():
                print(shlex.join(_line(args.on, args.flags, stage)), flush=True)
        return 0
    if not args.report:
        print(describe(plan, folder.done()), flush=True)
        with _stop_request() as told_to_stop:
            start = launcher(args.on, args.flags, folder, args.jobs)
            failed = run_stages(plan, folder, start, jobs=args.jobs, told_to_stop=told_to_stop)
        if "stopped" in failed.values():
            print(f"stopped; to go on: python {SCRIPT} --out={args.out}", file=sys.stderr)
            return PREEMPTED
    for file in write_report(plan, folder, title=args.config.partition(":")[0] or out) if folder.done() else ():
        print(f"wrote {file}", flush=True)
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        return sweep(parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        message = str(error)
    except Exception as error:
        if not storage.is_bucket_error(error):
            raise
        message = f"gs://: the bucket does not answer as it should ({' '.join(str(error).split()) or repr(error)})"
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
