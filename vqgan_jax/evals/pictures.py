"""Finished pictures on disk, read in order and through threads: folders, archives, and arrays in .npz files."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeVar

import jax
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.decoding import IMAGE_SUFFIXES
from vqgan_jax.data.stores import open_store
from vqgan_jax.evals.features import Images

_BATCH, _THREADS = 32, 16
_JPEG = (".jpg", ".jpeg")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A set of pictures.

    Attributes:
      count: how many, over all hosts.
      identity: what tells it from another set, plain data.
      read: yields this host's share of them.
    """

    count: int
    identity: dict[str, Any]
    read: Callable[[], Images]


def open_pictures(where: str, *, key: str) -> Pictures:
    """Opens a folder of pictures or an archive of them (zip, tar), in the order of their names.

    Raises:
      UserError: nothing there, or no picture in it; on reading, a picture that is damaged.
    """
    path = storage.path(where)
    if path.is_dir():
        files = [file for file in storage.files(path) if _is_picture(file.name)]
        by_name = dict(sorted((file.relative_to(path).as_posix(), file) for file in files))
        names = list(by_name)
        try:
            digests = list(in_threads(lambda name: storage.sha256(by_name[name]), names))
        except OSError as error:
            raise UserError(f"{key}={where}: cannot be read ({error})") from None
        listing = "".join(f"{name}\n{digest}\n" for name, digest in zip(names, digests, strict=True))
        identity = {"contents_sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()}
        read = lambda name: by_name[name].read_bytes()  # noqa: E731
    elif path.exists():
        store = open_store(path, IMAGE_SUFFIXES)
        names, read = list(store.names), store.read
        identity = {"sha256": storage.sha256(path)}
    else:
        raise UserError(f"{key}={where}: nothing there")
    if not names:
        raise UserError(f"{key}={where}: holds no picture ({', '.join(IMAGE_SUFFIXES)})")
    if jpegs := sum(name.lower().endswith(_JPEG) for name in names):
        logging.warning("%s=%s: %d of %d pictures are JPEG, which moves FID; save PNG", key, where, jpegs, len(names))

    def decode(index: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(read(names[index]))) as image:
                return np.asarray(image.convert("RGB"))  # neither turned nor on white: as the published tools do
        except Exception as error:  # decoders raise anything at all on damaged bytes
            reason = f"{names[index]} cannot be read ({' '.join(str(error).split())})"
            raise UserError(f"{key}={where}: {reason}; a score of the rest would be one of another set") from None

    def images() -> Images:
        indices = range(jax.process_index(), len(names), jax.process_count())
        return _stacked(zip(in_threads(decode, indices), indices, strict=True))

    return Pictures(len(names), identity | {"jpeg": jpegs}, images)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def open_npz(where: str, name: str, *, key: str) -> Pictures:
    """Opens an array uint8 [n, h, w, 3] of an .npz file, which is read piece by piece and never held whole.

    Raises:
      UserError: another type or shape, or a damaged file.
    """
    path = storage.path(where)
    with _member(path, name, f"{key}={where}") as member:
        shape, dtype = _header(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or not shape[0]:
        raise UserError(f"{key}={where}: '{name}' is {dtype} {list(shape)}; pictures are uint8 [n, h, w, 3]")

    def images() -> Images:
        host, hosts, size = jax.process_index(), jax.process_count(), int(np.prod(shape[1:]))
        with _member(path, name, f"{key}={where}") as member:
            _header(member)
            for number, start in enumerate(range(0, shape[0], _BATCH)):
                rows = min(_BATCH, shape[0] - start)
                data = member.read(rows * size)
                if len(data) != rows * size:
                    raise ValueError("cut short")
                if number % hosts == host:
                    yield np.frombuffer(data, np.uint8).reshape(rows, *shape[1:]), np.arange(start, start + rows)

    return Pictures(shape[0], {"sha256": storage.sha256(path)}, images)


@contextlib.contextmanager
def _member(path: epath.Path, name: str, named: str) -> Iterator[IO[bytes]]:
    """An array of an .npz file, open. Raises UserError: it is damaged, or written as `_header` does not take it."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
            yield member
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{named}: '{name}' cannot be read ({' '.join(str(error).split())})") from None


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f".npy of version {version[0]}.{version[1]}")
    shape, fortran, dtype = readers[version](member)
    if fortran:
        raise ValueError("an array in Fortran order")
    return shape, dtype


def in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """`map` through threads, in order, a few items ahead of what is asked for."""
    items, waiting = iter(items), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            for item in itertools.islice(items, 4 * _THREADS):
                waiting.append(pool.submit(function, item))
            while waiting:
                result = waiting.popleft().result()
                for item in itertools.islice(items, 1):
                    waiting.append(pool.submit(function, item))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _stacked(rows: Iterable[tuple[np.ndarray, int]]) -> Images:
    """Batches of neighbours of one size."""
    for _, group in itertools.groupby(rows, key=lambda row: row[0].shape):
        while batch := list(itertools.islice(group, _BATCH)):
            yield np.stack([pixels for pixels, _ in batch]), np.array([index for _, index in batch])
