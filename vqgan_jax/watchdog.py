"""A thread on every host that ends a job in which nothing moves any more, and says which host the others wait for.

One host that is gone, or stuck in its data, leaves all others waiting in a collective for ever. JAX notices a process
that died (100 s), not one that hangs, and names neither. Hosts tell each other what they do in small files of a shared
folder, WORKDIR/hosts/INDEX.json, which is there before they have met.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from vqgan_jax import storage
from vqgan_jax.exit_codes import LOST

_logger = logging.getLogger(__name__)
FOLDER = "hosts"  # in a workdir
BEATS = 8  # a host writes so often in the time that it may take
# Which process of how many this is, in variables of launchers, before JAX knows: launch/local.sh's, and Slurm's.
LOCAL, _SLURM = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"), ("SLURM_PROCID", "SLURM_NTASKS")
_MULTISLICE = ("MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES")  # which slice of how many


class Watchdog:
    """Watches one host, within `with`. `beat` says that it moves, and what it does next.

    Args:
      folder: of all hosts of the job.
      index, count: which host this is, of how many.
      seconds: how long a host may take from one beat to the next.
      end: what is done when it takes longer, after the others' whereabouts are printed.
    """

    def __init__(
        self,
        folder: epath.Path,
        index: int,
        count: int,
        seconds: float,
        end: Callable[[int], Any] = os._exit,
    ):
        self._folder, self._index, self._count, self._seconds, self._end = folder, index, count, seconds, end
        self._doing, self._step, self._since, self._timed = "starting", 0, time.time(), True
        self._over, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, doing: str, *, timed: bool = True) -> None:
        """Says that this host has come to `step` and is `doing` something that, if `timed`, must end in time."""
        self._step, self._doing, self._since, self._timed = step, doing, time.time(), timed

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join(timeout=10)
        self._try(lambda: self._file(self._index).unlink(missing_ok=True))

    def _file(self, index: int) -> epath.Path:
        return self._folder / f"{index}.json"

    def _watch(self) -> None:
        while True:
            self._tell()
            if self._over.wait(self._seconds / BEATS):
                return
            if self._timed and time.time() - self._since > self._seconds:
                self._tell()
                print(f"error: {self._report()}", file=sys.stderr, flush=True)
                self._end(LOST)
                return

    def _tell(self) -> None:
        said = dict(host=socket.gethostname(), step=self._step, doing=self._doing, since=self._since, time=time.time())
        self._try(lambda: storage.write_json(self._file(self._index), said))

    def _try(self, work: Callable[[], Any]) -> None:
        """What a disk or bucket raises, in many types, is no reason to end, and said once."""
        try:
            work()
        except Exception as error:
            if not self._failed:
                _logger.warning("%s cannot be written (%s): others will count this host as gone", self._folder, error)
            self._failed = True

    def _report(self) -> str:
        reports = {}
        for index in range(self._count):
            try:
                reports[index] = json.loads(self._file(index).read_text())
            except Exception:  # missing, torn, or a bucket's own kinds
                continue
        waits = f"host {self._index} of {self._count} has been {self._doing} (step {self._step}) for"
        return f"{waits} {time.time() - self._since:.0f} s; {whereabouts(reports, self._count, self._seconds)}"


def whereabouts(reports: Mapping[int, Mapping[str, Any]], count: int, seconds: float) -> str:
    """Which hosts the others wait for: those never seen, or silent, or else behind; one line.

    Args:
      reports: what hosts said last, by index: `host`, `step`, `doing`, `since`, `time`.
      count: of all hosts.
      seconds: a host silent for so long is gone.
    """
    if missing := [index for index in range(count) if index not in reports]:
        return f"never seen: host {', '.join(map(str, missing))} of 0 to {count - 1}"
    now = max(report["time"] for report in reports.values())

    def name(index: int) -> str:
        said = reports[index]
        return f"host {index} ({said['host']}): {said['doing']}, step {said['step']}, since {now - said['since']:.0f} s"

    silent = [index for index in reports if now - reports[index]["time"] > seconds / 2]
    if silent:
        return f"no longer heard of: {'; '.join(map(name, silent))}"
    least = min((said["step"], said["doing"] == "in a step") for said in reports.values())
    behind = [i for i, said in reports.items() if (said["step"], said["doing"] == "in a step") == least]
    if len(behind) == count:
        return f"so are all others, in step {least[0]}"
    return f"behind the others: {'; '.join(map(name, behind))}"


def place_by(names: tuple[str, str]) -> tuple[int, int] | None:
    """(index, count) of this process as two variables of a launcher say it; None where they do not."""
    index, count = (os.environ.get(name) for name in names)
    return (int(index), int(count)) if index and count else None


def place_in_job() -> tuple[int, int] | None:
    """(index, count) of this process as its launcher says it, before JAX is asked; None where it does not say."""
    if place := place_by(LOCAL) or place_by(_SLURM):
        return place
    if "TPU_WORKER_ID" in os.environ and "TPU_WORKER_HOSTNAMES" in os.environ:
        worker, workers = int(os.environ["TPU_WORKER_ID"]), len(os.environ["TPU_WORKER_HOSTNAMES"].split(","))
        number, slices = place_by(_MULTISLICE) or (0, 1)  # workers are counted in their slice
        return number * workers + worker, slices * workers
    return None
