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

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.train import checkpoints
from vqgan_jax.train.setup import CHECKPOINTS

BEST, RECORD = "best_fid", "best.json"  # in the workdir
METRICS = ("fid", "rfid")


def follow(
    workdir: epath.Path,
    score: Callable[[int], tuple[Mapping[str, Any], Callable[[epath.Path], None]]],
    out: epath.Path,
    *,
    total: int,
    timeout: float,
    poll: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Scores checkpoints, oldest first, until the run is finished or nothing new came for `timeout` seconds.

    Args:
      workdir: of the run, which may still go on.
      score: completed steps of a checkpoint -> its figures, `fid` or `rfid` among them, and a function that copies its
        networks to a folder. It reads the checkpoint once, for the trainer may delete it any time.
      out: JSON file of all rows; those it holds are not scored again.
      total: steps of the whole run.
      timeout: seconds without a new checkpoint after which to give up; 0 to end once all there are scored.
      poll: seconds between looks.
      clock: seconds that only grow.
      sleep: waits.

    Returns:
      {"rows": [{"step", "scores"}], "best": {"step", metric, "path"}, "workdir"}.

    Raises:
      UserError: no checkpoint came at all.
    """
    rows = {row["step"]: row for row in _read(out).get("rows", [])}
    gone: set[int] = set()
    last = clock()
    while not (rows and max(rows) >= total):
        waiting = [step for step in _sealed(workdir) if step not in rows and step not in gone]
        for step in waiting:
            try:
                scores, save = score(step)
            except (UserError, OSError) as error:
                if step in _sealed(workdir):
                    raise
                gone.add(step)
                _say(f"step {step}: deleted before it was read ({error})")
                continue
            rows[step] = {"step": step, "scores": dict(scores)}
            _record(workdir, out, rows, step, save)
            last = clock()
        if not waiting:
            if _expired(clock() - last, timeout):
                break
            sleep(poll)
    if not rows:
        raise UserError(f"--workdir={workdir}: no checkpoint came within {timeout:g} s")
    _say(f"the run is finished: {total} steps" if max(rows) >= total else f"no new checkpoint for {timeout:g} s")
    return _read(out)


def _expired(waited: float, timeout: float) -> bool:
    """Whether to give up; hosts agree, for their clocks do not."""
    expired = waited >= timeout
    if jax.process_count() > 1:
        expired = bool(multihost_utils.broadcast_one_to_all(np.asarray(expired)))
    return expired


def _sealed(workdir: epath.Path) -> list[int]:
    """Steps of whole checkpoints, ascending, as the first host sees them."""
    folder = workdir / CHECKPOINTS
    found = []
    if jax.process_index() == 0 and folder.is_dir():
        names = [path.name for path in folder.iterdir() if path.name.isdigit()]
        found = sorted(int(name) for name in names if (folder / name / checkpoints.MANIFEST).exists())
    if jax.process_count() > 1:
        padded = np.full(1024, -1, np.int32)
        padded[: len(found)] = found[-1024:]
        found = [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]
    return found


def _record(
    workdir: epath.Path, out: epath.Path, rows: dict[int, dict[str, Any]], step: int, save: Callable[[epath.Path], None]
) -> None:
    """Writes the rows, and the networks of `step` where it is the best so far."""
    if jax.process_index() == 0:
        scores = rows[step]["scores"]
        metric = next(name for name in METRICS if name in scores)
        best = min(rows.values(), key=lambda row: row["scores"].get(metric, np.inf))["step"]
        _say(f"step {step}: {metric} {scores[metric]:.4g}{' (best so far)' if best == step else ''}")
        if best == step:
            save(workdir / BEST)
            storage.write_json(workdir / RECORD, {"step": step, metric: scores[metric], "path": str(workdir / BEST)})
        ordered = [rows[k] for k in sorted(rows)]
        storage.write_json(out, {"rows": ordered, "best": _read(workdir / RECORD), "workdir": str(workdir)})
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"recorded {step}")


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
