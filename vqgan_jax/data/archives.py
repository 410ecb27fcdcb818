"""Zip and tar archives read in place: an index of where each member lies, built once, and reads at an offset.

A tar inside a tar is a folder of the same name (ILSVRC2012_img_train.tar holds a tar a class). The index of an archive
is kept in the cache folder under the archive's path, size and time.
"""

import bisect
import io
import os
import posixpath
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from vqgan_jax import storage
from vqgan_jax.config import UserError, suggest
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.data.stores import index_file, is_listed, printable, top_folders

_TAR, _STORED, _DEFLATED = -1, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # how a member lies in the archive
_NOWHERE = -1  # the offset of a link to what is not there
_LINKS = 16  # links that are followed from one member
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, then the lengths of name and extra field
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class _Member(NamedTuple):
    name: str
    offset: int  # of the data, in a zip of the local header
    size: int  # bytes in the archive
    method: int
    crc: int


class ArchiveStore:
    """The members of a zip or tar archive, read without unpacking it; also of tars inside a tar.

    Of two members of one name the last counts, as in unpacking. Links inside a tar are followed.

    Args:
      path: the archive, local or gs:// (the index of a tar in a bucket costs one reading of it all).
      suffixes: see `open_store`.
      inside: a folder in the archive to which names are relative; "" is all of it.

    Raises:
      UserError: no archive, one that is compressed as a whole, cut off or damaged, or without the folder `inside`.
    """

    def __init__(self, path: str | os.PathLike, suffixes: tuple[str, ...] = (), *, inside: str = ""):
        self.path = storage.path(path)
        if not self.path.is_file():
            raise UserError(f"config.data.path: there is no archive '{self.path}'")
        self._bytes = _Bytes(self.path)
        names, *columns = _index(self.path)
        self._prefix = f"{inside}/" if inside else ""
        if inside and not any(name.startswith(self._prefix) for name in names):
            raise UserError(
                f"config.data.path: there is no folder '{inside}' in the archive '{self.path}'"
                f"{suggest(inside, _folders(names, inside.count('/') + 1))}"
            )
        # Every member can be read, whatever is listed: annotations lie beside the pictures.
        rows = [i for i, name in enumerate(names) if name.startswith(self._prefix)]
        self._all = [names[i][len(self._prefix) :] for i in rows]
        self._offsets, self._sizes, self._methods, self._crcs = (column[rows] for column in columns)
        self.names: Sequence[str] = [name for name in self._all if is_listed(name, suffixes)]

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        row = bisect.bisect_left(self._all, name)
        if row == len(self._all) or self._all[row] != name:
            raise CorruptExample(self.where(name), "not in the archive")
        offset, size = int(self._offsets[row]), int(self._sizes[row])
        if offset == _NOWHERE:
            raise CorruptExample(self.where(name), "a link to what is not in the archive")
        try:
            if self._methods[row] == _TAR:
                return self._bytes.read(offset, size)
            return self._read_zipped(offset, size, int(self._methods[row]), int(self._crcs[row]))
        except (OSError, ValueError, zlib.error) as error:
            raise CorruptExample(self.where(name), f"{type(error).__name__}: {error}") from None

    def where(self, name: str) -> str:
        """See `Store.where`."""
        return printable(f"{self.path}/{self._prefix}{name}".rstrip("/"))

    def folders(self) -> tuple[str, ...]:
        """See `Store.folders`."""
        return top_folders(self.names)

    def _read_zipped(self, offset: int, size: int, method: int, crc: int) -> bytes:
        guess = 256  # of the lengths of name and extra field, so that one read will mostly do
        data = self._bytes.read(offset, _LOCAL_HEADER.size + guess + size, up_to=True)
        if len(data) < _LOCAL_HEADER.size:
            raise ValueError("the archive ends before this member")
        signature, *lengths = _LOCAL_HEADER.unpack_from(data)
        if signature != b"PK\x03\x04":
            raise ValueError("the archive is damaged: no member starts where its directory says")
        start = _LOCAL_HEADER.size + sum(lengths)
        data = data[start : start + size] if sum(lengths) <= guess else self._bytes.read(offset + start, size)
        if len(data) < size:
            raise ValueError("the archive ends inside this member")
        if method == _DEFLATED:
            data = zlib.decompress(data, wbits=-zlib.MAX_WBITS)
        elif method != _STORED:
            raise ValueError(f"compressed by the method {method}; zip it anew with deflate or none")
        if zlib.crc32(data) != crc:
            raise ValueError("its checksum is wrong")
        return data


class _Bytes:
    """Reads at an offset: thread-safe, for a read carries its offset, and opened anew where it is unpickled."""

    def __init__(self, path: os.PathLike):
        self.path = path
        self._lock = threading.Lock()
        self._file: Any = None

    def read(self, offset: int, size: int, *, up_to: bool = False) -> bytes:
        """`size` bytes. Raises ValueError if the file ends before, OSError; with `up_to` fewer are fine."""
        if storage.is_remote(self.path):
            data = self._open().cat_file(str(self.path), start=offset, end=offset + size)
        else:
            data = os.pread(self._open().fileno(), size, offset)
        if len(data) < size and not up_to:
            raise ValueError("the archive ends inside this member")
        return data

    def _open(self) -> Any:
        with self._lock:
            if self._file is None:
                if storage.is_remote(self.path):
                    import fsspec

                    self._file = fsspec.url_to_fs(str(self.path))[0]
                else:
                    self._file = open(self.path, "rb", buffering=0)
            return self._file

    def __reduce__(self):
        return _Bytes, (self.path,)


def _index(path: os.PathLike) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Names in order, and offset, size, method and checksum of each; from the cache folder if they are there."""
    cached = index_file("archives", path)
    if cached.is_file():
        try:
            arrays = storage.load_npz(cached)
            text = arrays["names"].tobytes().decode("utf-8", "surrogateescape")
            return text.split("\0") if text else [], *(arrays[key] for key in ("offset", "size", "method", "crc"))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logging.warning("%s: damaged, read from '%s' again (%s)", cached, path, error)
    names, offset, sizes, method, crc = _sorted_members(path, storage.path(path).stat().length)
    try:
        text = np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)
        storage.save_npz(cached, names=text, offset=offset, size=sizes, method=method, crc=crc)
    except OSError as error:
        logging.warning("%s: the index of '%s' is not kept: %s", cached.parent, path, error)
    return names, offset, sizes, method, crc


def _sorted_members(path: os.PathLike, size: int) -> tuple[list[str], *tuple[np.ndarray, ...]]:
    """Lists the archive, sorted by name, one member a name."""
    with storage.path(path).open("rb") as file:
        start = file.read(8)
        for magic, tool in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"config.data.path: '{path}' is compressed as a whole and cannot be read in place; "
                    f"decompress it once: {tool} '{path}'"
                )
        zipped = start.startswith(b"PK") or str(path).lower().endswith(".zip")
        members = list(_zip_members(file, path) if zipped else _tar_members(file, path, size))
    last = {member.name: member for member in members}
    if len(last) < len(members):
        seen: set[str] = set()
        twice = next(m.name for m in members if m.name in seen or seen.add(m.name))
        logging.warning(
            "'%s' holds %d names more than once, such as '%s': the last of each counts",
            path,
            len(members) - len(last),
            printable(twice),
        )
    names = sorted(last)
    columns = np.array([last[name][1:] for name in names], np.int64).reshape(-1, 4).T
    return names, columns[0], columns[1], columns[2].astype(np.int16), columns[3]


def _zip_members(file: BinaryIO, path: os.PathLike) -> Iterator[_Member]:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise UserError(
            f"config.data.path: the directory of '{path}' cannot be read ({error}); "
            f"fetch it again, or try: zip -FF '{path}' --out mended.zip"
        ) from None
    for info in infos:
        if not info.is_dir():
            if info.flag_bits & 1:
                raise UserError(f"config.data.path: '{path}' is encrypted; unpack it, or zip it without a password")
            name = _clean(info.filename.replace("\\", "/"))  # some tools for Windows separate by those
            yield _Member(name, info.header_offset, info.compress_size, info.compress_type, info.CRC)


def _tar_members(file: BinaryIO, path: os.PathLike, size: int) -> Iterator[_Member]:
    name = os.path.basename(path)
    with tqdm(total=size, desc=f"indexing {name}", unit="B", unit_scale=True, disable=size < 1 << 30) as bar:
        for member in _tar_section(file, path, 0, size, ""):
            bar.update(max(0, member.offset + member.size - bar.n))
            yield member


def _tar_section(file: BinaryIO, path: os.PathLike, start: int, size: int, prefix: str) -> Iterator[_Member]:
    """The members of the tar that lies at `start` of the file; their names start with `prefix`."""
    what = f"'{path}'" if not prefix else f"'{printable(prefix[:-1])}.tar' in '{path}'"
    section = _Section(file, start, size)
    found: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        archive = tarfile.TarFile(fileobj=section)
        while (info := archive.next()) is not None:
            archive.members.clear()  # a million of them would fill the memory
            name, offset = _clean(info.name), start + info.offset_data
            if info.islnk() or info.issym():
                folder = posixpath.dirname(name) if info.issym() else ""
                links[name] = posixpath.normpath(posixpath.join(folder, info.linkname))
            elif info.isreg() and not info.issparse():
                if name.lower().endswith(".tar"):
                    yield from _tar_section(file, path, offset, info.size, f"{prefix}{name[:-4]}/")
                    continue
                if name.lower().endswith(_COMPRESSED_SUFFIXES):
                    logging.warning("'%s' in %s is compressed as a whole and left out", printable(name), what)
                found[name] = offset, info.size
                yield _Member(prefix + name, offset, info.size, _TAR, 0)
        section.seek(archive.offset)
        mark = section.read(tarfile.BLOCKSIZE)
        if any(mark):  # tarfile takes a header that it cannot read for the end
            raise tarfile.ReadError(f"no header at byte {start + archive.offset}")
        if len(mark) < tarfile.BLOCKSIZE:
            logging.warning("%s has no end mark: it may be cut off", what)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(
            f"config.data.path: {what} is no zip or tar archive, or cut off or damaged ({error}); fetch it again"
        ) from None
    for name, target in links.items():
        for _ in range(_LINKS):
            target = links.get(target, target)
        yield _Member(prefix + name, *found.get(target, (_NOWHERE, 0)), _TAR, 0)


class _Section(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


def _clean(name: str) -> str:
    """A member's name without what some tools put in front: "./a" and "/a" are "a"."""
    while name.startswith(("./", "/")):
        name = name[2:] if name.startswith("./") else name[1:]
    return name


def _folders(names: Sequence[str], depth: int) -> set[str]:
    """The folders above these names, down to a depth."""
    found: set[str] = set()
    for name in names:
        parts = name.split("/")[:-1][:depth]
        found.update("/".join(parts[: i + 1]) for i in range(len(parts)))
    return found
