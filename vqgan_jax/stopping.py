"""When a job was told to go, and how long work that is under way is broken off: between two of its batches.

SIGTERM leaves 30 seconds; an evaluation may take an hour. So loops over batches that may run inside a training go
through `breakable`.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")
_points = itertools.count(1)  # where hosts may stop, counted alike on all; JAX names one that all will reach
_breaking: "StopRequest | None" = None  # whose request ends loops now


class BrokenOff(Exception):
    """The job was told to go before a loop had ended."""


class StopRequest:
    """Whether the job was told to go: SIGTERM, or SIGINT, the second of which interrupts at once; within `with`.

    With several processes JAX's preemption service holds SIGTERM and names a point that all hosts reach together.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Asked by every process, equally often."""
        if jax.process_count() > 1 and not self._asked:
            self._asked = multihost_utils.reached_preemption_sync_point(next(_points))
        return self._asked

    @contextlib.contextmanager
    def breaking(self) -> Iterator[None]:
        """Within this, a request ends every loop that goes through `breakable` by BrokenOff."""
        global _breaking
        _breaking = self
        try:
            yield
        finally:
            _breaking = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])


def breakable(items: Iterable[T], at_most: int = 0) -> Iterator[T]:
    """Passes items on; raises BrokenOff between two of them once a training that this is part of is told to go.

    Args:
      items: whatever a loop is over.
      at_most: hosts whose numbers of items differ give one that none exceeds, so that this loop is broken off on all of
        them or on none; 0 where all hosts have as many.
    """
    asked = 0
    for item in items:
        if not at_most or asked < at_most:
            check()
            asked += 1
        yield item
    if jax.process_count() > 1:
        for _ in range(asked, at_most):
            check()


def check() -> None:
    """Raises BrokenOff as `breakable` does; called by every process."""
    if _breaking is not None and _breaking.requested():
        raise BrokenOff
