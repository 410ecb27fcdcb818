"""Writes a .safetensors file piece by piece, so that no more than one piece is in memory (its format page)."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vqgan_jax import storage

_NAMES = {"float32": "F32", "int64": "I64", "uint8": "U8", "bool": "BOOL"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the file; `pieces()` gives its parts in the order in which they lie in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: str | os.PathLike, entries: Sequence[Entry]) -> str:
    """Writes the file, whole or not at all, making its folder where it is missing. Returns its SHA-256.

    Raises:
      ValueError: pieces that do not add up to what an entry says.
    """
    header, position = {}, 0
    for entry in entries:
        offsets = [position, position + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype.name], "shape": list(entry.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with storage.staged(path) as partial, partial.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for entry in entries:
            start = file.tell()
            for piece in entry.pieces():
                put(np.ascontiguousarray(piece, entry.dtype).reshape(-1).view(np.uint8).data)
            if file.tell() - start != entry.nbytes:
                raise ValueError(f"{entry.name}: {file.tell() - start} bytes where {entry.nbytes} belong")
    return digest.hexdigest()
