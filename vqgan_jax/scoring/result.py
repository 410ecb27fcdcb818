"""What a score is: its numbers, and beside them all that defines them, as JSON and as one line."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

import vqgan_jax
from vqgan_jax import cli, storage
from vqgan_jax.config import UserError, plain
from vqgan_jax.evals.features import Extractor

DEFINITION = "definition"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def versions() -> dict[str, str]:
    """Of Python, this package and what computes."""
    ours = {"python": platform.python_version(), "vqgan_jax": vqgan_jax.__version__}
    return ours | {name: importlib.metadata.version(name) for name in _PACKAGES}


def describe_features(extract: Extractor) -> dict[str, Any]:
    """The preset and the network of feature scores."""
    return {
        "preset": extract.preset.name,
        "network": {"name": extract.net.name, "sha256": extract.net.sha256},
    }


def describe_data(config: ConfigDict, split: str, examples: int) -> dict[str, Any]:
    """A split of a config's data set; how it is read in parallel does not define it."""
    data = {name: value for name, value in plain(config.data).items() if name not in ("threads", "processes")}
    if data.get("path"):
        data["path"] = str(storage.absolute(data["path"]))
    return {"data": data, "split": split, "images": examples}


def describe_checkpoint(record: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """Which parameters were scored: the run's step, where it has one, and the SHA-256 of all their names and bytes."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: str(item[0])):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    known = {name: record[name] for name in ("kind", "step", "imported") if name in record}
    return known | {"parameters_sha256": digest.hexdigest()}


def define(**parts: Any) -> dict[str, Any]:
    """The `definition` of a result: the given parts that are there, the versions and the devices."""
    device = jax.devices()[0]
    given = {name: part for name, part in parts.items() if part is not None}
    return {**given, "versions": versions(), "devices": f"{jax.device_count()} x {device.device_kind}"}


def check_out(out: str) -> epath.Path:
    """The file that --out names. Raises UserError where it cannot be written."""
    path = storage.path(out)
    if path.is_dir():
        raise UserError(f"--out={out}: is a folder; name the JSON file to write")
    cli.check_workdir(str(path.parent), "--out")
    return path


def publish(result: dict[str, Any], out: str | os.PathLike) -> dict[str, Any]:
    """Writes a result whole or not at all, says it in one line, and returns it; the first host alone writes.

    Raises:
      UserError: it cannot be written.
    """
    if jax.process_index() == 0:
        try:
            storage.write_json(out, result)
        except OSError as error:
            raise UserError(f"--out={out}: cannot be written ({error.strerror or error})") from None
        print(line(result), flush=True)
    return result


def line(result: Mapping[str, Any]) -> str:
    """A result in one line: its figures, the preset, and how many images stand behind it."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, float))
    definition = result.get(DEFINITION, {})
    preset = f" [preset {definition['preset']}]" if "preset" in definition else ""
    counts = [result[name] for name in ("samples", "reference_samples") if name in result]
    behind = f" [{' samples against '.join(map(str, counts))} images]" if len(counts) == 2 else ""
    return figures + preset + behind
