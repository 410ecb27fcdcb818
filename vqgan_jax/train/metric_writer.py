"""Where a run's numbers and pictures go: metrics.jsonl, TensorBoard event files, and CLU or W&B where they import.

The methods carry the names of clu.metric_writers.MetricWriter, whose own writers need TensorFlow. A run that resumes at
step N cuts its logs back to N, so that they read like those of a run that was never stopped.
"""

import contextlib
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from vqgan_jax import storage

JSON_LINES, TENSORBOARD, CLU = "metrics.jsonl", "tensorboard", "clu"
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)")
_PART_BYTES = 1 << 24
_FLUSH_SECONDS = 60.0
_logger = logging.getLogger(__name__)


class MetricWriter:
    """Hands everything on to its sinks, which have these very methods. A context manager, closed when left."""

    def __init__(self, sinks: Sequence[Any]):
        self._sinks = tuple(sinks)
        self._flushed = time.monotonic()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers after `step` completed steps; they may be NaN or infinite."""
        scalars = {name: float(value) for name, value in scalars.items()}
        self._each("write_scalars", step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures uint8 [n, h, w, c] with 1 or 3 channels. Raises ValueError for anything else."""
        for name, pictures in images.items():
            if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
                raise ValueError(f"{name}: takes uint8 [n, h, w, 1 or 3], got {pictures.dtype} {pictures.shape}")
        self._each("write_images", step, images)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts, shown as Markdown by TensorBoard."""
        self._each("write_texts", step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Hyper-parameters, flat names; once a run."""
        self._each("write_hparams", hparams)

    def write_histograms(
        self, step: int, arrays: Mapping[str, np.ndarray], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Histograms of arrays of any shape, with 30 buckets unless `num_buckets` names another number."""
        buckets = {name: (num_buckets or {}).get(name, 30) for name in arrays}
        self._each("write_histograms", step, arrays, buckets)

    def flush(self) -> None:
        """Puts everything written so far on disk, or in the bucket; done unasked about once a minute."""
        self._flushed = time.monotonic()
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks[::-1]:
                stack.callback(sink.close)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        storage.in_the_end(self.close, error)

    def _each(self, method: str, *args: Any) -> None:
        for sink in self._sinks:
            getattr(sink, method)(*args)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()


def open_writer(
    workdir: str | os.PathLike, *, resume_step: int, owed: bool = False, hand_to_clu: bool = False, wandb: str = ""
) -> MetricWriter:
    """Opens the logs of a run and cuts them back to `resume_step`; on processes other than 0 a writer of nothing.

    Args:
      workdir: holds metrics.jsonl and tensorboard/ (and clu/).
      resume_step: completed steps of the restored checkpoint; what was logged after it is removed. 0 removes it all.
      owed: whether the evaluation of that step is to be done yet: what a start left of it that was killed before its
        checkpoint could note that it is done (metrics val/..., pictures) is removed too.
      hand_to_clu: also write through clu's default writer, where TensorFlow imports.
      wandb: also write to this project of Weights & Biases, "project" or "entity/project", where wandb imports.
    """
    if jax.process_index() != 0:
        return MetricWriter(())
    workdir = storage.path(workdir)
    lines = _JsonLines(workdir / JSON_LINES, resume_step, owed)
    sinks = [lines, _TensorBoard(workdir / TENSORBOARD, resume_step, lines.standing if owed else None)]
    if hand_to_clu:
        try:
            from clu import metric_writers
        except ImportError as error:
            _logger.warning("clu.metric_writers does not import (%s): written to the other logs alone", error)
        else:
            sinks.append(metric_writers.create_default_writer(str(workdir / CLU), asynchronous=False))
    if wandb:
        try:
            sinks.append(_WandB(workdir, wandb, resume_step))
        except ImportError as error:
            _logger.warning("wandb does not import (%s): written to the other logs alone", error)
        except Exception as error:  # its own kinds, of the network and of accounts
            _logger.warning("wandb does not start (%s): written to the other logs alone", error)
    return MetricWriter(sinks)


class _Silent:
    """A sink that takes nothing: each sink overrides what it does take."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray], buckets: Mapping[str, int]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _JsonLines(_Silent):
    """One JSON object a line: {"step", "time" (seconds since 1970), names...}; "nan", "inf", "-inf" are strings."""

    def __init__(self, path: epath.Path, resume_step: int, owed: bool):
        self._mirror = storage.Mirror(path)
        self.standing = {}  # numbers of the step resumed at
        log = self._mirror.local
        if log.exists():
            kept = [line for line in log.read_bytes().splitlines() if _stays(line, resume_step, owed)]
            storage.write_bytes(log, b"".join(line + b"\n" for line in kept))
            for line in map(json.loads, kept):
                if line["step"] == resume_step:
                    self.standing |= {name: float(value) for name, value in line.items() if _is_number(value)}
        self._file = log.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write(step, {name: value if math.isfinite(value) else str(value) for name, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write(step, texts)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._mirror.push()

    def close(self) -> None:
        self._file.close()
        self._mirror.close()

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}, allow_nan=False) + "\n")
        self._file.flush()  # a killed process then loses no finished line


def _stays(line: bytes, resume_step: int, owed: bool) -> bool:
    """Whether a line is whole (a killed process may tear its last one) and of a step, or evaluation, that stands."""
    try:
        step = (values := json.loads(line))["step"]
        if owed and step == resume_step and any(name.startswith("val/") for name in values):
            return False
        return resume_step > 0 and step <= resume_step
    except (ValueError, KeyError, TypeError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")


class _TensorBoard(_Silent):
    """Event files, one a start of the run, numbered so that TensorBoard reads them in order on any clock.

    A bucket takes whole files only, so that a long file would be uploaded again and again: there a further one is begun
    once a file is large. A start is marked in the file: every reader of TensorBoard then drops what older files hold
    from that step on. Where the evaluation of the step resumed at is owed, that is this very step, and its other
    numbers, `standing`, are written anew.
    """

    def __init__(self, folder: epath.Path, resume_step: int, standing: Mapping[str, float] | None):
        taken = [int(match[1]) for path in storage.files(folder) if (match := _EVENT_FILE.fullmatch(path.name))]
        self._folder, self._number = folder, max(taken, default=0)
        self._resumed = resume_step > 0
        self._next_file()
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = resume_step + (standing is None) if self._resumed else 0
        self._write(event_pb2.Event(step=first, session_log=start))
        self.write_scalars(resume_step, {k: v for k, v in (standing or {}).items() if k not in ("step", "time")})

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._summary(step, summary.scalar(name, value))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, pictures in images.items():
            for k, picture in enumerate(pictures):
                tag = name if len(pictures) == 1 else f"{name}/{k}"
                self._summary(step, summary.image(tag, picture, dataformats="HWC"))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._summary(step, summary.text(name, text))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        if not self._resumed:  # they stand at step 0, which a later start keeps
            known = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
            for part in summary.hparams(known, {}):
                self._summary(0, part)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray], buckets: Mapping[str, int]) -> None:
        for name, array in arrays.items():
            self._summary(step, summary.histogram(name, np.asarray(array), bins=buckets[name]))

    def flush(self) -> None:
        self._records.flush()
        self._mirror.push()
        if self._mirror.remote and self._mirror.local.stat().st_size > _PART_BYTES:
            self._close_file()
            self._next_file()

    def close(self) -> None:
        self._close_file()

    def _next_file(self) -> None:
        self._number += 1
        self._mirror = storage.Mirror(self._folder / f"events.out.tfevents.{self._number:06d}")
        self._records = RecordWriter(str(self._mirror.local))
        self._write(event_pb2.Event(file_version="brain.Event:2"))

    def _close_file(self) -> None:
        self._records.flush()
        self._records.close()
        self._mirror.close()

    def _summary(self, step: int, value: Any) -> None:
        self._write(event_pb2.Event(step=step, summary=value))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class _WandB(_Silent):
    """One run of Weights & Biases a workdir, which every start goes on with but one from step 0. It is a copy of the
    other logs: where it fails it says so once, and the training goes on.

    W&B's own counter of rows only grows, so the step is a value, one for each of the loop's ways to log: a start that
    goes back to a checkpoint leaves out what stands there already, and makes up for an evaluation that is owed.
    """

    def __init__(self, workdir: epath.Path, project: str, resume_step: int):
        import wandb

        named = workdir / "run" / "wandb.txt"
        if not (resume_step and named.exists()):
            storage.write_bytes(named, secrets.token_hex(8).encode())
        entity, _, name = project.rpartition("/")
        config = workdir / "config.json"
        self._image, self._failed = wandb.Image, False
        self._run = wandb.init(
            entity=entity or None,
            project=name,
            id=named.read_text(),
            name=workdir.name,
            resume="allow",
            config=json.loads(config.read_text()) if config.exists() else {},
        )
        self._try(lambda: self._run.define_metric("*", step_metric="step"))
        self._try(lambda: self._run.define_metric("val/*", step_metric="val/step"))
        counters = ("step", "val/step", "images/step")
        self._logged = {name: self._run.summary.get(name, -1) if self._run.resumed else -1 for name in counters}

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._log("val/step" if any(name.startswith("val/") for name in scalars) else "step", step, lambda: scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._log("images/step", step, lambda: {name: [*map(self._image, some)] for name, some in images.items()})

    def close(self) -> None:
        self._try(self._run.finish)

    def _log(self, counter: str, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        if step > self._logged[counter]:
            self._try(lambda: self._run.log({**values(), counter: step}))

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            if not self._failed:
                _logger.warning("wandb fails (%s): the other logs have everything", error)
            self._failed = True
