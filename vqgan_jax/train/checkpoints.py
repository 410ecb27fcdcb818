"""Checkpoints that are whole or not there: Orbax writes them, a manifest of SHA-256 a file vouches for them.

Orbax restores a file with a flipped byte without a word, and casts dtypes without one. So nothing is restored here that
its manifest does not verify, and trees are compared before they are read. In a bucket Orbax writes where the
checkpoint stays, and the manifest, written last, is what makes it one.
"""

import contextlib
import dataclasses
import errno
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vqgan_jax import storage
from vqgan_jax.config import UserError, choose, suggest
from vqgan_jax.train import manifests

State = TypeVar("State")
Record = dict[str, Any]

_NOTHING, _ALL_DAMAGED = -1, -2
SEAL_SECONDS = 300  # that hosts wait at the end for host 0 to seal the last checkpoint
_logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, one folder a step, saved in the background and verified when restored.

    Every process of a run makes one and calls each method at the same step; process 0 alone hashes, and its choice of
    a step to restore is broadcast, so that hosts never part. A context manager, closed when left. It removes what an
    unfinished save left behind, so a run has one at a time; others read with `load`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int,
        keep_best: int,
        best_metric: str = "",
        best_mode: Literal["min", "max"] = "min",
        read_only: bool = False,
    ):
        """Opens `directory`, making it where it is missing.

        Args:
          directory: where the step folders lie.
          keep_last: newest checkpoints kept, and never fewer than 2: while the newest has no manifest yet, the one
            before it is all there is.
          keep_best: best checkpoints by `best_metric` kept besides.
          best_metric: the name of a metric handed to `save`; "" where keep_best is 0.
          best_mode: whether the lowest or the highest value is best.
          read_only: restore beside a run that may be going on: remove, move and save nothing.

        Raises:
          UserError: the directory cannot be written, or the policy contradicts itself.
        """
        choose("config.checkpoint.best_mode", best_mode, {"min": 1, "max": -1})
        if keep_last < 1:
            raise UserError(f"config.checkpoint.keep_last: {keep_last} would keep nothing, write 1 or more")
        if keep_best and not best_metric:
            raise UserError("config.checkpoint.keep_best: name the metric in config.checkpoint.best_metric, or write 0")
        self.directory = storage.absolute(directory)
        if not storage.is_remote(directory):  # in a bucket a proof that comes and goes would confuse other hosts' lists
            storage.make_folder(self.directory, f"--workdir={directory}")
        self._ranking = {"best_metric": best_metric, "best_mode": best_mode}
        self._keep = _Keep(keep_last, keep_best, manifests.read_all(self.directory))
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep, cleanup_tmp_directories=not read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "record"))
        self._place = self._inode()
        self._hasher = ThreadPoolExecutor(1, "manifest")
        self._uncommitted: tuple[int, dict[str, Any]] | None = None
        self._sealing: tuple[int, Future[None]] | None = None
        self._unsealed: int | None = None  # a step that Orbax has committed, and whose manifest was not written
        self._finished = 0

    def save(
        self, step: int, state: Any, record: Record, metrics: Mapping[str, float] | None, *, owed: bool = False
    ) -> None:
        """Starts to save and returns once `state` is copied: it may be donated at once.

        Blocks only while the save before is unfinished.

        Args:
          step: completed steps.
          state: a tree of arrays (typed keys included).
          record: plain JSON data that goes with them: format_version, config, step, seed.
          metrics: evaluation scalars of this very step, by which the best is chosen; None where there was none.
          owed: whether an evaluation of this step is due but not done; `settle` says once it is.

        Raises:
          UserError: best_metric is not among `metrics`, or this or the save before can never be written.
          StorageError: this or the save before was not written; it can be saved anew, or another step.
        """
        self.wait()
        manifest = {"step": step, "metrics": self._ranked(metrics), **self._ranking, "owed": owed}
        self._keep.manifests[step] = manifest
        self._keep.failed.discard(step)
        if step == self._unsealed:
            self._seal_committed(step, manifest)
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        with self._reported(step, storage.is_storage_error):
            if self._gone():  # Orbax would make it anew, without the logs and checkpoints that were there
                raise FileNotFoundError(errno.ENOENT, "this run's folder is gone", str(self.directory))
            self._manager.save(step, args=items, force=True)
        self._uncommitted = (step, manifest)

    def poll(self) -> None:
        """Carries a running save on without blocking: once Orbax has committed, the manifest is begun. Call it often.

        Raises:
          UserError: the save failed for good, for example on a full disk; the checkpoint before it is untouched.
          StorageError: it failed for now.
        """
        if self._uncommitted is not None and not self._manager.is_saving_in_progress():
            self._seal()
        if self._sealing is not None and self._sealing[1].done():
            self._sealed()

    def wait(self) -> None:
        """Blocks until the last save is committed and its manifest written. Raises as `poll` does."""
        if self._uncommitted is not None:
            self._seal()
        if self._sealing is not None:
            self._sealed()

    def finish(self) -> None:
        """`wait` before a job ends: host 0 alone seals, and no other leaves before it has, for SEAL_SECONDS at most."""
        self.wait()
        if jax.process_count() > 1:
            self._finished += 1
            name = f"sealed {self.directory} {self._finished}"
            everybody = set(range(jax.process_count()))
            ocp.multihost.sync_global_processes(name, timeout=SEAL_SECONDS, processes=everybody)

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._uncommitted is not None or self._sealing is not None

    def owes(self, step: int) -> bool:
        """Whether the checkpoint of `step` was saved with its evaluation still owed."""
        return self._keep.manifests.get(step, {}).get("owed", False)

    def settle(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Notes that the evaluation owed at `step`, which was restored, is done and logged; `metrics` as in `save`."""
        manifest = {**self._keep.manifests[step], "metrics": self._ranked(metrics), "owed": False}
        self._keep.manifests[step] = manifest
        if jax.process_index() == 0:
            manifests.sign(self.directory / str(step), manifest)

    def restore(self, abstract_state: State | Callable[[Mapping[str, Any]], State]) -> tuple[State, Record] | None:
        """Restores the newest checkpoint whose manifest verifies, None where there is none to restore.

        Damaged ones are named in the log and moved aside to `<step>.damaged`, so that their step can be saved again.

        Args:
          abstract_state: a tree of ShapeDtypeStruct with the shardings to restore onto (any mesh), or what makes it
            of the saved tree, whose leaves have a shape and a dtype.

        Returns:
          (state, record).

        Raises:
          UserError: checkpoints are there and all are damaged (a save cut short is none), or the tree, a shape or a
            dtype differs from `abstract_state`; the leaves are named.
        """
        self.wait()
        step = self._newest_whole()
        self._manager.reload()
        self._keep.manifests = manifests.read_all(self.directory)
        if step is None:
            return None
        saved = ocp.PyTreeCheckpointHandler().metadata(self.directory / str(step) / "state").tree
        if callable(abstract_state):
            abstract_state = abstract_state(saved)
        _check_tree(self.directory / str(step), saved, abstract_state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), record=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.record

    def latest_step(self) -> int | None:
        """The newest step with a manifest."""
        return max(manifests.read_all(self.directory), default=None)

    def best_step(self) -> int | None:
        """The step with the best metric, None where no checkpoint holds one."""
        return next(iter(manifests.best_first(manifests.read_all(self.directory))), None)

    def close(self) -> None:
        """Finishes a running save and frees the threads."""
        try:
            self.wait()
        finally:
            self._hasher.shutdown()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        storage.in_the_end(self.close, error)

    def _ranked(self, metrics: Mapping[str, float] | None) -> dict[str, float]:
        """Those of `metrics` by which checkpoints can be compared. Raises UserError without the one that decides."""
        best_metric = self._ranking["best_metric"]
        if metrics is not None and best_metric and best_metric not in metrics:
            raise UserError(f"config.checkpoint.best_metric: no metric '{best_metric}'{suggest(best_metric, metrics)}")
        return {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}

    @contextlib.contextmanager
    def _reported(self, step: int, of_storage: Callable[[Exception], bool] = lambda _: True) -> Iterator[None]:
        """Turns a failed save into one line for the user; Orbax would also log a traceback of its own."""
        absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
        absl.setLevel(logging.CRITICAL)
        try:
            yield
        except Exception as error:
            if not of_storage(error):
                raise
            self._keep.manifests.pop(step, None)
            self._keep.failed.add(step)
            latest = max(self._keep.manifests, default=None)
            last = "there is none before it" if latest is None else f"the newest whole one is of step {latest}"
            message = (
                f"{self.directory}: checkpoint of step {step} was not saved ({manifests.first_line(error)}); {last}"
            )
            kind = storage.StorageError if storage.may_pass(error) and not self._gone() else UserError
            raise kind(message) from error
        finally:
            absl.setLevel(level)

    def _inode(self) -> int | None:
        """What tells the folder from another in its place; None in a bucket, or where there is none."""
        try:
            return None if storage.is_remote(self.directory) else os.stat(self.directory).st_ino
        except FileNotFoundError:
            return None

    def _gone(self) -> bool:
        """Whether the folder was moved or deleted: a save that was under way may have made another in its place."""
        return self._inode() != self._place

    def _seal(self) -> None:
        (step, manifest), self._uncommitted = self._uncommitted, None
        with self._reported(step):  # what fails in the background is the storage, in many types
            self._manager.wait_until_finished()
        if jax.process_index() == 0:
            self._seal_committed(step, manifest)

    def _seal_committed(self, step: int, manifest: dict[str, Any]) -> None:
        self._unsealed = step
        self._sealing = (step, self._hasher.submit(manifests.write, self.directory / str(step), manifest))

    def _sealed(self) -> None:
        (step, job), self._sealing = self._sealing, None
        with self._reported(step):
            job.result()
        self._unsealed = None

    def _newest_whole(self) -> int | None:
        found, faults = _NOTHING, {}
        if jax.process_index() == 0:
            steps = manifests.steps_in(self.directory)[::-1]
            for step in steps:
                if not (fault := manifests.fault(self.directory / str(step))):
                    found = step
                    break
                faults[step] = fault
            if found == _NOTHING and any(fault != manifests.UNSEALED for fault in faults.values()):
                found = _ALL_DAMAGED
            elif not self._read_only:
                for step, fault in faults.items():
                    manifests.move_aside(self.directory / str(step), fault)
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == _ALL_DAMAGED:
            names = "; ".join(f"{step}: {fault}" for step, fault in faults.items())
            raise UserError(f"{self.directory}: every checkpoint is damaged ({names}); move them away to start afresh")
        return None if found == _NOTHING else found


def load(
    directory: str | os.PathLike, *, step: int | None = None, best: bool = False, only: Sequence[str] = ()
) -> tuple[dict[str, Any], Record]:
    """Reads a verified checkpoint without knowing the state's type: for inference.

    Args:
      directory: the folder that was given to `Checkpoints`.
      step: this very checkpoint; None for the newest whole one.
      best: the best by the run's metric, where any was evaluated, instead of the newest.
      only: top-level entries of the state to read, such as ("ema", "codebook"); () for all.

    Returns:
      (nested dict of numpy arrays, record). Typed keys come as their uint32 data.

    Raises:
      UserError: no such checkpoint, all candidates are damaged, or an entry of `only` is unknown.
    """
    directory = storage.absolute(directory)
    steps = manifests.steps_in(directory)
    if step is not None and step not in steps:
        raise UserError(f"{directory}: no checkpoint of step {step}{suggest(str(step), map(str, steps))}")
    ranked = manifests.best_first(manifests.read_all(directory)) if best else []  # none: no checkpoint was evaluated
    candidates = [step] if step is not None else ranked or steps[::-1]
    if not candidates:
        raise UserError(f"{directory}: no checkpoint there")
    faults = []
    for candidate in candidates:
        folder = directory / str(candidate)
        if not (fault := manifests.fault(folder)):
            break
        _logger.warning("%s is damaged (%s): passed over", folder, fault)
        faults.append(f"{candidate}: {fault}")
    else:
        raise UserError(f"{directory}: every checkpoint asked for is damaged ({'; '.join(faults)})")
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    for name in only:
        if name not in tree:
            raise UserError(f"{folder}: the state has no entry '{name}'{suggest(name, tree)}")
    item = {name: tree[name] for name in only or tree}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        arrays = reader.restore(folder / "state", args=args)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return arrays, reader.restore(folder / "record")


@dataclasses.dataclass
class _Keep:
    """Which steps stay: Orbax's preservation policy, asked at each save, when the new step has no manifest yet."""

    last: int
    best: int
    manifests: dict[int, dict[str, Any]]
    failed: set[int] = dataclasses.field(default_factory=set)  # steps whose save failed: nothing to fall back on

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints if info.step not in self.failed)
        newest = steps[-max(self.last, 2) :]
        known = {step: self.manifests[step] for step in steps if step in self.manifests}
        best = manifests.best_first(known)[: self.best]
        return [info.step in newest or info.step in best for info in checkpoints]


def _check_tree(folder: epath.Path, saved: Any, abstract_state: Any) -> None:
    """Raises UserError that names the leaves where the saved tree and the wanted one differ in name, shape or dtype."""

    def describe(tree: Any) -> dict[str, str]:
        named = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # Orbax stores a typed key as its data
                leaf = jax.eval_shape(jax.random.key_data, leaf)
            named[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        return named

    there, here = describe(saved), describe(abstract_state)
    found = [
        f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    ]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"{folder}: does not fit this config: {'; '.join(found[:5])}{more}")
