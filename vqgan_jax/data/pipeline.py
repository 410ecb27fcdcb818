"""Batches from a source, on Grain: row -> example is a pure function of (seed, position), the examples drawn before it.

Nothing about a run's order is ever saved but its position: a resumed run goes on there, with any batch size, number of
hosts, threads or worker processes. An unreadable example is replaced by the next readable one, so positions never
shift, and is counted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags, logging
from grain.experimental import index_shuffle

from vqgan_jax.config import UserError
from vqgan_jax.data.source import CorruptExample, Example, Source

Batch = dict[str, np.ndarray]
Transform = Callable[[Example, np.random.Generator], dict[str, np.ndarray]]

_SHUFFLE, _AUGMENT = 1, 2  # keep the two uses of one seed apart
_CHUNK = 16  # rows a unit of work: small enough to share a batch among threads, large enough to hide Grain's cost
_SMALL = 1 << 16  # up to here a permutation is kept: Grain's index shuffle walks a domain of this size, slow for a few
_ENOUGH = 100  # examples seen before the share of corrupt ones means anything
_DEATHS = 3  # of worker processes, with no batch between them, before the run is given up
_DIED = "process was terminated unexpectedly"  # how Grain says that one is gone


def example_index(position: int, examples: int, seed: int) -> int:
    """The example at `position` of an endless stream that visits all, shuffled anew, in each epoch."""
    epoch, offset = divmod(position, examples)
    if examples <= _SMALL:
        return int(_permutation(examples, seed, epoch)[offset])
    return index_shuffle(offset, max_index=examples - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(_epoch_seed(seed, epoch)).permutation(examples)


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([_SHUFFLE, seed, epoch]).generate_state(1)[0])


class _Reader:
    """Reads examples, and steps over unreadable ones to the next readable one."""

    def __init__(self, source: Source, transform: Transform, max_corrupt_share: float):
        self.source, self.transform, self.max_corrupt_share = source, transform, max_corrupt_share

    def __call__(self, index: int, seed: tuple[int, ...]) -> tuple[Batch, dict[int, CorruptExample]]:
        """The row of example `index` or of the next readable one, and the unreadable ones on the way by index."""
        corrupt: dict[int, CorruptExample] = {}
        n = len(self.source)
        while True:
            try:
                example = self.source[index]
            except CorruptExample as error:
                corrupt[index] = error
                # Enough of the whole source is known to be unreadable, or all of it: do not read on to the end.
                if len(corrupt) == n or len(corrupt) >= _ENOUGH and len(corrupt) > self.max_corrupt_share * n:
                    raise _too_many_corrupt(len(corrupt), len(corrupt), str(error), self.max_corrupt_share) from None
                index = (index + 1) % n
                continue
            return self.transform(example, np.random.default_rng(seed)), corrupt


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The endless sequence of pieces of batches, for Grain; element k is number `first` + k of the run's pieces.

    `pieces` holds the rows of each piece of a batch; `start` is the position of the first row of the first batch.
    """

    reader: _Reader
    pieces: tuple[np.ndarray, ...]
    global_batch: int
    seed: int
    start: int
    first: int = 0

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, k: int) -> tuple[Batch, list[int], dict[int, tuple[str, str]]]:
        """Rows stacked, the indices that were meant, and path and reason of those that could not be read."""
        step, piece = divmod(self.first + k, len(self.pieces))
        rows, indices, corrupt = [], [], {}
        for row in self.pieces[piece]:
            position = self.start + step * self.global_batch + int(row)
            indices.append(example_index(position, len(self.reader.source), self.seed))
            made, unreadable = self.reader(indices[-1], (_AUGMENT, self.seed, position))
            rows.append(made)
            corrupt.update({index: (error.path, error.reason) for index, error in unreadable.items()})
        return _stack(rows), indices, corrupt


class Pipeline(Iterator[Batch]):
    """Endless training batches of the rows of one host; made by `pipeline`. Close it, or use it as a context manager.

    A worker process that dies (killed for its memory, say) is replaced, and no batch is lost or repeated.

    Attributes:
      replaced: reason by name of the examples that could not be read so far.
    """

    def __init__(self, chunks: _Chunks, threads: int, processes: int, max_corrupt_share: float):
        self.replaced: dict[str, str] = {}
        self._max_corrupt_share = max_corrupt_share
        self._chunks, self._threads, self._processes = chunks, threads, processes
        self._taken = 0  # pieces
        # Of what was drawn, not of what was met in the search for a readable one: damage often comes in a row.
        self._seen = np.zeros(len(chunks.reader.source), bool)
        self._corrupt: set[int] = set()
        self._iterator = self._open()

    def _open(self) -> Any:
        """Grain's iterator from the next piece on."""
        threads, processes, pieces = self._threads, self._processes, len(self._chunks.pieces)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + pieces if threads else 0)
        chunks = dataclasses.replace(self._chunks, first=self._taken)
        dataset = grain.MapDataset.source(chunks).to_iter_dataset(options)
        if processes:
            if not flags.FLAGS.is_parsed():  # Grain asks for a flag of its own, also in a notebook or a test
                flags.FLAGS.mark_as_parsed()
            buffer = 1 + pieces // processes
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(processes, per_worker_buffer_size=buffer))
        return iter(dataset)

    def _next_piece(self) -> tuple[Batch, list[int], dict[int, tuple[str, str]]]:
        """The next piece, of new worker processes where one has died."""
        for deaths in range(1, _DEATHS + 1):
            try:
                piece = next(self._iterator)
            except RuntimeError as error:
                if not self._processes or _DIED not in str(error):
                    raise
                self._iterator.close()
                reason = str(error).partition(".")[0]
                if deaths < _DEATHS:
                    logging.warning("data pipeline: %s; started anew", reason)
                    self._iterator = self._open()
            else:
                self._taken += 1
                return piece
        raise UserError(
            f"config.data.processes={self._processes}: worker processes die again and again ({reason}), often for want "
            "of memory; set fewer, or 0 to read in threads alone"
        )

    def __next__(self) -> Batch:
        """The next batch: each key with a leading axis of the rows of this host.

        Raises:
          UserError: too many corrupt examples, worker processes that die again and again, or what the transform says
            of an example.
        """
        pieces = []
        for _ in self._chunks.pieces:
            piece, indices, corrupt = self._next_piece()
            pieces.append(piece)
            self._seen[indices] = True
            self._corrupt.update(corrupt.keys() & indices)
            for name, reason in corrupt.values():
                if name not in self.replaced:
                    self.replaced[name] = reason
                    logging.warning(
                        "%s cannot be read (%s): the next one stands in; %d so far", name, reason, len(self.replaced)
                    )
        self._check_corrupt()
        return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}

    def _check_corrupt(self) -> None:
        if not self._corrupt:
            return
        count, seen = len(self._corrupt), int(np.count_nonzero(self._seen))
        if seen >= min(_ENOUGH, len(self._seen)) and count > self._max_corrupt_share * seen:
            name, reason = next(iter(self.replaced.items()))
            raise _too_many_corrupt(count, seen, f"{name}: {reason}", self._max_corrupt_share)

    def close(self) -> None:
        """Stops Grain's threads and processes."""
        self._iterator.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def pipeline(
    source: Source,
    *,
    rows: np.ndarray,
    global_batch: int,
    seed: int,
    start: int,
    transform: Transform,
    threads: int,
    processes: int,
    max_corrupt_share: float,
) -> Pipeline:
    """Opens the endless stream of training batches.

    Args:
      source: the examples.
      rows: indices in 0..global_batch - 1 of the rows of the global batch that this host loads, in their order.
      global_batch: rows of a batch over all hosts.
      seed: of order and augmentation, >= 0.
      start: the position of the first batch: how many examples the run has drawn before it, over all hosts. The order
        is that of positions, so a run that goes on with another batch size still sees every example once an epoch.
      transform: from a raw example and a generator to the arrays of one row.
      threads: reading threads (of each process); 0 reads when a batch is asked for.
      processes: worker processes; 0 reads in this one, which is enough while decoding is what takes the time.
      max_corrupt_share: share of unreadable examples, among those seen, above which reading stops.

    Raises:
      UserError: an empty source.
    """
    if not len(source):
        raise UserError("config.data.source: it holds no examples")
    reader = _Reader(source, transform, max_corrupt_share)
    rows = np.asarray(rows)
    pieces = tuple(np.array_split(rows, -(-len(rows) // _CHUNK)))
    chunks = _Chunks(reader, pieces, global_batch, seed, start)
    return Pipeline(chunks, threads, processes, max_corrupt_share)


class _EvaluationBatches:
    """The finite sequence of evaluation batches, for Grain."""

    def __init__(self, reader: _Reader, rows: np.ndarray, global_batch: int, part: range, examples: int, seed: int):
        self.reader, self.rows, self.global_batch = reader, rows, global_batch
        self.part, self.examples, self.seed = part, examples, seed

    def __len__(self) -> int:
        return -(-self.examples // self.global_batch)

    def __getitem__(self, step: int) -> tuple[Batch, dict[str, str]]:
        """The batch, and the reason by name of the examples in it that could not be read."""
        rows, valid, corrupt = [], [], {}
        for row in self.rows:
            position = step * self.global_batch + int(row)
            index = self.part[min(position, self.examples - 1) * len(self.part) // self.examples]
            made, unreadable = self.reader(index, (_AUGMENT, self.seed, index))
            rows.append(made)
            valid.append(position < self.examples and not unreadable)
            if index in unreadable:
                corrupt[unreadable[index].path] = unreadable[index].reason
        return _stack(rows) | {"valid": np.array(valid)}, corrupt


def evaluation(
    source: Source,
    *,
    rows: np.ndarray,
    global_batch: int,
    transform: Transform,
    limit: int | None = None,
    part: range | None = None,
    seed: int = 0,
    threads: int = 2,
) -> "Evaluation":
    """Every example once, in order, the same on every pass and for every number of hosts.

    The last batch is filled up with repeated rows; those, and rows of unreadable examples, have `valid` False.

    Args:
      source: the examples.
      rows: indices of the rows of the global batch that this host loads.
      global_batch: rows of a batch over all hosts.
      transform: from a raw example and a generator, a function of the seed and the example's index, to the arrays of
        one row; for scores "center", without flip.
      limit: at most so many examples, spread evenly over the source; None takes all.
      part: the indices of the examples to take, without holes; None takes all.
      seed: of the transform's generators.
      threads: reading threads.

    Returns:
      a sized iterable of batches, with `valid` bool [b].

    Raises:
      UserError: an empty source; while iterating, a source of which nothing can be read.
    """
    part = range(len(source)) if part is None else part
    examples = len(part) if limit is None else min(limit, len(part))
    if not examples:
        raise UserError("config.data.source: it holds no examples")
    reader = _Reader(source, transform, max_corrupt_share=1.0)
    return Evaluation(_EvaluationBatches(reader, np.asarray(rows), global_batch, part, examples, seed), threads)


class Evaluation:
    """A sized iterable of evaluation batches; made by `evaluation`.

    Attributes:
      unreadable: reason by name of the examples that could not be read so far.
    """

    def __init__(self, batches: _EvaluationBatches, threads: int):
        self.unreadable: dict[str, str] = {}
        self._batches = batches
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        self._dataset = grain.MapDataset.source(batches).to_iter_dataset(options)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._dataset)
        try:
            for batch, corrupt in iterator:
                self.unreadable |= corrupt
                yield batch
        finally:
            iterator.close()


def _stack(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _too_many_corrupt(count: int, seen: int, example: str, share: float) -> UserError:
    return UserError(
        f"{count} of {seen} examples cannot be read, such as {example}; "
        f"mend the files, or raise config.data.max_corrupt_share ({share})"
    )
