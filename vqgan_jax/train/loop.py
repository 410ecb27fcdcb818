"""The training loop of both stages: order of events, logging, pictures, preemption, and the budget of non-finite steps.

It knows steps, metrics and batches, and nothing of models. The device is never made to wait: step n is dispatched, then
the metrics of n - 1 are read, and checkpoints are written in the background.
"""

import contextlib
import dataclasses
import datetime
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from etils import epath
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.exit_codes import PREEMPTED
from vqgan_jax.images import save_png
from vqgan_jax.parallel import local_rows, say
from vqgan_jax.stopping import BrokenOff, StopRequest, check
from vqgan_jax.train.checkpoints import Checkpoints
from vqgan_jax.train.metric_writer import MetricWriter
from vqgan_jax.train.speed import of_steps, utilisation
from vqgan_jax.watchdog import Watchdog

State = TypeVar("State")
Batch = Mapping[str, jax.Array]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many steps in all, and every how many something is done; 0 is never. The last step counts as due."""

    total: int
    log: int
    evaluate: int
    save: int
    images: int
    score: int = 0

    def due(self, every: int, step: int) -> bool:
        """Whether what is done every `every` steps is done after `step` completed steps."""
        return every > 0 and (step % every == 0 or step == self.total)


class Batches(Protocol):
    """An endless iterator of batches on the device, with the seconds that its last `next` waited for data."""

    wait_seconds: float

    def __next__(self) -> Batch: ...

    def close(self) -> None: ...


def train(
    state: State,
    *,
    step_fn: Callable[[State, Batch], tuple[State, Mapping[str, jax.Array]]],
    batches: Batches,
    schedule: Schedule,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    record: Mapping[str, Any],
    start_step: int,
    start_examples: int,
    workdir: str | os.PathLike,
    nonfinite_budget: int,
    examples_per_step: int,
    evaluate: Callable[[State, int], Mapping[str, float]] | None = None,
    score: Callable[[State, int], Mapping[str, float]] | None = None,
    draw: Callable[[State, int], Mapping[str, np.ndarray]] | None = None,
    units: Mapping[str, float] = MappingProxyType({}),
    flops: Callable[[Batch], float] | None = None,
    headline: Sequence[str] = (),
    profile: tuple[int, int] | None = None,
    watchdog: Watchdog | None = None,
) -> State:
    """Trains from `start_step` to `schedule.total` and returns the last state.

    After s completed steps: evaluate, draw and save where due, in this order, then take a batch, then step. None of
    them is done again at the step a run starts from, but what a job left out there because it had to go: a request to
    stop breaks evaluations off, and all that was due at that step is done and logged at the next start. A save that
    the storage does not take is repeated, later and later. The batches are closed at the end, however it comes.

    Args:
      state: a struct of arrays; its `skipped` (int32 scalar), where it has one, counts non-finite steps so far.
      step_fn: jitted, with the state donated; its metrics are scalars. A metric `skipped` of 1 says that the step was
        not finite and the old state kept.
      batches: yields the batch of step `start_step` first.
      schedule: when what is done.
      checkpoints: where to save; open.
      writer: where metrics and pictures go; cut back to `start_step`.
      record: JSON data saved with each checkpoint, to which `step` and `examples`, those seen by then, are added.
      start_step: completed steps of `state`.
      start_examples: examples that these steps have seen.
      workdir: pictures go to images/NAME_STEP.png, refused batches to nonfinite/, traces to profile/.
      nonfinite_budget: how many steps may be skipped in the whole run.
      examples_per_step: of all hosts together.
      evaluate: (state, step) -> scalars, logged as val/NAME; those at a save's step choose the best checkpoint.
      score: the same on a schedule of its own, for what takes longer.
      draw: (state, step) -> pictures by name, uint8 [h, w, c].
      units: further rates, such as {"tokens/s": 2048}, by their amount a step.
      flops: floating-point operations of a step with such a batch; logged as `mfu`, the share of the chips' peak.
      headline: metrics to show beside the progress; without them up to three whose names hold "loss".
      watchdog: of this host; entered here, and told of every step.
      profile: (first, last): trace the steps between these two counts of completed steps with the JAX profiler.

    Raises:
      UserError: more steps were not finite than the budget allows, or a checkpoint can never be saved.
      StorageError: a checkpoint could not be saved for long; on several hosts at once.
      SystemExit: with code PREEMPTED after SIGTERM or one SIGINT, once the state is saved.
    """
    owed = checkpoints.owes(start_step)
    if start_step >= schedule.total and not owed:
        batches.close()
        say(f"already finished: {start_step} of {schedule.total} steps are done")
        return state
    workdir = storage.path(workdir)
    rates = {"images/s": examples_per_step, **units}
    skipped = int(jax.device_get(getattr(state, "skipped", 0)))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        beat = stack.enter_context(watchdog).beat if watchdog else lambda *_, **__: None
        for work in (writer.flush, checkpoints.wait, batches.close):
            stack.push(lambda kind, error, _, work=work: storage.in_the_end(work, error))
        trace = stack.enter_context(contextlib.ExitStack())
        progress = stack.enter_context(_Progress(schedule.total, start_step, headline))
        report = _Report(writer, progress, schedule, rates, workdir, nonfinite_budget, skipped)
        looks = _Looks(schedule, writer, workdir, evaluate, score, draw)
        saves = _Saves(checkpoints, progress.say)
        step = start_step
        while True:
            stopping = stop.requested()
            fresh, last = step > start_step, step == schedule.total
            looking = looks.due(step) and (fresh or owed)
            due = fresh and schedule.save > 0 and (schedule.due(schedule.save, step) or saves.due)
            if looking or due or stopping or last:
                report.settle()  # a checkpoint of step s promises that the logs hold step s
                beat(step, "evaluating, drawing or saving", timed=False)
            scalars = None
            if looking and not stopping:  # a job that must go has seconds left
                with contextlib.suppress(BrokenOff), stop.breaking():
                    scalars = looks.take(state, step)
                if scalars:
                    progress.say(f"step {step}: {_line(scalars)}")
                stopping = stop.requested()
            owed = looking and scalars is None
            ranked = scalars if looks.ranks(step) else None
            save = None
            if due or (stopping and fresh and schedule.save > 0):
                writer.flush()
                examples = start_examples + (step - start_step) * examples_per_step
                told = {**record, "step": step, "examples": examples}
                save = functools.partial(checkpoints.save, step, state, told, ranked, owed=owed)
                saves.begin(save)
                stopping = stopping or stop.requested()
            elif looking and not fresh and not owed:
                writer.flush()
                checkpoints.settle(step, ranked)
            if looking or save:
                report.restart_clock()
            if last or stopping:
                saves.finish(save)
            if last and not owed:
                break
            if stopping:
                progress.say(f"preempted at step {step}: {'saved' if save else 'nothing to save'}")
                raise SystemExit(PREEMPTED)
            if profile is not None and step == profile[0]:
                folder = trace.enter_context(storage.staged_folder(workdir / "profile"))
                trace.enter_context(jax.profiler.trace(str(folder)))
            if profile is not None and step == profile[1]:
                report.settle()
                trace.close()
            beat(step, "waiting for data")
            batch = next(batches)
            beat(step, "in a step", timed=step > start_step)  # the first one compiles, for as long as it takes
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, batch)
            step += 1
            if flops is not None and step == start_step + 1:
                report.rates |= utilisation(functools.partial(flops, batch))
            report.push(step, metrics, batch, batches.wait_seconds)
            saves.poll()
    return state


class _Looks:
    """What looks at a state between two steps: the evaluation, the score and the pictures. A request to stop breaks
    them off; they are logged together or not at all."""

    def __init__(
        self,
        schedule: Schedule,
        writer: MetricWriter,
        workdir: epath.Path,
        evaluate: Callable[[State, int], Mapping[str, float]] | None,
        score: Callable[[State, int], Mapping[str, float]] | None,
        draw: Callable[[State, int], Mapping[str, np.ndarray]] | None,
    ):
        self._schedule, self._writer, self._workdir = schedule, writer, workdir
        self._evaluate, self._score, self._draw = evaluate, score, draw

    def due(self, step: int) -> bool:
        """Whether any is due."""
        due, every = self._schedule.due, self._schedule
        looks = ((self._evaluate, every.evaluate), (self._score, every.score), (self._draw, every.images))
        return any(look is not None and due(often, step) for look, often in looks)

    def ranks(self, step: int) -> bool:
        """Whether an evaluation is due, by which the checkpoint of this step is ranked."""
        return self._evaluate is not None and self._schedule.due(self._schedule.evaluate, step)

    def take(self, state: State, step: int) -> dict[str, float]:
        """Runs and logs what is due; returns its numbers. Raises BrokenOff, with nothing logged."""
        schedule, found, pictures = self._schedule, {}, {}
        if self.ranks(step):
            found |= self._evaluate(state, step)
        check()
        if self._score is not None and schedule.due(schedule.score, step):
            found |= self._score(state, step)
        check()
        if self._draw is not None and schedule.due(schedule.images, step):
            pictures = self._draw(state, step)
        scalars = {f"val/{name.removeprefix('val/')}": float(value) for name, value in found.items()}
        if scalars:
            self._writer.write_scalars(step, scalars)
        self._writer.write_images(step, {name: picture[None] for name, picture in pictures.items()})
        if jax.process_index() == 0:
            for name, picture in pictures.items():
                save_png(self._workdir / "images" / f"{name.replace('/', '_')}_{step:08d}.png", picture)
        return scalars


class _Saves:
    """Saves, and saves anew, from the state of the step it has come to by then, what the storage did not take."""

    def __init__(self, checkpoints: Checkpoints, say: Callable[[str], None]):
        self._checkpoints, self._say = checkpoints, say
        self._waits, self._again = list(storage.BACKOFF), math.inf

    @property
    def due(self) -> bool:
        """Whether it is time to save anew."""
        return time.monotonic() >= self._again

    def begin(self, save: Callable[[], None]) -> None:
        """Calls `save`. Raises StorageError where that has failed too often, or there are other hosts: they will lose
        this one, and all start again."""
        self._again = math.inf
        self._try(save)

    def poll(self) -> None:
        """Carries a running save on. Raises as `begin` does."""
        self._try(self._checkpoints.poll)
        if self._again == math.inf and not self._checkpoints.saving:
            self._waits = list(storage.BACKOFF)

    def finish(self, save: Callable[[], None] | None) -> None:
        """Blocks until the last save, which was begun by `save`, has ended well. Raises as `begin` does."""
        self._try(self._checkpoints.finish)
        while save and self._again < math.inf:
            time.sleep(max(0.0, self._again - time.monotonic()))
            self.begin(save)
            self._try(self._checkpoints.finish)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except storage.StorageError as error:
            if jax.process_count() > 1 or not self._waits:
                raise
            self._again = time.monotonic() + self._waits[0]
            self._say(f"{error}; tried again in {self._waits.pop(0):g} s")


class _Report:
    """Reads each step's metrics one step late, times the steps, logs, and counts the steps that were not finite."""

    def __init__(
        self,
        writer: MetricWriter,
        progress: "_Progress",
        schedule: Schedule,
        rates: dict[str, float],
        workdir: epath.Path,
        budget: int,
        skipped: int,
    ):
        self._writer, self._progress, self._schedule, self.rates = writer, progress, schedule, rates
        self._workdir, self._budget, self._skipped = workdir, budget, skipped
        self._pending: tuple[int, Mapping[str, jax.Array], Batch, float] | None = None
        self._read_at: float | None = None  # None until the first step, which compiles, is over
        self._seconds: list[float] = []
        self._waits: list[float] = []

    def push(self, step: int, metrics: Mapping[str, jax.Array], batch: Batch, waited: float) -> None:
        """Takes the metrics of the step just dispatched and reads those of the one before."""
        self.settle()
        self._pending = (step, metrics, batch, waited)

    def settle(self) -> None:
        """Reads the metrics not read yet, waiting for their step to end."""
        if self._pending is None:
            return
        (step, metrics, batch, waited), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        now = time.perf_counter()
        if self._read_at is not None:
            self._seconds.append(now - self._read_at)
            self._waits.append(waited)
        self._read_at = now
        if "skipped" in values:
            self._count_skipped(step, values, batch)
        logging_now = self._schedule.due(self._schedule.log, step)
        if logging_now:
            values |= of_steps(self.rates, self._seconds, self._waits)
            self._seconds, self._waits = [], []
            self._writer.write_scalars(step, values)
        self._progress.advance(step, values, line=logging_now)

    def restart_clock(self) -> None:
        """Leaves out of the step times what was done since the last one ended."""
        if self._read_at is not None:
            self._read_at = time.perf_counter()

    def _count_skipped(self, step: int, values: dict[str, float], batch: Batch) -> None:
        """Turns the flag `skipped` into the run's count and dumps the batch; raises UserError when over the budget."""
        bad = values["skipped"] > 0
        self._skipped += bad
        values["skipped"] = float(self._skipped)
        if not bad:
            return
        terms = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        suffix = "" if jax.process_count() == 1 else f"_host{jax.process_index()}"
        path = self._workdir / "nonfinite" / f"step_{step:08d}{suffix}.npz"
        storage.save_npz(path, **{name: local_rows(array) for name, array in batch.items()})
        if self._skipped <= self._budget:
            of_budget = f"{self._skipped} of {self._budget} allowed"
            self._progress.say(f"step {step} was not finite ({terms}): the old state was kept ({of_budget}); {path}")
            return
        raise UserError(
            f"step {step} was not finite ({terms}), and config.nonfinite_budget allows {self._budget} such steps: "
            f"its batch is in {path}"
        )


class _Progress:
    """A bar on a terminal; elsewhere one line a logging interval. Process 0 alone shows it."""

    def __init__(self, total: int, start_step: int, headline: Sequence[str]):
        self._total, self._headline = total, tuple(headline)
        self._bar = None
        if jax.process_index() == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start_step, unit="step", dynamic_ncols=True)
        self._redirect = logging_redirect_tqdm() if self._bar is not None else contextlib.nullcontext()
        self._speed = ""

    def __enter__(self) -> "_Progress":
        self._redirect.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._redirect.__exit__(*error)
        if self._bar is not None:
            self._bar.close()

    def advance(self, step: int, values: Mapping[str, float], *, line: bool) -> None:
        """Shows the metrics of `step`; `line`: whether this is a step that is logged."""
        names = self._headline or [name for name in values if "loss" in name][:3] or list(values)[:3]
        shown = {name: values[name] for name in names if name in values}
        if "images/s" in values:
            self._speed = f"{values['images/s']:.4g} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, [_line(shown), self._speed])), refresh=False)
            self._bar.update(step - self._bar.n)
        elif line:
            left = (self._total - step) * values.get("step_seconds", math.nan)
            eta = "" if math.isnan(left) else f"{datetime.timedelta(seconds=round(left))} left"
            say(", ".join(filter(None, [f"step {step}/{self._total}: {_line(shown)}", self._speed, eta])))

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            say(text)


def _line(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in values.items())
