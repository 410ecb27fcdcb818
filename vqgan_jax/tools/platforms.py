"""How each platform is asked, through launch/, to run the stages of a sweep."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.tools.sweep_folder import Folder
from vqgan_jax.tools.trials import ROOT, Plan, Stage

SCRIPT = "launch/sweep.py"
LOGS = "logs"  # in the sweep's folder
# How each platform is asked for one command, and the python of that command.
LAUNCHERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "local": (("launch/local.sh", "--with-parent"), sys.executable),
    "gke": ((sys.executable, "launch/gke.py", "--wait"), "python"),
    "tpu_vm": (("launch/tpu_vm.sh",), "python"),
    "slurm": (("launch/slurm.sbatch",), "python"),
}
# What ends a command that goes on when its launcher here is stopped.
DELETES: Mapping[str, str] = {"gke": "--delete", "tpu_vm": "--only=delete"}


class Started(Protocol):
    """A command that runs: what `subprocess.Popen` offers."""

    pid: int

    def poll(self) -> int | None: ...

    def send_signal(self, number: int) -> None: ...


def launcher(on: str, flags: Sequence[str], folder: Folder, jobs: int) -> Callable[[Stage], Started]:
    """Returns what starts a stage on a platform. With several jobs each writes a log of its own."""

    def start(stage: Stage) -> Started:
        line = launch_line(on, flags, stage)
        if jobs == 1 or storage.is_remote(folder.path):
            return subprocess.Popen(line, cwd=ROOT, start_new_session=True)
        logs = storage.make_folder(folder.path / LOGS, f"--out={folder.path}")
        with open(logs / f"{stage.name}.log", "ab") as file:
            return subprocess.Popen(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    return start


def launch_line(on: str, flags: Sequence[str], stage: Stage) -> list[str]:
    """The launcher's command line for a stage."""
    command, python = LAUNCHERS[on]
    return [*command, f"--name={stage.job}", *flags, "--", python, *stage.words]


def delete_line(on: str, flags: Sequence[str], stage: Stage) -> list[str]:
    """What deletes a stage's machines; empty where a launcher that is stopped stops what it has started."""
    command, _ = LAUNCHERS[on]
    return [*command, f"--name={stage.job}", *flags, DELETES[on]] if on in DELETES else []


def slurm_lines(
    plan: Plan, done: set[str], out: str, submitted: str, flags: Sequence[str], jobs: int
) -> Iterator[list[str]]:
    """The submissions of a sweep: an array for each depth of the chain, after the array before it, and the report.

    Args:
      plan: what to run.
      done: names of stages that are left out.
      out: the sweep's folder.
      submitted: the name under which that folder keeps this very plan, whose stages the arrays count.
      flags: of the launcher.
      jobs: at most so many tasks of an array at once.

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
    behind = ["--", python, SCRIPT, f"--out={out}", f"--plan={submitted}"]
    for depth, indices in sorted(levels.items()):
        array = f"--array={','.join(map(str, indices))}%{jobs}"
        yield [*command, f"--name=sweep-{depth}", array, *flags, *behind, "--run"]
    yield [*command, "--name=sweep-report", *flags, "--nodes=1", "--ntasks=1", *behind, "--report"]


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
