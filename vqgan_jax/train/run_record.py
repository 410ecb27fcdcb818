"""What ran: the config, the command, the source's revision and changes, and the versions, written at every start."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import vqgan_jax
from vqgan_jax import storage
from vqgan_jax.config import plain

MAX_DIFF_BYTES = 1 << 20
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_run_record(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes workdir/config.json, workdir/run/<k>.json and, where the source was changed, workdir/run/<k>.diff.

    k counts the starts from 0. Processes other than 0 write nothing. The host's name is left out on purpose.

    Args:
      workdir: the run's folder, made where it is missing.
      config: the run's config.
    """
    if jax.process_index() != 0:
        return
    runs = storage.path(workdir) / "run"
    storage.write_json(storage.path(workdir) / "config.json", plain(config))
    start = sum(file.suffix == ".json" for file in storage.files(runs))
    git, diff = git_state(Path(vqgan_jax.__file__).resolve().parent.parent)
    if diff:
        storage.write_bytes(runs / f"{start}.diff", diff)
    versions = {"python": platform.python_version(), "vqgan_jax": vqgan_jax.__version__}
    devices = jax.devices()
    record = {
        "argv": sys.argv,
        "git": git,
        "versions": versions | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }
    storage.write_json(runs / f"{start}.json", record)


def git_state(root: Path) -> tuple[dict[str, Any] | str, bytes]:
    """The state of the source tree `root`.

    Returns:
      ({"revision", "dirty", "diff_truncated"}, the diff against the revision, at most MAX_DIFF_BYTES of it). Where
      `root` is not itself the top of a git tree with a commit, the revision that launch/Dockerfile was given, or
      "no git", and b"".
    """

    def git(*args: str) -> bytes:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout

    elsewhere = os.environ.get("VQGAN_JAX_REVISION") or "no git"
    try:
        if Path(git("rev-parse", "--show-toplevel").decode().strip()).resolve() != root.resolve():
            return elsewhere, b""
        revision = git("rev-parse", "HEAD").decode().strip()
        dirty = bool(git("status", "--porcelain").strip())
        diff = git("diff", "HEAD", "--no-ext-diff")
    except (OSError, subprocess.SubprocessError):
        return elsewhere, b""
    state = {"revision": revision, "dirty": dirty, "diff_truncated": len(diff) > MAX_DIFF_BYTES}
    return state, diff[:MAX_DIFF_BYTES]
