"""Runs the trials of a config's sweep, each stage once, resumes what is unfinished, and ends in a table and a page.

    python launch/sweep.py --config=configs/demo_sweep.py --out=runs/sweep --list
    python launch/sweep.py --config=configs/demo_sweep.py --out=runs/sweep --jobs=2
    python launch/sweep.py --config=configs/demo_sweep.py --out=gs://B/sweep --on=gke -- --image=IMAGE --tpu=v5e-16
    python launch/sweep.py --config=configs/demo_sweep.py --out=/shared/sweep --on=slurm -- --nodes=2 --gpus-per-node=8

What is behind -- goes to the launcher. What a config may define: vqgan_jax/tools/trials.py.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from vqgan_jax import cli, storage
from vqgan_jax.config import UserError, choose
from vqgan_jax.exit_codes import PREEMPTED
from vqgan_jax.tools import platforms, report, tables
from vqgan_jax.tools.platforms import LAUNCHERS, SCRIPT, Started
from vqgan_jax.tools.sweep_folder import LEFT, PLAN, RUNS, TASK, Folder, Holder
from vqgan_jax.tools.trials import ROOT, Plan, Stage, check_unchanged, make_plan
from vqgan_jax.train.metric_writer import JSON_LINES

STOPPED, NOT_BEGUN = "stopped", "not begun"  # of stages, once the sweep was told to stop


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

    A stage that another runner of the folder holds is not run. One that a dead runner has left behind is waited for.

    Args:
      plan: what to run.
      folder: where what is done, and who runs what, is noted.
      start: starts a stage's command.
      jobs: at most so many at once.
      told_to_stop: asked again and again; once true, nothing is started any more and SIGTERM goes to what runs.
      pause: seconds between two looks.

    Returns:
      What did not end well by the stage's name, with the reason: "exit code 3", "needs NAME", STOPPED, NOT_BEGUN, who
      runs it.

    Raises:
      UserError: of a stage something else was done than the plan says.
    """
    done, failed = folder.done(plan), {}
    waiting = [stage for stage in plan.stages.values() if stage.name not in done]
    running: dict[str, tuple[Stage, Started, float]] = {}
    waited_for: set[str] = set()
    total, stopped = len(plan.stages), False
    while waiting or running:
        if not stopped and told_to_stop():
            stopped = True
            failed |= {stage.name: NOT_BEGUN for stage in waiting}
            waiting = []
            for _, command, _ in running.values():
                command.send_signal(signal.SIGTERM)
        for stage in list(waiting):
            if lost := next((need for need in stage.needs if need in failed), ""):
                failed[stage.name] = f"needs {lost}"
                waiting.remove(stage)
            elif len(running) < jobs and done.issuperset(stage.needs):
                if (holder := folder.claim(stage)) is not None and (state := holder.state()) != RUNS:
                    if state == LEFT and stage.name not in waited_for:
                        left = f"process {holder.command[0]}, which a runner that died has left behind"
                        print(f"{stage.name}: waits for {left}", flush=True)
                        waited_for.add(stage.name)
                    continue
                waiting.remove(stage)
                if holder is not None:
                    failed[stage.name] = _held(folder, stage, holder)
                elif folder.is_done(stage):
                    folder.release(stage)
                    done.add(stage.name)
                elif changed := _changed(plan, stage):
                    folder.release(stage)
                    failed[stage.name] = changed
                else:
                    number = len(done) + len(running) + 1
                    print(f"[{number}/{total}] {shlex.join(['python', *stage.words])}", flush=True)
                    command = start(stage)
                    folder.note_command(stage, command.pid)
                    running[stage.name] = (stage, command, time.monotonic())
        for name, (stage, command, began) in list(running.items()):
            if (code := command.poll()) is None:
                continue
            del running[name]
            if code == 0:
                folder.mark(stage, time.monotonic() - began)
                done.add(name)
            else:
                failed[name] = STOPPED if stopped else f"exit code {code}"
                print(f"{name}: {failed[name]}", file=sys.stderr, flush=True)
            folder.release(stage)
        if waiting or running:
            time.sleep(pause)
    return failed


def run_one(plan: Plan, folder: Folder, index: int) -> int:
    """Runs the stage number `index` here, in every process of its job, and notes that it is done. Its exit code.

    `folder` claims for the whole job.
    """
    stages = list(plan.stages.values())
    if not 0 <= index < len(stages):
        raise UserError(f"--run={index}: there are stages 0 to {len(stages) - 1}")
    stage = stages[index]
    if folder.is_done(stage):
        print(f"{stage.name}: is done", flush=True)
        return 0
    if lost := sorted(set(stage.needs) - folder.done(plan)):
        raise UserError(f"{stage.name}: needs {', '.join(lost)}, which did not end well")
    check_unchanged(plan, [stage])
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    with _stop_request() as told_to_stop:
        while (holder := (folder.claim if first else folder.holder)(stage)) is not None:
            if holder.state() == RUNS:
                raise UserError(f"{stage.name}: {_held(folder, stage, holder)}")
            if told_to_stop():
                return PREEMPTED
            time.sleep(0.2)
        if folder.is_done(stage):  # by whoever held it meanwhile
            if first:
                folder.release(stage)
            return 0
        began = time.monotonic()
        command = subprocess.Popen([sys.executable, *stage.words], cwd=ROOT)
        if first:
            folder.note_command(stage, command.pid)
        handed_on = False
        while (code := command.poll()) is None:
            if told_to_stop() and not handed_on:
                command.send_signal(signal.SIGTERM)
                handed_on = True
            time.sleep(0.2)
    if first:
        if code == 0:
            folder.mark(stage, time.monotonic() - began)
        folder.release(stage)
    return code if code >= 0 else 128 - code


def _held(folder: Folder, stage: Stage, holder: Holder) -> str:
    return f"is run by {holder}; should that be dead, delete {folder.claims(stage)}"


def _changed(plan: Plan, stage: Stage) -> str:
    """What `check_unchanged` says of a stage, "" where nothing is wrong."""
    try:
        check_unchanged(plan, [stage])
    except UserError as error:
        return str(error)
    return ""


def write_report(plan: Plan, folder: Folder, title: str) -> list[Any]:
    """Writes report.html, .md, .csv, .tex and .png: a row a trial with all that its stages have told, curves of all.

    Raises:
      UserError: nothing is there yet.
    """
    done = folder.done(plan)
    results = {stage.name: _results(stage) for stage in plan.stages.values() if stage.name in done}
    rows = {}
    for trial in plan.trials:
        row: dict[str, Any] = {}
        for name in trial.stages:
            for found in report.gather_rows(results.get(name, [])).values():
                again = {_column(figure) for figure in found}  # a later stage's word on the same counts
                row = {figure: value for figure, value in row.items() if _column(figure) not in again} | found
        if row:
            rows[tables.named(trial.name, row)] = row
    workdirs = [path for paths in results.values() for path in paths if not path.endswith(".json")]
    if not rows:
        raise UserError(f"{folder.path}: no results yet; --list says what is done")
    files = report.report(workdirs, str(folder.path / "report.html"), title, rows)
    print(tables.markdown(rows), flush=True)
    return files


def _column(figure: str) -> tuple[str, str]:
    """What a table's column says of itself: some figures have two names."""
    return tables.figure(figure).label, tables.figure(figure).unit


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
    parser.add_argument("--plan", default=PLAN, help="which plan of the folder --run and --report take")
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
        return run_one(folder.read_plan(args.plan), Folder(args.out, as_job=True), index)
    if args.config:
        quick = args.list or args.report or args.dry_run
        names = args.sweep.split(",") if args.sweep else ()
        check = None if quick else platforms.check_once()
        plan = make_plan(args.config, out, sweeps=names, settings=args.set, check=check)
        if not quick:
            folder.write_plan(plan)
    else:
        plan = folder.read_plan(args.plan)
    done = folder.done(plan)
    if args.list:
        print(describe(plan, done), flush=True)
        return 0
    failed: dict[str, str] = {}
    if args.on == "slurm" and not args.report:
        submitted = folder.name_of(plan) if args.dry_run else folder.submit_plan(plan)
        lines = platforms.slurm_lines(plan, done, out, submitted, args.flags, args.jobs)
        if args.dry_run:
            for line in lines:
                print(shlex.join(line), flush=True)
        else:
            platforms.submit(lines)
        return 0
    if args.dry_run:
        for stage in plan.stages.values():
            if stage.name not in done:
                print(shlex.join(platforms.launch_line(args.on, args.flags, stage)), flush=True)
        return 0
    if not args.report:
        check_unchanged(plan, [stage for name, stage in plan.stages.items() if name not in done])
        print(describe(plan, done), flush=True)
        with _stop_request() as told_to_stop:
            start = platforms.launcher(args.on, args.flags, folder, args.jobs)
            failed = run_stages(plan, folder, start, jobs=args.jobs, told_to_stop=told_to_stop)
        if {STOPPED, NOT_BEGUN} & set(failed.values()):
            for name in (name for name, reason in failed.items() if reason == STOPPED):
                if line := platforms.delete_line(args.on, args.flags, plan.stages[name]):
                    print(f"{name}: may go on running, and cost; to delete it: {shlex.join(line)}", file=sys.stderr)
            print(f"stopped; to go on: python {SCRIPT} --out={args.out}", file=sys.stderr)
            return PREEMPTED
    for file in write_report(plan, folder, title=args.config.partition(":")[0] or out) if folder.done(plan) else ():
        print(f"wrote {file}", flush=True)
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return cli.exit_code(lambda: sweep(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
