"""Memory that is really taken while pictures are converted, measured from outside."""

import contextlib
import ctypes
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import pytest

from vqgan_jax.models import strips


@dataclasses.dataclass
class Taken:
    """Bytes of the most that was there at once, and how many programs ran."""

    bytes: int = 0
    runs: int = 0


def _alive() -> int:
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


@contextlib.contextmanager
def device_memory() -> Iterator[Taken]:
    """Measures a device: at every program of the strips what is alive beside what it adds (arguments from the host,
    results, workspace), and after every layer what it leaves on the device."""
    taken, before = Taken(), _alive()
    compiling = strips._compile

    def measured(*args: Any) -> tuple[Any, int | None]:
        compiled, used = compiling(*args)
        return compiled and Program(compiled, taken, before), used

    def after(next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        made = next_fun(*args, **kwargs)
        taken.bytes = max(taken.bytes, _alive() - before)
        return made

    with pytest.MonkeyPatch.context() as patch, nn.intercept_methods(after):
        patch.setattr(strips, "_compile", measured)
        yield taken


@dataclasses.dataclass
class Program:
    """A compiled program that is measured whenever it runs."""

    compiled: Any
    taken: Taken
    before: int

    def __call__(self, *args: Any) -> Any:
        memory = self.compiled.memory_analysis()
        there = sum(x.nbytes for x in jax.tree.leaves(args) if isinstance(x, jax.Array))
        added = memory.argument_size_in_bytes - there + memory.output_size_in_bytes + memory.temp_size_in_bytes
        self.taken.bytes = max(self.taken.bytes, _alive() - self.before + added)
        self.taken.runs += 1
        return self.compiled(*args)


@contextlib.contextmanager
def process_memory() -> Iterator[Taken]:
    """Measures by how much the process grows at most: the host, and all devices that it simulates."""
    libc, threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD
    try:
        gc.collect()
        libc.mallopt(threshold, 1 << 21)  # what is freed goes back to the system at once, and counts when taken again
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    except (AttributeError, OSError):
        pytest.skip("the peak of a process is measured on Linux with glibc alone")
    taken, before = Taken(), _status("VmRSS")
    try:
        yield taken
        taken.bytes = _status("VmHWM") - before
    finally:
        libc.mallopt(threshold, 1 << 25)


def _status(name: str) -> int:
    """Bytes of a line of this process's status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10
