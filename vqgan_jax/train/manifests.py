"""Manifests: what vouches for a checkpoint, a SHA-256 of each of its files, and says how good it is.

WORKDIR/checkpoints/STEP/manifest.json is written last. A folder without one is a save that was cut short.
"""

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from etils import epath

from vqgan_jax import storage
from vqgan_jax.config import UserError

MANIFEST = "manifest.json"
UNSEALED = "it has no manifest: the run was killed during the save"
_OWN = "sha256"  # of the manifest itself
T = TypeVar("T")
_logger = logging.getLogger(__name__)


def best_first(manifests: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Steps that hold the metric their newest manifest ranks by, the best first, the newer first among equals."""
    if not manifests:
        return []
    metric, mode = (manifests[max(manifests)][key] for key in ("best_metric", "best_mode"))
    sign = -1 if mode == "max" else 1
    scores = {step: sign * m["metrics"][metric] for step, m in manifests.items() if metric in m["metrics"]}
    return sorted(scores, key=lambda step: (scores[step], -step))


def steps_in(directory: epath.Path) -> list[int]:
    """The steps that have a folder, ascending."""
    try:
        return sorted(int(folder.name) for folder in directory.iterdir() if folder.name.isdigit())
    except FileNotFoundError:
        return []


def read_all(directory: epath.Path) -> dict[int, dict[str, Any]]:
    """Every readable manifest by its step, ascending."""
    found = {}
    for step in steps_in(directory):
        try:
            found[step] = json.loads((directory / str(step) / MANIFEST).read_text())
        except (OSError, ValueError):
            continue
    return found


def write(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Hashes every file of a step folder and seals it with what `manifest` says besides."""
    files = storage.files(folder)
    with ThreadPoolExecutor(4) as pool:  # hashing frees the interpreter lock
        digests = pool.map(lambda file: storage.retried(lambda: storage.sha256(file)), files)
        named = {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, digests, strict=True)}
    sign(folder, {**manifest, "files": named})


def sign(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest, whose files are hashed already, with its own hash."""
    storage.retried(lambda: storage.write_json(folder / MANIFEST, {**manifest, _OWN: _digest(manifest)}))


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, for it vouches for all files but itself."""
    said = {name: value for name, value in manifest.items() if name != _OWN}
    return storage.digest(said)


def fault(folder: epath.Path) -> str:
    """What is wrong with a step folder, "" for nothing. Raises UserError or StorageError where a bucket cannot say."""
    if not (folder / MANIFEST).exists():
        return UNSEALED
    try:
        manifest = json.loads(_read(folder / MANIFEST, lambda file: file.read_text()))
        files = manifest["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} cannot be read"
    if manifest.get(_OWN, _digest(manifest)) != _digest(manifest):  # the first versions wrote none
        return f"{MANIFEST} has changed since it was written"

    def check(name: str) -> str:
        try:
            same = _read(folder / name, storage.sha256) == files[name]
            return "" if same else f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or first_line(error)})"

    with ThreadPoolExecutor(4) as pool:
        return next(filter(None, pool.map(check, files)), "")


def _read(file: epath.Path, read: Callable[[epath.Path], T]) -> T:
    """What `read` makes of a file. A disk that cannot be read has lost it; a bucket that does not answer has not."""
    if not storage.is_remote(file):
        return read(file)
    try:
        return storage.retried(lambda: read(file))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from error


def move_aside(folder: epath.Path, fault: str) -> None:
    """Renames a step folder, so that its step can be saved again."""
    aside, tries = folder.parent / f"{folder.name}.damaged", 1
    while aside.exists():
        tries += 1
        aside = folder.parent / f"{folder.name}.damaged.{tries}"
    folder.rename(aside)
    _logger.warning("%s is damaged (%s): moved to %s, falling back to the one before", folder, fault, aside.name)


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
