"""What is known of a set of pictures under one preset (`Statistics`), and where it comes from: pictures, or the
statistics files of this and other tools. Statistics of different presets or networks are never compared."""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.evals import distances
from vqgan_jax.evals.features import Extractor, Features, Images
from vqgan_jax.evals.moments import Gaussian, Moments, all_hosts, gather
from vqgan_jax.evals.pictures import Pictures, open_npz, open_pictures
from vqgan_jax.evals.progress import watched

KEEP = 50_000  # feature vectors of samples that precision, recall and KID use at most: the count that papers draw
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of one set.

    Attributes:
      preset: name of the preset it was made under.
      net: SHA-256 of the network's weights; "" where the file does not say.
      source: what the set is, plain data (as in the result's JSON).
      count: pictures; None where the file does not say.
      pool: of the pooled features.
      spatial: of the spatial features (sFID), or None.
      features: pooled features of all pictures, or of a random part, float32 [m, d] (precision, recall, KID), or None.
      score: Inception Score of the set as (mean, standard deviation over splits), or None.
      unverified: whether the preset is what a person said of a file that does not say it.
    """

    preset: str
    net: str
    source: dict[str, Any]
    count: int | None
    pool: Gaussian
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    score: tuple[float, float] | None = None
    unverified: bool = False

    def save(self, path: Any) -> None:
        """Writes an .npz, whole or not at all; `mu` and `sigma` in it are as pytorch-fid reads them."""
        facts = ("preset", "net", "source", "count", "score", "unverified")
        facts = {"format": _FORMAT} | {name: getattr(self, name) for name in facts}
        arrays = {"mu": self.pool.mean, "sigma": self.pool.covariance, "facts": np.array(json.dumps(facts))}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.features is not None:
            arrays["features"] = self.features
        storage.save_npz(path, **arrays)

    @classmethod
    def load(cls, path: Any) -> "Statistics":
        """Reads what `save` wrote. Raises UserError: a damaged file, or one of a later version."""
        arrays = _load(path)
        facts = json.loads(str(arrays["facts"]))
        if facts.pop("format") != _FORMAT:
            raise UserError(f"{path}: statistics of another version of this program; make them again")
        score = facts.pop("score")
        return cls(
            pool=Gaussian(arrays["mu"], arrays["sigma"]),
            spatial=Gaussian(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None,
            features=arrays.get("features"),
            score=tuple(score) if score else None,
            **facts,
        )


def _load(path: Any, names: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file, as far as they are there; all of them if none is named."""
    try:
        with storage.path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays if not names or name in names}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


class _Collector:
    """Gathers Statistics from Features, on each host from its own."""

    def __init__(self, extract: Extractor, count: int, keep: int):
        if count < 2:
            raise UserError(f"statistics of {count} images: a covariance needs at least 2")
        dims = extract.net.dims()
        pool = dims["pool"]
        self._extract, self._count = extract, count
        self._pool, self._spatial = Moments.empty(pool), Moments.empty(dims["spatial"])
        self._score = distances.InceptionScore(extract.preset.splits(count), dims["logits"])
        self._seen = np.zeros(count, bool)
        self._kept = np.zeros(count, bool)
        self._kept[np.random.RandomState(0).permutation(count)[:keep]] = True
        self._features, self._indices = [np.zeros((0, pool), np.float32)], [np.zeros(0, np.int64)]

    def add(self, features: Features) -> None:
        """Adds what the network says of some pictures."""
        indices = features.indices
        inside = indices.min() >= 0 and indices.max() < self._count
        if not inside or self._seen[indices].any() or len(np.unique(indices)) < len(indices):
            raise ValueError(f"indices of {self._count} pictures: each of 0..{self._count - 1} comes once")
        self._seen[indices] = True
        self._pool.add(features.pool)
        self._spatial.add(features.spatial)
        self._score.add(features.logits, indices)
        kept = self._kept[indices]
        self._features.append(features.pool[kept])
        self._indices.append(indices[kept])

    def finish(self, source: Mapping[str, Any]) -> Statistics:
        """The statistics of the pictures of all hosts."""
        pool, spatial, score = all_hosts(self._pool), all_hosts(self._spatial), self._score.all_hosts()
        if pool.count != self._count:
            raise UserError(f"{dict(source)}: {pool.count} pictures came, {self._count} were expected")
        return Statistics(
            preset=self._extract.preset.name,
            net=self._extract.net.sha256,
            source=dict(source),
            count=self._count,
            pool=pool.gaussian(),
            spatial=spatial.gaussian(),
            features=self._gather_features() if self._kept.any() else None,
            score=score,
        )

    def _gather_features(self) -> np.ndarray:
        """The kept features of all hosts, in the order of their indices."""
        features, indices = np.concatenate(self._features), np.concatenate(self._indices)
        most = int(gather(np.array(len(indices))).max())
        room = most - len(indices)
        features = gather(np.pad(features, [(0, room), (0, 0)])).reshape(-1, features.shape[1])
        indices = gather(np.pad(indices, (0, room), constant_values=-1)).reshape(-1)
        order = np.argsort(indices, kind="stable")
        return features[order[indices[order] >= 0]]


def numbered(batches: Iterable[np.ndarray], start: int = 0) -> Images:
    """Numbers the pictures of plain batches uint8 [n, h, w, 3] from `start` on."""
    for batch in batches:
        yield batch, np.arange(start, start + len(batch))
        start += len(batch)


def collect(
    images: Images, extract: Extractor, *, count: int, source: Mapping[str, Any], keep: int = KEEP, what: str = "images"
) -> Statistics:
    """Statistics of `count` pictures with the indices 0..count-1, each handed in once, by one host.

    Called by all hosts together. Memory does not grow with the pictures beyond the `keep` feature vectors, those of
    random pictures where there are more. The Inception Score depends on the order of the indices, all else does not.
    `what` is how the bar calls them.

    Raises:
      UserError: fewer pictures came.
    """
    collector = _Collector(extract, count, keep)
    for features in watched(extract(images), count, what, rows=lambda features: len(features.indices)):
        collector.add(features)
    return collector.finish(source)


def collect_pairs(
    pairs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    extract: Extractor,
    *,
    count: int,
    source: Mapping[str, Any],
    keep: int = KEEP,
) -> tuple[Statistics, Statistics]:
    """Statistics of originals and of their reconstructions in one pass, as `collect`: rFID is
    `compare(reconstructions, originals)["fid"]`.

    Args:
      pairs: originals uint8 [n, h, w, 3], reconstructions likewise, indices [n].
      extract: the extractor.
      count: of the originals.
      source: what they are.
      keep: feature vectors kept of either; 0 for none, and no precision, recall and KID.

    Returns:
      (originals, reconstructions).
    """
    both = [_Collector(extract, count, keep) for _ in range(2)]

    def images() -> Images:
        for originals, reconstructions, indices in pairs:
            yield np.concatenate([originals, reconstructions]), np.concatenate([2 * indices, 2 * indices + 1])

    for features in extract(images()):
        for odd, collector in enumerate(both):
            rows = features.indices % 2 == odd
            if rows.any():
                arrays = (features.indices // 2, features.pool, features.spatial, features.logits)
                collector.add(Features(*(x[rows] for x in arrays)))
    originals, reconstructions = both
    return originals.finish(source), reconstructions.finish({"reconstructions of": dict(source)})


def cached(
    identity: Mapping[str, Any], extract: Extractor, make: Callable[[], Statistics], folder: Any | None
) -> Statistics:
    """What `make()` returns, or returned before for the same identity, preset and network. Called by all hosts.

    Args:
      identity: what defines the statistics beside preset and network: plain data with digests of the pictures or of
        where they come from, and their count.
      extract: the extractor that `make` uses.
      make: collects them.
      folder: where they are kept; None for nowhere.
    """
    if folder is None:
        return make()
    whole = {"format": _FORMAT, "preset": extract.preset.name, "net": extract.net.sha256, **identity}
    file = storage.path(folder) / f"{extract.preset.name}-{storage.digest(whole)[:32]}.npz"
    if gather(np.array(int(file.exists()))).all():
        logging.info("statistics from %s", file)
        return Statistics.load(file)
    made = make()
    for turn in range(2):  # the first host writes, then those that do not see its file
        if (turn or jax.process_index() == 0) and not file.exists():
            made.save(file)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{file.name} {turn}")
    return made


def open_reference(
    where: str,
    extract: Extractor,
    *,
    cache: Any | None,
    preset_stated: bool,
    keep: int | None = None,
    key: str = "--reference",
) -> Statistics:
    """Statistics of a folder or archive of pictures, or an .npz: of pictures (`arr_0`), an ADM reference batch (`mu`,
    `sigma`, `mu_s`, `sigma_s`, `arr_0`), pytorch-fid's (`mu`, `sigma`) or what `Statistics.save` wrote.

    Called by all hosts together.

    Args:
      where: local or gs://.
      extract: the extractor, which holds preset and network.
      cache: folder that keeps what was computed from pictures; None for none.
      preset_stated: whether a person chose the preset; bare `mu` and `sigma` do not say theirs.
      keep: feature vectors kept; None for as many as the preset compares a reference by.
      key: the flag that names it, for errors.

    Raises:
      UserError: nothing there, an unknown or damaged file, or one made under another preset.
    """
    keep = extract.preset.reference_features if keep is None else keep
    path = storage.path(where)
    if path.suffix != ".npz":
        return _of_pictures(open_pictures(where, key=key), where, extract, cache, keep)
    names = _names(path, f"{key}={where}")
    if "facts" in names:
        statistics = Statistics.load(path)
        _check_comparable(extract.preset.name, extract.net.sha256, statistics)
        return statistics
    if not {"mu", "sigma"} <= names:
        if "arr_0" in names:
            return _of_pictures(open_npz(where, "arr_0", key=key), where, extract, cache, keep)
        raise UserError(
            f"{key}={where}: holds {', '.join(sorted(names))}; pictures are 'arr_0', statistics 'mu', 'sigma'"
        )
    return _of_another_tool(where, names, extract, cache, keep, preset_stated, key)


def _names(path: Any, named: str) -> set[str]:
    """The arrays of an .npz file."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{named}: is no .npz file that can be read ({reason})") from None


def _of_pictures(pictures: Pictures, where: str, extract: Extractor, cache: Any | None, keep: int) -> Statistics:
    identity = {**pictures.identity, "count": pictures.count, "keep": keep}
    source = {"path": where, **pictures.identity}

    def make() -> Statistics:
        images = pictures.read()
        return collect(images, extract, count=pictures.count, source=source, keep=keep, what=where)

    made = cached(identity, extract, make, cache)
    return dataclasses.replace(made, source=source)  # the same pictures may have been cached from another place


def _of_another_tool(
    where: str, names: set[str], extract: Extractor, cache: Any | None, keep: int, preset_stated: bool, key: str
) -> Statistics:
    """Statistics that do not say their preset: ADM's format is its tool's, of the bare ones a person has to know."""
    preset, adm = extract.preset.name, {"mu_s", "sigma_s"} <= names
    if adm and preset != "adm":
        raise UserError(f"{key}={where}: is a reference batch of ADM; use --preset=adm, not {preset}")
    if not (adm or preset_stated):
        raise UserError(f"{key}={where}: does not say how its 'mu' and 'sigma' were made; name the tool with --preset")
    arrays = {name: np.asarray(x, np.float64) for name, x in _load(where, ("mu", "sigma", "mu_s", "sigma_s")).items()}
    for suffix, output in (("", "pool"), ("_s", "spatial"))[: 1 + adm]:
        dim = extract.net.dims()[output]
        if [arrays[f"{name}{suffix}"].shape for name in ("mu", "sigma")] != [(dim,), (dim, dim)]:
            raise UserError(f"{key}={where}: 'mu{suffix}', 'sigma{suffix}' are not of the network's {dim} features")
    features = None
    if "arr_0" in names:
        features = _of_pictures(open_npz(where, "arr_0", key=key), where, extract, cache, keep).features
    return Statistics(
        preset=preset,
        net="",
        source={"path": where, "sha256": storage.sha256(where)},
        count=None,
        pool=Gaussian(arrays["mu"], arrays["sigma"]),
        spatial=Gaussian(arrays["mu_s"], arrays["sigma_s"]) if adm else None,
        features=features,
        unverified=not adm,
    )


def compare(samples: Statistics, reference: Statistics) -> dict[str, float]:
    """The scores of samples against a reference, as far as both are known; pure NumPy, minutes for 50,000 samples.

    Returns:
      fid, sfid, precision, recall, kid_mean, kid_std, is_mean, is_std; samples, reference_samples: the counts, as far
      as they are known; samples_compared, reference_compared: feature vectors behind precision, recall and KID;
      kid_subset_size; and, each 1.0 and only where it holds, rank_deficient (too few pictures for the covariance: fid
      is biased upwards and compares with nothing of another count), reference_unverified (of either: see Statistics).

    Raises:
      UserError: other presets, other networks or other numbers of features.
    """
    _check_comparable(samples.preset, samples.net, reference)
    sizes = [len(side.pool.mean) for side in (samples, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(f"the samples' statistics are of {sizes[0]} features, the reference's of {sizes[1]}")
    return dict(_scores(samples, reference))


def _check_comparable(preset: str, net: str, reference: Statistics) -> None:
    if preset != reference.preset:
        raise UserError(
            f"the reference's statistics were made under the preset {reference.preset}, the samples' would be under "
            f"{preset}: give both the same --preset"
        )
    if net and reference.net and net != reference.net:
        raise UserError(
            f"the reference's statistics were made with other weights (SHA-256 {reference.net[:12]}...) than these "
            f"({net[:12]}...): make them again"
        )


def _scores(samples: Statistics, reference: Statistics) -> Iterator[tuple[str, float]]:
    yield "fid", distances.frechet(samples.pool, reference.pool)
    if samples.spatial is not None and reference.spatial is not None:
        yield "sfid", distances.frechet(samples.spatial, reference.spatial)
    if samples.score is not None:
        yield from zip(("is_mean", "is_std"), samples.score, strict=True)
    theirs, ours = reference.features, samples.features
    if theirs is not None and ours is not None:
        if min(len(theirs), len(ours)) > distances.NEIGHBOURS:
            yield from zip(("precision", "recall"), distances.precision_recall(theirs, ours), strict=True)
        yield from zip(("kid_mean", "kid_std"), distances.kid(ours, theirs), strict=True)
        yield "kid_subset_size", float(min(distances.KID_SUBSET_SIZE, len(theirs), len(ours)))
        yield "samples_compared", float(len(ours))
        yield "reference_compared", float(len(theirs))
    if samples.count is not None:
        yield "samples", float(samples.count)
    if reference.count is not None:
        yield "reference_samples", float(reference.count)
    if any(distances.rank_deficient(side.pool, side.count) for side in (samples, reference)):
        yield "rank_deficient", 1.0
    if reference.unverified or samples.unverified:
        yield "reference_unverified", 1.0
