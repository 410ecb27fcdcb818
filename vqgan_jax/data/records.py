"""Our own files of examples: ArrayRecord shards of msgpack payloads, and a manifest that says what they hold.

Pictures are kept as the bytes of their file under "image_bytes" and decoded on reading; arrays, numbers and texts are
kept as they are. `tools.prepare` writes pictures, the code cache writes codes.
"""

import contextlib
import functools
import itertools
import json
import resource
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from flax import serialization
from ml_collections import ConfigDict

from vqgan_jax import storage
from vqgan_jax.config import UserError, choose
from vqgan_jax.data.decoding import decode_image
from vqgan_jax.data.image_files import decode_at_least
from vqgan_jax.data.source import CorruptExample, Example, locate
from vqgan_jax.weights import cache_folder

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "manifest.unfinished.json"  # what the tools keep while they write
IMAGES, CODES = "images", "codes"  # the kinds of manifest

_WRITER = "group_size:1,zstd:1"  # one record a chunk, for random access; encoded pictures stay as they are under zstd
_READER = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_BUFFER = 1 << 15  # bytes a read, where a record is smaller
_THREADS = 16  # that ask a file system about many shards at once


def write_shard(path: str | epath.Path, examples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Writes one shard, whole or not at all; the same examples give the same bytes.

    Args:
      path: the file, local or gs://.
      examples: payloads: flat dicts of arrays, numbers, texts and bytes, an encoded picture under "image_bytes".

    Returns:
      its entry of the manifest: {"file": name, "count": records, "bytes": size, "sha256": hex digest}.

    Raises:
      UserError: it cannot be written, for want of space for example.
    """
    path = storage.path(path)
    count = 0
    with storage.staged(path) as partial:
        with _errors_named(path):
            writer = ArrayRecordWriter(str(partial), _WRITER)
        try:
            for example in examples:
                payload = serialization.msgpack_serialize(dict(example))  # which sorts the keys
                with _errors_named(path):
                    writer.write(payload)
                count += 1
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        with _errors_named(path):
            writer.close()
        return {"file": path.name, "count": count, "bytes": partial.stat().st_size, "sha256": storage.sha256(partial)}


def write_manifest(folder: str | epath.Path, manifest: Mapping[str, Any], *, name: str = MANIFEST) -> None:
    """Writes the manifest, whole or not at all, with `format` added.

    Args:
      folder: the folder of the shards.
      manifest: {"kind": IMAGES or CODES, "splits": {split: {"count", "shards": [what write_shard returned, ...]}},
        "classes": [...], "keys": [...]} and whatever else is worth keeping.
      name: UNFINISHED while shards are still being written.
    """
    storage.write_json(storage.path(folder) / name, {"format": FORMAT, **manifest})


def read_manifest(folder: str | epath.Path, *, kind: str | None = None, name: str = MANIFEST) -> dict[str, Any]:
    """Reads what `write_manifest` wrote.

    Args:
      folder: the folder of the shards.
      kind: IMAGES or CODES, where only that will do.
      name: as for `write_manifest`.

    Raises:
      UserError: no such folder or manifest, one that is unfinished, damaged, of a newer format, or of another kind.
    """
    folder = storage.path(folder)
    path = folder / name
    try:
        manifest = json.loads(path.read_text())
        version, found = manifest["format"], manifest["kind"]
    except (FileNotFoundError, NotADirectoryError):
        if name == MANIFEST and (folder / UNFINISHED).exists():
            raise UserError(f"{folder}: is unfinished; give the command that writes it again, and it goes on") from None
        raise UserError(f"{path}: no such file; name a folder that vqgan_jax.tools.prepare wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no manifest of records ({type(error).__name__}: {error})") from None
    if version > FORMAT:
        raise UserError(f"{path}: has format {version}, this vqgan_jax knows {FORMAT}: install a newer one")
    if kind not in (None, found):
        raise UserError(f"{folder}: holds {found}, where {kind} are wanted")
    return manifest


def verify(folder: str | epath.Path) -> int:
    """Compares every shard with its hash in the manifest, and returns how many there are.

    Raises:
      UserError: a shard is missing or differs; it is named.
    """
    folder = storage.path(folder)
    shards = [shard for split in read_manifest(folder)["splits"].values() for shard in split["shards"]]
    with ThreadPoolExecutor(_THREADS) as pool:
        for fault in pool.map(functools.partial(shard_fault, folder), shards):
            if fault:
                raise UserError(fault)
    return len(shards)


def shard_fault(folder: str | epath.Path, shard: Mapping[str, Any], *, hashed: bool = True) -> str | None:
    """What is wrong with a shard of the manifest in one line that names it, or None.

    Args:
      folder: where it lies.
      shard: its entry of the manifest.
      hashed: compare its hash too, which reads all of it; else the size alone.
    """
    path = storage.path(folder) / shard["file"]
    try:
        size = path.stat().length
    except FileNotFoundError:
        return f"{path}: the shard is missing; copy or prepare it again"
    if size != shard["bytes"]:
        return f"{path}: the shard has {size} bytes in place of {shard['bytes']}; copy or prepare it again"
    if hashed and storage.sha256(path) != shard["sha256"]:
        return f"{path}: the shard differs from its hash in {MANIFEST}; copy or prepare it again"
    return None


class Records:
    """The examples of one split, in random access over its shards: a `Source`.

    A shard in a bucket is read by array_record's own client; where that does not serve, it is copied to
    `$VQGAN_JAX_CACHE`/records.

    Args:
      folder: what a tool wrote, local or gs://.
      split: its name in the manifest.
      kind: IMAGES or CODES.
      at_least: as in `decode_image`.

    Attributes:
      manifest: the whole of it.
      classes: names of the labels.
      tables: names of other ids by their key, where they are known.

    Raises:
      UserError: see `read_manifest`; no such split; a shard that is missing or of another size.
    """

    def __init__(
        self, folder: str | epath.Path, split: str, *, kind: str = IMAGES, at_least: int | None = None
    ) -> None:
        self.folder, self.split = storage.path(folder), split
        self.manifest = read_manifest(self.folder, kind=kind)
        self._shards = choose(f"{self.folder}: split", split, self.manifest["splits"])["shards"]
        with ThreadPoolExecutor(_THREADS) as pool:
            for fault in pool.map(functools.partial(shard_fault, self.folder, hashed=False), self._shards):
                if fault:
                    raise UserError(fault)
        allow_open_files(len(self._shards))
        self.classes: tuple[str, ...] = tuple(self.manifest["classes"])
        self.tables = {key: tuple(names) for key, names in self.manifest.get("tables", {}).items()}
        self._at_least = at_least
        self._paths = [self.folder / shard["file"] for shard in self._shards]
        self._ends = list(itertools.accumulate(shard["count"] for shard in self._shards))
        self._close()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        """The payload as it was written, with "image" decoded in place of "image_bytes"; arrays are read-only.

        Raises:
          CorruptExample: the bytes were damaged after they were written.
        """
        payload = self.encoded(index)
        if "image_bytes" in payload:
            payload["image"] = decode_image(payload.pop("image_bytes"), self.where(index), at_least=self._at_least)
        return payload

    def encoded(self, index: int) -> Example:
        """The payload exactly as it was written. Raises as `__getitem__` does."""
        shard, position = locate(self._ends, index)
        try:
            return serialization.msgpack_restore(self._reader(shard).read([position])[0])
        except (RuntimeError, ValueError) as error:  # of array_record, which checks a hash; and of msgpack
            raise CorruptExample(self.where(index), " ".join(str(error).split())) from None

    def where(self, index: int) -> str:
        """The path of the shard and the position in it, for errors."""
        shard, position = locate(self._ends, index)
        return f"{self._paths[shard]}[{position}]"

    def _reader(self, shard: int) -> ArrayRecordReader:
        """The reader of a shard, opened when it is first needed; one serves all threads."""
        if (reader := self._readers[shard]) is None:
            with self._lock:
                if (reader := self._readers[shard]) is None:
                    reader = self._readers[shard] = _open_shard(self._paths[shard], self._shards[shard])
        return reader

    def _close(self) -> None:
        self._readers: list[ArrayRecordReader | None] = [None] * len(self._paths)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Neither readers nor locks can be pickled: another process opens its own.
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._close()


def open_records(data: ConfigDict, split: str) -> Records:
    """The source `records`: `config.data.path` is the folder, train_split and val_split name its splits ("": as ours).

    Raises:
      UserError: see `Records`.
    """
    if not data.path:
        raise UserError("config.data.path: name the folder that vqgan_jax.tools.prepare wrote")
    return Records(data.path, data[f"{split}_split"] or split, at_least=decode_at_least(data, split))


def allow_open_files(count: int) -> None:
    """Lifts this process's limit of open files where so many more are coming: array_record keeps every shard open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


@contextlib.contextmanager
def _errors_named(path: epath.Path) -> Iterator[None]:
    """Turns what array_record raises in writing into one line."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be written ({str(error).partition(';')[0]})") from None


def _open_shard(path: epath.Path, shard: Mapping[str, Any]) -> ArrayRecordReader:
    reader = ArrayRecordReader(str(path), _READER, file_reader_buffer_size=_BUFFER)
    if not reader.ok() and storage.is_remote(path):
        local = cache_folder() / "records" / shard["sha256"][:16] / path.name
        if not local.is_file():
            logging.log_first_n(logging.WARNING, "%s: array_record cannot read it in place, so it is copied", 1, path)
            with storage.staged(local) as partial, path.open("rb") as there, partial.open("wb") as here:
                shutil.copyfileobj(there, here, 1 << 24)
        reader = ArrayRecordReader(str(local), _READER, file_reader_buffer_size=_BUFFER)
    return reader
