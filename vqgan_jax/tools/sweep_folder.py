"""A sweep's folder: its plan, the plans that were submitted, which stages are done, and who runs which.

What is done counts by the digest of all that defines it, and a stage is run by whoever has claimed it: two runners of
one folder, on one machine or several, never run a stage both.
"""

import dataclasses
import datetime
import json
import os
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

from etils import epath

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.tools.trials import Plan, Stage

PLAN, SUBMITTED, DONE, RUNNING = "sweep.json", "submitted", "done", "running"  # in the folder
TASK = "SLURM_ARRAY_TASK_ID"  # which task of an array of Slurm this process is in
RUNS, LEFT, GONE = "runs", "left", "gone"  # what a holder's processes do
Process = tuple[int, str]  # its number and when it started, for numbers are given anew


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has claimed a stage: a process of a host, what it has started for it, and the job of Slurm that it is in.

    With `as_job` it is that whole job, whose processes run the stage together.
    """

    host: str
    slurm: str
    as_job: bool
    runner: Process
    command: Process | None
    since: str

    @classmethod
    def here(cls, command: int | None = None, *, as_job: bool = False) -> "Holder":
        """This process, or the job that it is in, with what it has started."""
        now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds").removesuffix("+00:00")
        array = os.environ.get("SLURM_ARRAY_JOB_ID")  # the id of one of its tasks is that of the whole array
        job = f"{array}_{os.environ[TASK]}" if array else os.environ.get("SLURM_JOB_ID", "")
        started = None if command is None else (command, _start_of(command))
        runner = (os.getpid(), _start_of(os.getpid()))
        return cls(socket.gethostname(), job, as_job and job != "", runner, started, f"{now} UTC")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Holder":
        """What `dataclasses.asdict` made, read from JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})

    def is_the_same_as(self, other: "Holder") -> bool:
        """Whether both are one process, or one job of Slurm; one allocation may hold several runners."""
        if self.as_job and other.as_job:
            return self.slurm == other.slurm
        return (self.host, self.runner) == (other.host, other.runner)

    def state(self) -> str:
        """RUNS, LEFT (the runner has gone, what it has started has not) or GONE; what is not known from here RUNS."""
        here = self.host == socket.gethostname()
        if self.slurm and (self.as_job or not here) and (known := _slurm_knows(self.slurm)) is not None:
            return RUNS if known else GONE
        if not here or _lives(self.runner):
            return RUNS
        return LEFT if self.command is not None and _lives(self.command) else GONE

    def __str__(self) -> str:
        job = f", job {self.slurm}" if self.slurm else ""
        return f"process {self.runner[0]} on {self.host}{job}, since {self.since}"


class Folder:
    """A sweep's folder, local or in a bucket.

    Args:
      out: the folder.
      as_job: whether stages are claimed for the whole job of Slurm that this process is in, where it is in one.
    """

    def __init__(self, out: str, as_job: bool = False):
        self.path, self._as_job = storage.path(out), as_job

    def write_plan(self, plan: Plan) -> None:
        """Raises UserError where the folder cannot be written."""
        storage.make_folder(self.path, f"--out={self.path}")
        storage.write_json(self.path / PLAN, plan.to_json())

    def submit_plan(self, plan: Plan) -> str:
        """Keeps a plan for jobs that know their stage by its number: no later plan replaces it. Returns its name."""
        storage.make_folder(self.path, f"--out={self.path}")
        storage.write_json(self.path / self.name_of(plan), plan.to_json())
        return self.name_of(plan)

    def name_of(self, plan: Plan) -> str:
        """Where `submit_plan` keeps a plan, in the folder."""
        return f"{SUBMITTED}/{storage.digest(plan.to_json())[:12]}.json"

    def read_plan(self, name: str = PLAN) -> Plan:
        """The sweep's plan, or the one that `submit_plan` named. Raises UserError where there is none."""
        hint = "; name the swept config with --config"
        try:
            return Plan.from_json(json.loads((self.path / name).read_text()))
        except FileNotFoundError:
            raise UserError(f"--out={self.path}: no {name} there{hint if name == PLAN else ''}") from None
        except (TypeError, KeyError):
            raise UserError(f"{self.path / name}: was written by another version{hint}") from None

    def done(self, plan: Plan) -> set[str]:
        """Names of the plan's stages that have ended well, in this start or an earlier one.

        Raises:
          UserError: of a stage of that name something else was done than the plan says.
        """
        there = {file.name for file in storage.files(self.path / DONE)}
        return {stage.name for stage in plan.stages.values() if f"{stage.name}.json" in there and self.is_done(stage)}

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage has ended well. Raises as `done`."""
        file = self.path / DONE / f"{stage.name}.json"
        try:
            digest = json.loads(file.read_text()).get("digest")
        except FileNotFoundError:
            return False
        if digest != stage.digest:
            raise UserError(
                f"{file}: tells of another config than that of this sweep; delete it and {stage.out} to run the stage "
                "again, or name another --out"
            )
        return True

    def mark(self, stage: Stage, seconds: float) -> None:
        """Notes that a stage has ended well."""
        command = shlex.join(["python", *stage.words])
        record = {"digest": stage.digest, "command": command, "seconds": round(seconds, 1)}
        storage.write_json(self.path / DONE / f"{stage.name}.json", record)

    def claim(self, stage: Stage) -> Holder | None:
        """Makes this process, or its job, the one that runs a stage. Returns None, or who else runs it.

        Claims are numbered and never overwritten by others, so that of two who find the last one dead at once one wins.
        Ask `is_done` afterwards: who held it before may have ended well just now.
        """
        here = Holder.here(as_job=self._as_job)
        while True:
            number, holder = self._last_claim(stage)
            if holder is not None and holder.is_the_same_as(here):
                return None
            if holder is not None and holder.state() != GONE:
                return holder
            if self._write_claim(stage, number + 1, here):
                return None

    def holder(self, stage: Stage) -> Holder | None:
        """Who else runs a stage; None where nobody does."""
        _, holder = self._last_claim(stage)
        here = Holder.here(as_job=self._as_job)
        if holder is None or holder.is_the_same_as(here) or holder.state() == GONE:
            return None
        return holder

    def note_command(self, stage: Stage, process: int) -> None:
        """Adds to this process's claim what it has started: whoever comes after it is dead waits for that to end."""
        number, _ = self._last_claim(stage)
        holder = Holder.here(process, as_job=self._as_job)
        storage.write_json(self.claims(stage) / f"{number}.json", dataclasses.asdict(holder))

    def release(self, stage: Stage) -> None:
        """Gives this process's claim up, after `mark` where that is due."""
        for file in storage.files(self.claims(stage)):
            file.unlink(missing_ok=True)

    def claims(self, stage: Stage) -> epath.Path:
        """Where the claims of a stage lie: none where nobody runs it."""
        return self.path / RUNNING / stage.name

    def _write_claim(self, stage: Stage, number: int, holder: Holder) -> bool:
        return storage.create(self.claims(stage) / f"{number}.json", json.dumps(dataclasses.asdict(holder)).encode())

    def _last_claim(self, stage: Stage) -> tuple[int, Holder | None]:
        """The number of the newest claim, 0 where there is none, and whose it is."""
        numbers = [int(file.stem) for file in storage.files(self.claims(stage)) if file.stem.isdecimal()]
        if not numbers:
            return 0, None
        try:
            text = (self.claims(stage) / f"{max(numbers)}.json").read_text()
            return max(numbers), Holder.from_json(json.loads(text))
        except FileNotFoundError:  # given up meanwhile
            return max(numbers), None
        except (ValueError, TypeError):
            raise UserError(f"{self.claims(stage) / str(max(numbers))}.json: is no claim; delete it") from None


def _start_of(process: int) -> str:
    """When a process started, as the kernel counts it; "" of one that has gone, or where there is no /proc."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _lives(process: Process) -> bool:
    number, start = process
    if Path("/proc/self/stat").exists():
        return bool(start) and _start_of(number) == start
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _slurm_knows(job: str) -> bool | None:
    """Whether a job waits or runs; None where Slurm does not say."""
    try:
        found = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True)
    except OSError:
        return None
    if found.returncode == 0:
        return bool(found.stdout.strip())
    return False if "Invalid job id" in found.stderr else None
