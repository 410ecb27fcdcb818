"""Compiles a program for devices that may be elsewhere, with a line of progress, and keeps what came of it.

It is kept by the program itself (its lowered text), the devices and the versions of the compilers: a second look takes
the seconds of tracing, and no change of a config, or of what is read off a program, can make it stale.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import re
import sys
import threading
import time
import types
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from vqgan_jax import storage, weights
from vqgan_jax.hlo import Module
from vqgan_jax.parallel import exceeds_memory, platform, slice_of
from vqgan_jax.tools.programs import Program
from vqgan_jax.train.roofline import Cost, cost_of, count_flops

_FOLDER = "aot"  # in the cache folder
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # that change what a compiler makes
_KEPT_BUFFERS = 400
_SECONDS = 15.0  # between lines of progress


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling found.

    Fields:
      cost: of a device; None where the compiler refused.
      refused: why, in one line; "" where it did not.
      buffers: by the operation that makes it (bytes, shape) of its largest buffer in device memory, the largest ones.
      needed_flops: of the model, on all devices.
      seconds: that compiling took.
      executable: where it was asked for.
    """

    cost: Cost | None
    refused: str
    buffers: dict[str, tuple[int, str]]
    needed_flops: float
    seconds: float
    executable: Any = None


def compile_cached(program: Program, *, keep: bool = False) -> Compiled:
    """Compiles a program, or finds what was found before; with `keep` it is always compiled."""
    with jax.set_mesh(program.mesh):
        lowered = program.function.lower(*program.args)
        needed = count_flops(program.needed(), platform())
    path = weights.cache_folder() / _FOLDER / f"{_key(program, lowered)}.json.gz"
    if (made := _read(path)) and not keep:
        return _compiled(made, needed)
    start, executable, refused = time.perf_counter(), None, ""
    with _progress():
        try:
            with _uncached() if keep else contextlib.nullcontext():
                executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not exceeds_memory(error):
                raise
            refused = _refusal(str(error))
    made = {"refused": refused, "seconds": time.perf_counter() - start}
    if executable is not None:
        memory = executable.memory_analysis()
        sizes = {name: getattr(memory, name) for name in dir(memory) if name.endswith("_in_bytes")}
        made |= {"text": executable.as_text(), "memory": sizes}
    _write(path, made)
    return dataclasses.replace(_compiled(made, needed), executable=executable if keep else None)


def _compiled(made: dict[str, Any], needed: float) -> Compiled:
    """What there is to know of what the compiler made."""
    cost, buffers = None, {}
    if "text" in made:
        cost = cost_of(made["text"], types.SimpleNamespace(**made["memory"]))
        buffers = largest_buffers(made["text"])
    return Compiled(cost, made["refused"], buffers, needed, made["seconds"])


def largest_buffers(text: str) -> dict[str, tuple[int, str]]:
    """Of a compiled program's text, by operation (bytes, shape) of its largest buffer; the largest ones."""
    found: dict[str, tuple[int, str]] = {}
    for buffer in Module(text).buffers():
        if buffer.made_by and buffer.size > found.get(buffer.made_by, (0, ""))[0]:
            found[buffer.made_by] = (buffer.size, buffer.shape)
    return dict(sorted(found.items(), key=lambda item: -item[1][0])[:_KEPT_BUFFERS])


def _key(program: Program, lowered: Any) -> str:
    devices = program.mesh.devices.flat
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu") if _installed(name)}
    flags = {name: os.environ.get(name, "") for name in _FLAGS}
    places = [(slice_of(d), getattr(d, "coords", d.id)) for d in devices]
    place = [devices[0].device_kind, dict(program.mesh.shape), places]
    return storage.digest([lowered.as_text(), place, versions, flags])


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _refusal(message: str) -> str:
    """One line out of the compiler's error."""
    found = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)|Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    if found is None:
        return " ".join(message.split())[:200]
    needs, has = filter(None, found.groups())
    return f"the compiler needs {needs}iB beside the arguments, the chip has {has}iB"


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's own cache: what comes out of it cannot be written again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Says every few seconds how long compiling has taken so far."""
    done, start = threading.Event(), time.perf_counter()

    def say() -> None:
        while not done.wait(1.0 if sys.stderr.isatty() else _SECONDS):
            text = f"compiling    {time.perf_counter() - start:.0f} s"
            print(text, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if sys.stderr.isatty():
            print(" " * 40, end="\r", file=sys.stderr, flush=True)


def _write(path: Path, made: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        storage.write_bytes(path, gzip.compress(json.dumps(made).encode()))


def _read(path: Path) -> dict[str, Any] | None:
    """What was kept; None where there is nothing, or where it is damaged."""
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None
