"""TFRecord files without TensorFlow: an index of where each record lies, built once, and reads at an offset.

A record is its length (8 bytes), a checksum of the length, the data, and a checksum of the data; checksums are CRC-32C,
rotated and shifted. (tensorflow.org/tutorials/load_data/tfrecord)
"""

import functools
import itertools
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.source import CorruptExample, locate
from vqgan_jax.data.stores import index_file

try:
    import google_crc32c  # it comes with the client for buckets
except ImportError:
    google_crc32c = None

_HEADER, _FOOTER = 12, 4  # bytes around the data
_THREADS = 8  # that index files


class Part(NamedTuple):
    """`take` records of a file, from number `skip` on; the whole file holds `records`."""

    path: epath.Path
    skip: int
    take: int
    records: int


class TFRecords:
    """Random access to the bytes of records; picklable, and `__getitem__` may run in several threads at once.

    The index of a file is kept in the cache folder under its path, size and time. Lengths are always checked, the data
    where google-crc32c is installed.

    Args:
      parts: what to read, in order.

    Raises:
      UserError: a file is missing, damaged, or holds another number of records.
    """

    def __init__(self, parts: Sequence[Part]):
        files = {part.path: part.records for part in parts}
        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip(files, pool.map(_find_index, files), strict=True))
            missing = [path for path, index in found.items() if index is None]
            with tqdm(missing, desc="indexing TFRecords", unit="file", disable=None if missing else True) as bar:
                for path, index in zip(missing, pool.map(_build_index, missing), strict=True):
                    found[path] = index
                    bar.update()
        for path, records in files.items():
            if len(found[path]) != records:
                raise UserError(f"{path}: holds {len(found[path])} records in place of {records}; copy it again")
        self._paths = [part.path for part in parts]
        self._indices = [found[part.path][part.skip : part.skip + part.take] for part in parts]
        self._ends = list(itertools.accumulate(len(index) for index in self._indices))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> bytes:
        """The data of a record. Raises CorruptExample: it cannot be read, or its checksum is wrong."""
        part, position = locate(self._ends, i)
        offset, size = map(int, self._indices[part][position])
        try:
            data = _read(self._paths[part], offset, size + _FOOTER)
        except OSError as error:
            raise CorruptExample(self.where(i), f"{type(error).__name__}: {error}") from None
        if len(data) < size + _FOOTER:
            raise CorruptExample(self.where(i), "the file ends inside this record")
        data, checksum = data[:size], int.from_bytes(data[size:], "little")
        if google_crc32c is not None and google_crc32c.implementation == "c":
            if _masked(np.array([google_crc32c.value(data)], np.uint32))[0] != checksum:
                raise CorruptExample(self.where(i), "its checksum is wrong")
        return data

    def where(self, i: int) -> str:
        """The file of a record and its offset there, for errors."""
        part, position = locate(self._ends, i)
        return f"{self._paths[part]}@{self._indices[part][position][0] - _HEADER}"


def _read(path: epath.Path, offset: int, size: int) -> bytes:
    """Up to `size` bytes at an offset. A file is opened for each read: there may be more files than can be open."""
    if storage.is_remote(path):
        import fsspec

        return fsspec.url_to_fs(str(path))[0].cat_file(str(path), start=offset, end=offset + size)
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def _find_index(path: epath.Path) -> np.ndarray | None:
    """The index of a file, int64 [n, 2] of offset and size of the data, if it was built before."""
    try:
        return storage.load_npz(index_file("tfrecords", path))["index"]
    except FileNotFoundError:
        if not path.exists():
            raise UserError(f"{path}: the file is missing; copy it again") from None
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # a damaged cache is built again
        return None


def _build_index(path: epath.Path) -> np.ndarray:
    """Reads the length of every record of a file, which in a bucket is to read all of it."""
    size = path.stat().length
    headers, offsets, offset, fault = bytearray(), [], 0, None
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER)
            end = offset + _HEADER + int.from_bytes(header[:8], "little") + _FOOTER
            if len(header) < _HEADER or end > size:
                fault = offset
                break
            headers += header
            offsets.append(offset)
            offset = end
    table = np.frombuffer(bytes(headers), np.uint8).reshape(-1, _HEADER)
    checksums = table[:, 8:].copy().view("<u4")[:, 0]
    wrong = np.flatnonzero(_masked(_crc32c(table[:, :8])) != checksums)
    if len(wrong):  # the first of them led astray whatever comes after it
        fault = offsets[wrong[0]]
    if fault is not None:
        raise UserError(f"{path}: is cut off or damaged at byte {fault} of {size}; copy it again")
    lengths = table[:, :8].copy().view("<i8")[:, 0]
    index = np.stack([np.array(offsets, np.int64) + _HEADER, lengths], axis=1)
    try:
        storage.save_npz(index_file("tfrecords", path), index=index)
    except OSError as error:
        logging.log_first_n(logging.WARNING, "the index of '%s' is not kept: %s", 1, path, error)
    return index


def _masked(crc: np.ndarray) -> np.ndarray:
    """CRC-32C uint32 [n] as the format stores it."""
    return ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)


def _crc32c(rows: np.ndarray) -> np.ndarray:
    """CRC-32C uint32 [n] of short rows of bytes uint8 [n, length], all rows at once."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = _table()[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    return ~crc


@functools.cache
def _table() -> np.ndarray:
    """The remainder of each byte by Castagnoli's polynomial, bits reversed."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ np.uint32(0x82F63B78), table >> np.uint32(1))
    return table
