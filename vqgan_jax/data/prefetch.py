"""Batches on the device before they are asked for, by a thread."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


class DevicePrefetch(Iterator[Any]):
    """Batches put on the device ahead of time by a thread; made by `prefetch_to_device`.

    Attributes:
      wait_seconds: how long the last `next` waited for its batch: the time that the input costs the step.
    """

    def __init__(self, batches: Iterable[Batch], put: Callable[[Batch], Any], size: int):
        self.wait_seconds = 0.0
        self._batches = batches
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._free = threading.Semaphore(size)
        self._end: BaseException | None = None
        self._peeked: list[Any] = []
        stop = threading.Event()
        # The thread must not hold `self`, or an abandoned prefetch would never be collected.
        thread = threading.Thread(
            target=_fill, args=(iter(batches), put, self._ready, self._free, stop), name="prefetch", daemon=True
        )
        # Also runs at interpreter exit, where a daemon thread inside the runtime would crash it.
        self._finalize = weakref.finalize(self, _stop, thread, self._free, stop)
        thread.start()

    def __next__(self) -> Any:
        """The next batch on the device. Raises what reading or putting it raised, and again on every later call."""
        if self._end is not None:
            raise self._end
        if self._peeked:
            return self._peeked.pop()
        start = time.perf_counter()
        batch, self._end = self._ready.get()
        self.wait_seconds = time.perf_counter() - start
        if self._end is not None:
            raise self._end
        self._free.release()
        return batch

    def peek(self) -> Any:
        """The next batch, which the next `next` gives again."""
        self._peeked.append(next(self))
        return self._peeked[-1]

    def close(self) -> None:
        """Stops the thread, drops what it prepared, and closes the iterator it read from, where that can be closed."""
        self._finalize()
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._end = self._end or StopIteration()
        self._peeked = []
        self._ready = queue.SimpleQueue()

    def __enter__(self) -> "DevicePrefetch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def prefetch_to_device(batches: Iterable[Batch], put: Callable[[Batch], Any], size: int = 2) -> DevicePrefetch:
    """Reads `batches` in a thread and keeps up to `size` of them already on the device.

    Args:
      batches: host batches, endless or not.
      put: from a host batch to its arrays on the devices.
      size: batches held on the device beside the one in use.
    """
    return DevicePrefetch(batches, put, size)


def _fill(batches: Iterator[Batch], put: Callable, ready: queue.SimpleQueue, free: threading.Semaphore, stop) -> None:
    try:
        for batch in batches:
            free.acquire()
            if stop.is_set():
                return
            ready.put((put(batch), None))
        ready.put((None, StopIteration()))
    except BaseException as error:  # whatever it is, the thread that waits must learn of it
        ready.put((None, error))


def _stop(thread: threading.Thread, free: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    free.release()
    if thread is not threading.current_thread():  # garbage can be collected in any thread
        thread.join(timeout=5)
