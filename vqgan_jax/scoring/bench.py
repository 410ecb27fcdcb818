"""What all scores of one call share: devices, the feature network under its preset, LPIPS, seeds and the cache."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax import parallel, storage, weights
from vqgan_jax.config import UserError, choose
from vqgan_jax.convert import networks
from vqgan_jax.evals.features import PRESETS, Extractor, FeatureNet, make_extractor
from vqgan_jax.evals.references import Statistics, cached, collect, open_reference
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.scoring import pictures, result
from vqgan_jax.scoring.fingerprint import fingerprint
from vqgan_jax.train import setup

DEFAULT_PRESET = "adm"  # what published ImageNet scores are made with
SPLITS = ("train", "val")
_LPIPS_FILES = {"vgg16": "vgg", "lpips_vgg": "heads"}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Attributes:
    mesh: of all devices of all hosts.
    batch: pictures at once over all hosts; it divides over the devices.
    seed: of samples and classifiers.
    extract: features under a preset, or None where no feature score is asked for.
    preset_stated: whether a person chose the preset.
    perceptual: LPIPS and its variables, or None.
    perceptual_sha256: of the files that LPIPS comes from, by their keys.
    cache: folder of reference statistics; None for none.
    """

    mesh: Mesh
    batch: int
    seed: int
    extract: Extractor | None = None
    preset_stated: bool = False
    perceptual: tuple[LPIPS, Any] | None = None
    perceptual_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cache: Any | None = None

    def reference(self, where: str, data: setup.Data | None, config: ConfigDict | None) -> Statistics:
        """The statistics of the reference set: "train" or "val", splits of the data set that `config` names, or what
        `open_reference` takes.

        Raises:
          UserError: a split without a data set.
        """
        if where not in SPLITS:
            return open_reference(where, self.extract, cache=self.cache, preset_stated=self.preset_stated)
        if data is None:
            raise UserError(f"--reference={where}: is a split of a data set; name it with --workdir or --config")
        return self.of_split(data, config, where)

    def of_split(self, data: setup.Data, config: ConfigDict, split: str, limit: int = 0) -> Statistics:
        """Statistics of a split as the model sees it (resized and cropped, never mirrored); `limit` examples spread
        out, 0 for all. Kept in the cache."""
        source = getattr(data, split)
        count = min(limit or len(source), len(source))
        identity = result.describe_data(config, split, count) | {"files_sha256": fingerprint(source, config.data)}

        def make() -> Statistics:
            batches = setup.evaluation_batches(self.batch, self.mesh, source, data.val_transform, limit)
            images = pictures.of_batches(batches, self.mesh, self.batch, count)
            keep = self.extract.preset.reference_features
            return collect(images, self.extract, count=count, source=identity, keep=keep, what=f"{split} images")

        return cached(identity, self.extract, make, self.cache)


def open_bench(
    *,
    batch: int,
    seed: int,
    mesh: Mesh | None = None,
    features: bool = False,
    preset: str = "",
    preset_key: str = "--preset",
    inception_weights: str = "",
    flag: str = "--inception_weights",
    net: FeatureNet | None = None,
    lpips: Mapping[str, str] | None = None,
    cache: Any | None = None,
) -> Bench:
    """Loads what the scores asked for need, before anything slow begins.

    Args:
      batch: pictures at once, rounded up to a multiple of the devices.
      seed: of samples and classifiers.
      mesh: of a run; None for one of all devices along `data`.
      features: whether FID and its kin are asked for.
      preset: a name in PRESETS, "" for the default.
      preset_key: that names it, for errors.
      inception_weights: a local file; "" for the cached or downloaded one.
      flag: that names the file, for errors.
      net: another feature network than Inception (tests).
      lpips: {"vgg": FILE, "heads": FILE}, "" for the cached ones; LPIPS is left out where no file is named or cached,
        and None leaves it out always.
      cache: folder of reference statistics.

    Raises:
      UserError: an unknown preset, or weights that cannot be had.
    """
    if mesh is None:
        mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
        batch = -(-batch // mesh.size) * mesh.size
    extract = None
    if features:
        chosen = choose(preset_key, preset or DEFAULT_PRESET, PRESETS)
        net = net or networks.load_inception(weights.fetch("inception", inception_weights, flag=flag))
        extract = make_extractor(net, chosen, mesh, batch // jax.process_count())
    perceptual, digests = _open_lpips(lpips) if lpips is not None else (None, {})
    return Bench(mesh, batch, seed, extract, bool(preset), perceptual, digests, cache)


def _open_lpips(files: Mapping[str, str]) -> tuple[tuple[LPIPS, Any] | None, dict[str, str]]:
    """LPIPS and its variables, and the SHA-256 of its files by their keys."""
    cached = [(weights.cache_folder() / weights.REGISTRY[name].filename).is_file() for name in _LPIPS_FILES]
    if not (any(files.values()) or all(cached)):
        return None, {}
    found = {key: weights.fetch(name, files.get(key), flag=f"--lpips_{key}") for name, key in _LPIPS_FILES.items()}
    digests = {key: storage.sha256(file) for key, file in found.items()}
    return (LPIPS(), networks.load_lpips(found["vgg"], found["heads"])), digests


def statistics_cache() -> Any:
    """Where statistics of references are kept, beside the weights."""
    return storage.path(weights.cache_folder()) / "statistics"


def spread(count: int, of: int) -> np.ndarray:
    """`count` indices spread over `of` examples, int64; as many as there are where these are fewer."""
    return np.linspace(0, of - 1, min(count, of)).astype(np.int64)
