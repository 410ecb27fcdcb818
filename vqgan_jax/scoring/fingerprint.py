"""What tells the pictures of a data set from others under the same path: names, sizes and times of their files."""

import hashlib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from vqgan_jax import parallel, storage
from vqgan_jax.data import scenes
from vqgan_jax.data.source import Source
from vqgan_jax.data.stores import FolderStore, ListStore
from vqgan_jax.evals.pictures import in_threads


def fingerprint(source: Source, data: ConfigDict) -> str:
    """SHA-256 of what a source reads, as `config.data` names it; the first host's, for times differ between copies.

    The files are not read: their relative names, sizes and times of change are hashed, and of the embedded scenes the
    program that draws them. Called by all hosts together.
    """

    def make() -> str:
        if data.source == "scenes":
            return storage.sha256(scenes.__file__)
        digest = hashlib.sha256()
        names, paths = zip(*_files(source, data), strict=True)
        for name, stamp in zip(names, in_threads(_stamp, paths), strict=True):
            digest.update(f"{name}\n{stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    return parallel.of_first_host(make)


def _files(source: Source, data: ConfigDict) -> Iterable[tuple[str, Any]]:
    """(relative name, path) of all that the source may read."""
    store = getattr(source, "store", None)
    if isinstance(store, ListStore):
        return [("", store.file), *((name, store.where(name)) for name in source.names)]
    if isinstance(store, FolderStore):
        return [(name, store.path / name) for name in source.names]
    root = storage.path(store.path if store is not None else data.path)
    if root.is_dir():
        return [(name, root / name) for name in FolderStore(root).names] or [("", root)]
    return [(root.name, next((above for above in (root, *root.parents) if above.is_file()), root))]


def _stamp(path: Any) -> str:
    """Size and time of change; nothing where the file is missing, which reading it will say."""
    try:
        return "{} {}".format(*storage.size_and_time(path))
    except (OSError, ValueError):
        return ""
