"""Where bytes lie: named files in a folder, on a list, or inside an archive (`archives.py`).

The parts of a published data set are found unpacked, or still in the archives that it is downloaded in.
"""

import functools
import hashlib
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from absl import logging
from etils import epath

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.decoding import IMAGE_SUFFIXES
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.weights import cache_folder

_PROBED = 16  # lines of a list that are looked for when it is opened


class Store(Protocol):
    """Named bytes: picklable, and `read` may run in several threads at once.

    Names are relative, separated by "/", sorted (a list keeps its own order), without hidden files.
    """

    names: Sequence[str]

    def read(self, name: str) -> bytes:
        """The bytes of `name`, listed or not. Raises CorruptExample: it cannot be read."""
        ...

    def where(self, name: str) -> str:
        """The path that a person would look for, for errors."""
        ...

    def folders(self) -> tuple[str, ...]:
        """The top folders that hold a name, sorted: the classes; () where a name lies in none."""
        ...


def open_store(path: str | os.PathLike, suffixes: tuple[str, ...] = ()) -> Store:
    """Opens a folder, a zip or tar archive, or a folder inside an archive ("data.zip/images/train").

    Args:
      path: local or gs://.
      suffixes: of the names to list, in lower case, such as (".jpg",); () lists all.

    Raises:
      UserError: nothing there, or an archive that cannot be read in place.
    """
    from vqgan_jax.data.archives import ArchiveStore  # which builds on this file

    path = storage.path(path)
    if path.is_dir():
        return FolderStore(path, suffixes)
    archive = next((above for above in (path, *path.parents) if above.is_file()), None)
    if archive is None:
        raise UserError(f"config.data.path: there is no folder and no archive '{path}'")
    return ArchiveStore(archive, suffixes, inside=str(path)[len(str(archive)) :].strip("/"))


class FolderStore:
    """The files in any nesting under a folder; links are followed, hidden files and folders skipped.

    Args:
      path: the folder, local or gs://.
      suffixes: see `open_store`.

    Raises:
      UserError: there is no such folder.
    """

    def __init__(self, path: str | os.PathLike, suffixes: tuple[str, ...] = ()):
        self.path, self.suffixes = storage.path(path), suffixes
        if not self.path.is_dir():
            raise UserError(f"config.data.path: there is no folder '{self.path}'")

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """Relative names, sorted; found when first asked for."""
        if storage.is_remote(self.path):
            prefix = len(str(self.path).rstrip("/")) + 1
            found = (str(file)[prefix:] for file in storage.files(self.path))
            return sorted(name for name in found if is_listed(name, self.suffixes))
        return sorted(_walk(os.fspath(self.path), "", self.suffixes, frozenset()))

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        return read_file(self.path / name)

    def where(self, name: str) -> str:
        """See `Store.where`."""
        return printable(self.path / name)

    def folders(self) -> tuple[str, ...]:
        """See `Store.folders`; of a local tree that was not walked yet only the top is looked at."""
        if "names" in self.__dict__ or storage.is_remote(self.path):
            return top_folders(self.names)
        root = os.fspath(self.path)
        found = []
        with os.scandir(root) as entries:
            for entry in entries:
                if not is_listed(entry.name, ()):
                    continue
                if not _is_folder(entry):
                    if is_listed(entry.name, self.suffixes):
                        return ()
                elif any(_walk(entry.path, "", self.suffixes, frozenset({os.path.realpath(root)}))):
                    found.append(entry.name)
        return tuple(sorted(found))


class ListStore:
    """The files that a text file names, one path a line; blank lines and lines that start with "#" are skipped.

    A path is absolute, or relative to `root` or to the folder of the list, whichever holds the first lines. A path that
    stands there twice is two names.

    Args:
      file: the list, local or gs://.
      root: the folder that relative paths start from; None for that of the list alone.

    Raises:
      UserError: no such file, no path in it, or nothing at the first paths.
    """

    def __init__(self, file: str | os.PathLike, root: str | os.PathLike | None = None):
        self.file = storage.path(file)
        try:
            text = self.file.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        except OSError as error:
            raise UserError(f"config.data.path: the list '{self.file}' cannot be read ({error.strerror})") from None
        lines = [line.rstrip("\r") for line in text.split("\n")]
        lines = [line for line in lines if line.strip() and not line.startswith("#")]
        if not lines:
            raise UserError(f"config.data.path: the list '{self.file}' names no file; write one path a line")
        roots = list(dict.fromkeys((storage.path(root or self.file.parent), self.file.parent)))
        probed = lines[:_PROBED]
        self.path = next((r for r in roots if any(_join(r, line).is_file() for line in probed)), None)
        if self.path is None:
            tried = " or ".join(f"'{_join(r, lines[0])}'" for r in roots)
            raise UserError(
                f"config.data.path: the first {len(probed)} lines of '{self.file}' name no file (there is no {tried}); "
                "write one path a line, absolute or relative to the list's folder"
            )
        prefix = f"{self.path}/"
        self.names: Sequence[str] = [line.removeprefix(prefix).removeprefix("./") for line in lines]

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        try:
            return read_file(_join(self.path, name))
        except CorruptExample as error:
            raise CorruptExample(error.path, f"{error.reason} (named in '{self.file}')") from None

    def where(self, name: str) -> str:
        """See `Store.where`."""
        return printable(_join(self.path, name))

    def folders(self) -> tuple[str, ...]:
        """See `Store.folders`."""
        return top_folders(self.names)


def find_store(root: str, candidates: Sequence[str], layout: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Store:
    """The first of some folders (of a folder or an archive) that is there.

    Args:
      root: what `config.data.path` names.
      candidates: relative paths, such as "train2017" and "train2017.zip/train2017"; "" is the root itself.
      layout: what belongs under the root, for the error.
      suffixes: of the files to list.

    Raises:
      UserError: none of them is there, or one cannot be read in place.
    """
    if not root:
        raise UserError(f"config.data.path: name what holds {layout}")
    for candidate in candidates:
        try:
            store = open_store(posixpath.join(root, candidate), suffixes)
        except UserError:
            if storage.path(posixpath.join(root, candidate)).exists():
                raise
        else:
            if len(store.names):
                return store
    raise UserError(
        f"config.data.path: '{root}' holds no files in {' or '.join(map(repr, candidates))}; {layout} belong"
    )


def find_file(root: str, candidates: Sequence[str], layout: str) -> tuple[bytes, str]:
    """The bytes of the first of some files (of a folder or an archive) that is there, and where it is.

    Raises:
      UserError: none of them is there; otherwise as `find_store`.
    """
    found = read_optional(root, candidates)
    if found is None:
        raise UserError(f"config.data.path: '{root}' lacks {' and '.join(map(repr, candidates))}; {layout} belong")
    return found


def read_optional(root: str, candidates: Sequence[str]) -> tuple[bytes, str] | None:
    """As `find_file`; None where none is there."""
    for candidate in candidates:
        where = posixpath.join(root, candidate)
        path = storage.path(where)
        if path.is_file():
            return path.read_bytes(), where
        if any(above.suffix.lower() in (".zip", ".tar") and above.is_file() for above in path.parents):
            folder, _, name = where.rpartition("/")
            try:
                return open_store(folder).read(name), where
            except (UserError, CorruptExample):
                continue
    return None


def stem(name: str) -> str:
    """A relative name without its suffix: how pictures and what describes them are matched."""
    return posixpath.splitext(name)[0]


def matched(images: Sequence[str], described: Mapping[str, Iterable[str]], layout: str) -> list[tuple[str, ...]]:
    """Rows of names that agree but for their suffix: a picture's, and those of what belongs to it.

    Files without their counterpart are left out and warned of.

    Args:
      images: names of pictures; the rows keep their order.
      described: the other names by what they are, such as {"mask": ...}.
      layout: what belongs under the root, for the error.

    Raises:
      UserError: no name agrees.
    """
    found = {what: {stem(name): name for name in names} for what, names in described.items()}
    rows = [name for name in images if all(stem(name) in by_stem for by_stem in found.values())]
    if not rows:
        example = f", such as '{images[0]}'," if images else ""
        raise UserError(
            f"config.data.path: none of {len(images)} images{example} has a {' and a '.join(found)} of its name; "
            f"{layout} belong"
        )
    stems = {stem(name) for name in images}
    for what, by_stem in found.items():
        warn_left_out([name for name in images if stem(name) not in by_stem], f"have no {what}")
        warn_left_out([name for key, name in by_stem.items() if key not in stems], f"are a {what} without its image")
    return [(name, *(by_stem[stem(name)] for by_stem in found.values())) for name in rows]


def warn_left_out(names: Sequence[str], why: str) -> None:
    """Says in one line how many files are left out."""
    if names:
        logging.warning("config.data.path: %d files %s, such as '%s': left out", len(names), why, names[0])


def read_file(path: epath.Path) -> bytes:
    """The bytes of a file. Raises CorruptExample: it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError is a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise CorruptExample(printable(path), f"{type(error).__name__}: {reason}") from None


def index_file(kind: str, path: str | os.PathLike) -> Path:
    """Where the index of a large file is kept: in the cache folder, under the file's path, size and time.

    Args:
      kind: the folder there, which says what writes and reads the index, and its format.
      path: the file, local or gs://. Raises OSError if there is none.
    """
    path = storage.path(path)
    size, time = storage.size_and_time(path)
    identity = f"{storage.absolute(path)} {size} {time}".encode("utf-8", "surrogateescape")
    return cache_folder() / kind / f"{hashlib.sha256(identity).hexdigest()[:24]}.npz"


def top_folders(names: Iterable[str]) -> tuple[str, ...]:
    """See `Store.folders`; absolute names and such as start with ".." lie in none."""
    found = set()
    for name in names:
        folder, separator, _ = name.partition("/")
        if not separator or folder in ("", "..") or folder.endswith(":"):
            return ()
        found.add(folder)
    return tuple(sorted(found))


def is_listed(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a relative name is a file of these kinds, no part of it hidden."""
    return not name.startswith(".") and "/." not in name and (not suffixes or name.lower().endswith(suffixes))


def printable(path: str | os.PathLike) -> str:
    """A path as text that every log and file takes: bytes that are no UTF-8 are written as escapes."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def _join(root: epath.Path, line: str) -> epath.Path:
    return storage.path(line) if line.startswith(("/", "~/", "gs://")) else root / line


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(folder: str, prefix: str, suffixes: tuple[str, ...], above: frozenset[str]) -> Iterator[str]:
    """Relative names of the files under a local folder; `above` holds the real paths of its parents."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", suffixes, above | {real})
            elif is_listed(entry.name, suffixes):
                yield prefix + entry.name  # a broken link too: a file that is missing shall be counted
