"""Follows a run: scores every checkpoint that appears in a workdir, as a job beside the training, and keeps the best.

The trainer deletes old checkpoints. So the best one's networks, with EMA weights, are copied to a folder of their own
in the portable form, which every script takes as a --workdir.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from vqgan_jax import parallel, storage
from vqgan_jax.config import UserError
from vqgan_jax.scoring.sweeps import digest
from vqgan_jax.train import manifests
from vqgan_jax.train.setup import CHECKPOINTS

BEST, RECORD = "best_fid", "best.json"  # in the workdir
METRICS = ("fid", "rfid")
# A checkpoint in memory: what gives its figures, `fid` or `rfid` among them, and what copies its networks to a folder.
Opened = tuple[Callable[[], Mapping[str, Any]], Callable[[epath.Path], None]]


def follow(
    workdir: epath.Path,
    read: Callable[[int], Opened],
    out: epath.Path,
    *,
    definition: Mapping[str, Any],
    total: int,
    timeout: float,
    poll: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Scores checkpoints, oldest first, until the run is finished or nothing new came for `timeout` seconds.

    Args:
      workdir: of the run, which may still go on.
      read: completed steps of a checkpoint -> the checkpoint. It reads all it will ever need of the files, for the
        trainer may delete them any time, and meets no other host, for one of them may fail alone.
      out: JSON file of all rows; those it holds are not scored again.
      definition: all that defines the scores besides the checkpoint.
      total: steps of the whole run.
      timeout: seconds without a new checkpoint after which to give up; 0 to end once all there are scored.
      poll: seconds between looks.
      clock: seconds that only grow.
      sleep: waits.

    Returns:
      {"rows": [{"step", "scores"}], "best": {"step", metric, "path", "key"}, "definition", "key", "workdir"}; `key` is
      the digest of the definition.

    Raises:
      UserError: no checkpoint came at all, or `out` or the workdir's best is of another definition.
    """
    key = digest({"definition": definition})
    found, kept = parallel.of_first_host(lambda: [_read(out), _read(workdir / RECORD)])
    if found.get("rows") and found.get("key") != key:
        raise UserError(f"--out={out}: holds scores of other data or settings, or no followed run; name another file")
    if kept and kept.get("key") != key:
        raise UserError(
            f"--workdir={workdir}: {RECORD} and {BEST} were chosen by other data or settings; move both away"
        )
    rows = {row["step"]: row for row in found.get("rows", [])}
    gone: set[int] = set()
    last = clock()
    while not (rows and max(rows) >= total):
        waiting = [step for step in _sealed(workdir) if step not in rows and step not in gone]
        for step in waiting:
            opened, error = _try(read, step)
            if error is not None:
                sleep(poll)  # the trainer deletes file by file: what is still whole after that was not being deleted
                if step in _sealed(workdir):
                    raise error
                gone.add(step)
                parallel.say(f"step {step}: deleted before it was read ({error})")
                continue
            score, save = opened
            rows[step] = {"step": step, "scores": dict(score())}
            kept = _keep_best(workdir, rows[step], kept, key, save)
            ordered = [rows[k] for k in sorted(rows)]
            found = {"rows": ordered, "best": kept, "definition": definition, "key": key, "workdir": str(workdir)}
            if jax.process_index() == 0:
                storage.write_json(out, found)
            last = clock()
        if not waiting:
            if _expired(clock() - last, timeout):
                break
            sleep(poll)
    if not rows:
        raise UserError(f"--workdir={workdir}: no checkpoint came within {timeout:g} s")
    finished = max(rows) >= total
    parallel.say(f"the run is finished: {total} steps" if finished else f"no new checkpoint for {timeout:g} s")
    return found


def _expired(waited: float, timeout: float) -> bool:
    """Whether to give up; hosts agree, for their clocks do not."""
    return parallel.of_first_host(lambda: waited >= timeout)


def _try(read: Callable[[int], Opened], step: int) -> tuple[Opened | None, Exception | None]:
    """The checkpoint, or why it could not be read; an error on every host where one of them has one."""
    opened, error = None, None
    try:
        opened = read(step)
    except Exception as problem:  # a file may vanish under any of its readers
        error = problem
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.asarray(error is not None))
        if error is None and failed.any():
            error = UserError(f"step {step}: could not be read by host {int(np.argmax(failed))}")
    return opened, error


def _sealed(workdir: epath.Path) -> list[int]:
    """Steps of whole checkpoints, ascending, as the first host sees them."""

    def look() -> list[int]:
        folder = workdir / CHECKPOINTS
        names = [path.name for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
        return sorted(int(name) for name in names if (folder / name / manifests.MANIFEST).exists())

    return parallel.of_first_host(look)


def _keep_best(
    workdir: epath.Path, row: Mapping[str, Any], kept: dict[str, Any], key: str, save: Callable[[epath.Path], None]
) -> dict[str, Any]:
    """The record of the best checkpoint, `row` being the newest scored; its networks are written where it is that."""
    step, scores = row["step"], row["scores"]
    metric = next(name for name in METRICS if name in scores)
    better = scores[metric] < kept.get(metric, np.inf)
    parallel.say(f"step {step}: {metric} {scores[metric]:.4g}{' (best so far)' if better else ''}")
    if better:
        kept = {"step": step, metric: scores[metric], "path": str(workdir / BEST), "key": key}
        if jax.process_index() == 0:
            save(workdir / BEST)
            storage.write_json(workdir / RECORD, kept)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"kept {step}")
    return kept


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
