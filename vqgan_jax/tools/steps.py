"""What `make demo` and the tool of all tasks share: they run the commands that a user would type, one after the other,
say how long it takes, and write commands.json about them."""

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
from vqgan_jax import cli, storage
from vqgan_jax.config import UserError
from vqgan_jax.exit_codes import PREEMPTED
from vqgan_jax.tools import report

ROOT = Path(vqgan_jax.__file__).resolve().parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
SHARPER = ("--temperature=0.9", "--top_p=0.9")  # transformers trained for minutes are not yet sure of themselves

Runner = Callable[[Sequence[str], Mapping[str, str]], int]  # (argv, environment) -> exit code


class Step(NamedTuple):
    """One command: `python ARGS` with {out} for the folder of all, the seconds it takes on two cores, and a picture
    that it makes with the name under which it is shown."""

    title: str
    args: tuple[str, ...]
    seconds: float
    shown: tuple[str, str] | None = None


class ChildFailed(Exception):
    """A command ended with another exit code than 0, which is `code`."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Steps:
    """Runs steps and says how far they are."""

    def __init__(
        self,
        out: str | Path,
        steps: Sequence[Step],
        *,
        tool: str,
        run: Runner,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing runs yet.

        Args:
          out: the folder of all that is made; commands name it relative to the repository where it lies inside.
          steps: of the whole.
          tool: `python -m` what, for what is said after a stop.
          run: runs one command from the repository's root.
          clock: seconds that only grow.

        Raises:
          UserError: no checkout to run, or a folder that cannot be written.
        """
        if not (ROOT / steps[0].args[0]).exists():
            raise UserError(f"{ROOT}: no {steps[0].args[0]} here; this needs a clone of the repository")
        self.folder = cli.check_workdir(str(out)).resolve()
        self._again = f"python -m {tool} --out={out}"
        self._steps, self._run, self._clock = steps, run, clock
        self._shown_as = self.folder.relative_to(ROOT) if self.folder.is_relative_to(ROOT) else self.folder
        self._variables = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
        self._start = clock()

    @property
    def elapsed(self) -> str:
        """Since the beginning, to read."""
        return _clock(self._clock() - self._start)

    def run_all(self, *, more: int = 0, skip_finished: bool = False) -> None:
        """Runs every step.

        Args:
          more: parts of the whole that follow and are no steps.
          skip_finished: leave out commands that ended well before.

        Raises:
          ChildFailed: a command failed.
          UserError: a command did not write what it should.
        """
        finished = {entry["command"] for entry in _entries(self.folder) if not entry["exit"]} if skip_finished else ()
        left = [step for step in self._steps if self.command(step) not in finished]
        planned, done = sum(step.seconds for step in left), 0.0
        for number, step in enumerate(self._steps, 1):
            if step not in left:
                continue
            elapsed = self._clock() - self._start
            # The pace so far is known only once something slow has run from its beginning.
            estimate = elapsed + (planned - done) * (elapsed / done if elapsed > done > 0 else 1)
            place = f"[{number}/{len(self._steps) + more}]"
            print(f"{place} {step.title} ({_clock(elapsed)} elapsed, about {_clock(estimate)} in all)", flush=True)
            self._one(step)
            done += step.seconds

    def command(self, step: Step) -> str:
        """A step as a user would type it."""
        variables = (f"{name}={shlex.quote(value)}" for name, value in self._variables.items())
        return " ".join([*variables, shlex.join(["python", *self._args(step)])])

    def seconds(self) -> float:
        """Spent in the commands of all starts together."""
        return sum(entry["seconds"] for entry in _entries(self.folder))

    def _args(self, step: Step) -> list[str]:
        return [arg.format(out=self._shown_as) for arg in step.args]

    def _one(self, step: Step) -> None:
        command = self.command(step)
        print(f"$ {command}", flush=True)
        began = self._clock()
        code = self._run([sys.executable, *self._args(step)], {**os.environ, **self._variables})
        entry = {"command": command, "seconds": round(self._clock() - began, 1), "exit": code}
        storage.write_json(self.folder / report.COMMANDS, [*_entries(self.folder), entry])
        if code == PREEMPTED:
            raise ChildFailed(f"stopped and saved; to go on: {self._again}", code)
        if code != 0:
            raise ChildFailed(f"exit code {code} of: {command}", code)
        if step.shown is not None:
            source, target = (self.folder / name for name in step.shown)
            if not source.exists():
                raise UserError(f"{source}: missing, though this ended well: {command}")
            if source != target:
                shutil.copyfile(source, target)


def exit_code(tool: str, work: Callable[[], Any]) -> int:
    """Runs `work` and returns the exit code as `cli.exit_code` does, or that of the command which failed."""

    def run() -> int:
        try:
            work()
        except ChildFailed as error:
            print(f"{tool}: {error}", file=sys.stderr)
            return error.code
        return 0

    return cli.exit_code(run)


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


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The commands that ended, in commands.json."""
    path = folder / report.COMMANDS
    return json.loads(path.read_text()) if path.exists() else []


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
