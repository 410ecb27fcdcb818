"""Where user-named files lie: local folders and Google Cloud Storage buckets (gs://), through one path type.

A bucket knows no folders, no appending and no renaming, but a write of it is whole or not there. So whatever is written
here is written once and whole; what grows (logs) grows in a local file that is uploaded anew.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from etils import epath

from vqgan_jax.config import UserError

# One client for buckets whatever else is installed: etils would import the whole of TensorFlow where there is one.
os.environ.setdefault("EPATH_USE_TF", "false")
_CHUNK = 1 << 24  # bytes copied at once
_logger = logging.getLogger(__name__)
BACKOFF = (5.0, 15.0, 45.0, 90.0)  # seconds from one try to the next, beyond what the clients of buckets try themselves
_LASTING = (  # in errors of disks and buckets that trying again does not mend
    *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)),
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "Forbidden",
    "Unauthorized",
    "Invalid Credentials",
)
T = TypeVar("T")


class StorageError(Exception):
    """A disk or bucket that may answer again did not for long; the text is one line for the user."""


def path(text: str | os.PathLike) -> epath.Path:
    """A user-named file or folder as a path, local (with ~ expanded) or in a bucket.

    Raises:
      UserError: gs:// without gcsfs, another scheme, or gs:/ with one slash (what pathlib makes of two).
    """
    text = os.fspath(text)
    if not re.match(r"[a-z0-9]+:/", text):
        return epath.Path(text).expanduser()
    if not re.match("gs://[^/]", text):
        raise UserError(f"{text}: only local paths and gs://BUCKET/... can be read and written")
    _prepare_buckets(text)
    return epath.Path(text)


def is_remote(where: str | os.PathLike) -> bool:
    """Whether this lies in a bucket."""
    return os.fspath(where).startswith("gs://")


def absolute(where: str | os.PathLike) -> epath.Path:
    """The same path from the root; a bucket's is absolute as it stands."""
    return path(where) if is_remote(where) else epath.Path(path(where).absolute())


def make_folder(where: str | os.PathLike, named: str) -> epath.Path:
    """Makes a folder where it is missing, and proves by a small file that it can be written.

    Args:
      where: the folder.
      named: the flag or key that names it, for the error's text ("--workdir=runs/x").

    Raises:
      UserError: it cannot be written; with the reason.
    """
    folder = path(where)
    probe = folder / f".writable-{os.getpid()}"
    try:
        if not is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except Exception as error:
        if not is_storage_error(error):
            raise
        missing = is_remote(folder) and isinstance(error, FileNotFoundError)
        reason = "no such bucket" if missing else getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{named}: cannot be written ({reason or type(error).__name__}); name another folder") from None
    return folder


def is_bucket_error(error: Exception) -> bool:
    """Whether this comes from a bucket's client: of HTTP, of credentials, of the network."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google", "requests")


def is_storage_error(error: Exception) -> bool:
    """Whether this comes from a disk or a bucket."""
    return isinstance(error, OSError) or is_bucket_error(error)


def may_pass(error: BaseException) -> bool:
    """Whether what failed may succeed later: not where a disk is full, something is missing or a permission is."""
    lasting = isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | UserError)
    return not lasting and not any(sign in str(error) for sign in _LASTING)


def retried(work: Callable[[], T]) -> T:
    """What `work` returns, which is tried again, later and later, while a disk or bucket fails for now.

    Raises:
      StorageError: it did not for all of BACKOFF.
      Exception: whatever else `work` raises.
    """
    waits = list(BACKOFF)
    while True:
        try:
            return work()
        except Exception as error:
            if not (is_storage_error(error) and may_pass(error)):
                raise
            reason = " ".join(str(error).split()) or repr(error)
            if not waits:
                raise StorageError(f"the storage does not answer ({reason}); start again to go on") from error
            _logger.warning("the storage does not answer (%s): tried again in %g s", reason, waits[0])
            time.sleep(waits.pop(0))


def in_the_end(work: Callable[[], Any], error: BaseException | None) -> None:
    """Calls `work` where a context is left. Where that is by an `error`, what `work` raises is logged and does not take
    its place: it is mostly the same trouble once more."""
    try:
        work()
    except Exception as another:
        if error is None:
            raise
        _logger.warning("on the way out: %s", " ".join(str(another).split()) or repr(another))


@contextlib.contextmanager
def staged(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a local path to write one file to; when the block ends well, the file stands at `target`, whole.

    Locally that is a temporary name beside the target, which is renamed; for a bucket a temporary file, uploaded.
    """
    target = path(target)
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix="vqgan_jax.") as folder:
            partial = Path(folder) / target.name
            yield partial
            _upload(partial, target)
        return
    folder = Path(target).parent
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}.tmp.{target.name}"  # the suffix stays: np.savez would add one
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a local folder to write any files to: `target` itself, or for a bucket one that is uploaded at the end."""
    target = path(target)
    if not is_remote(target):
        Path(target).mkdir(parents=True, exist_ok=True)
        yield Path(target)
        return
    with tempfile.TemporaryDirectory(prefix="vqgan_jax.") as name:
        try:
            yield Path(name)
        finally:
            for file in sorted(Path(name).rglob("*")):
                if file.is_file():
                    _upload(file, target / file.relative_to(name).as_posix())


def write_bytes(target: str | os.PathLike, data: bytes) -> None:
    """Writes a file that is whole or not there, making its folder where it is missing."""
    target = path(target)
    if is_remote(target):
        retried(lambda: target.write_bytes(data))
        return
    with staged(target) as partial:
        partial.write_bytes(data)


def create(target: str | os.PathLike, data: bytes) -> bool:
    """Writes a file that is whole or not there, where there is none yet. Returns whether this call made it: of several
    at once, from any number of machines, one does (on disks without hard links it may be seen before it is whole)."""
    target = path(target)
    if is_remote(target):
        import fsspec

        filesystem, name = fsspec.url_to_fs(str(target))
        try:
            filesystem.pipe_file(name, data, mode="create")
        except FileExistsError:
            return False
        return True
    partial = Path(target).with_name(f".{secrets.token_hex(8)}.new.{target.name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(data)
        try:
            os.link(partial, target)
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            with open(target, "xb") as file:
                file.write(data)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def write_text(target: str | os.PathLike, text: str) -> None:
    """`write_bytes` of a text as UTF-8."""
    write_bytes(target, text.encode())


def write_json(target: str | os.PathLike, value: Any) -> None:
    """`write_bytes` of plain data as JSON, indented by one, with a line end."""
    write_text(target, json.dumps(value, indent=1) + "\n")


def save_npz(target: str | os.PathLike, **arrays: np.ndarray) -> None:
    """`np.savez` to a file that is whole or not there."""
    with staged(target) as partial:
        np.savez(partial, **arrays)


def load_npz(source: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every array of an .npz file. Raises what np.load raises: OSError, ValueError, zipfile.BadZipFile."""
    with path(source).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def files(folder: str | os.PathLike) -> list[epath.Path]:
    """Every file in a folder and in what lies in it, sorted; none where the folder is missing."""
    folder = path(folder)
    if not is_remote(folder):
        return sorted(epath.Path(file) for file in Path(folder).rglob("*") if file.is_file())
    import fsspec

    filesystem, root = fsspec.url_to_fs(str(folder))
    return sorted(epath.Path(f"gs://{name}") for name in filesystem.find(root))


@contextlib.contextmanager
def fetched(source: str | os.PathLike) -> Iterator[Path]:
    """Yields a file for readers that need a local one: itself, or a bucket's file, downloaded for as long as the block.

    Raises:
      FileNotFoundError: there is no such file in the bucket.
    """
    source = path(source)
    if not is_remote(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="vqgan_jax.") as folder:
        local = Path(folder) / source.name
        with source.open("rb") as there, local.open("wb") as here:
            shutil.copyfileobj(there, here, _CHUNK)
        yield local


def digest(value: Any) -> str:
    """SHA-256 of plain data, as JSON whose keys are sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(source: str | os.PathLike) -> str:
    """The hexadecimal SHA-256 of a file. Raises OSError where it cannot be read."""
    with path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_and_time(source: str | os.PathLike) -> tuple[int, int]:
    """Bytes of a file and when it was last changed (locally in nanoseconds). Raises OSError where there is none."""
    if is_remote(source):
        stat = path(source).stat()
        return stat.length, stat.mtime
    stat = os.stat(path(source))
    return stat.st_size, stat.st_mtime_ns


class Mirror:
    """A file that grows: locally the file itself, for a bucket a local copy whose whole is uploaded by `push`.

    Attributes:
      remote: whether it is a bucket's.
      local: the file to append to. What stood at the path already stands in it.
    """

    def __init__(self, target: str | os.PathLike):
        self._target = path(target)
        self._pushed: int | None = None  # bytes that the bucket holds
        self._folder = None
        self.remote = is_remote(self._target)
        if not self.remote:
            self.local = Path(self._target)
            self.local.parent.mkdir(parents=True, exist_ok=True)
            return
        self._folder = tempfile.TemporaryDirectory(prefix="vqgan_jax.")
        self.local = Path(self._folder.name) / self._target.name
        if self._target.exists():
            self.local.write_bytes(self._target.read_bytes())

    def push(self) -> None:
        """Uploads the file if it has grown since the last time."""
        if self._folder is not None and (size := self.local.stat().st_size) != self._pushed:
            _upload(self.local, self._target)
            self._pushed = size

    def close(self) -> None:
        """Uploads it a last time and removes the local copy; the caller has closed it before."""
        self.push()
        if self._folder is not None:
            self._folder.cleanup()


def _upload(file: Path, target: epath.Path) -> None:
    def copy() -> None:
        with file.open("rb") as here, target.open("wb") as there:
            shutil.copyfileobj(here, there, _CHUNK)

    retried(copy)


def _prepare_buckets(text: str) -> None:
    """Checks that there is a client, and keeps it from remembering listings: other processes write there too."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets need gcsfs; pip install -r requirements-gcs.txt")
    import fsspec

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
