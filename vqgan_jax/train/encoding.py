"""Encodes a data set once with the frozen VQGANs, into shards of codes that stage 2 reads in place of pictures.

A record is one example with all its views: every key has the views as its leading axis. Each host encodes shards of its
own on its own devices; a shard is a pure function of what the manifest says, so a killed job goes on at the next one.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from vqgan_jax import parallel, storage
from vqgan_jax.conditioning import EncodedImage
from vqgan_jax.config import UserError, differences, plain
from vqgan_jax.data import records
from vqgan_jax.data.pipeline import Transform, evaluation
from vqgan_jax.data.source import Example
from vqgan_jax.train.setup import Data
from vqgan_jax.transformer import ImageTransformer

Tree = Any
Arrays = dict[str, np.ndarray]

IMAGE_CODES = "codes/image"
CENTER, CENTER_FLIP = "center", "center_flip"
SHARD_EXAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class Mirrored:
    """A transform whose view is mirrored, and with it all that describes the picture."""

    transform: Any  # of data.transforms

    def __call__(self, example: Example, rng: np.random.Generator) -> Arrays:
        view = self.transform.view(example, rng)
        return self.transform.through(view._replace(flip=not view.flip), example)


@dataclasses.dataclass(frozen=True)
class AllViews:
    """An example as each of several transforms makes it, stacked; view v draws from generator v of the example."""

    transforms: tuple[Transform, ...]

    def __call__(self, example: Example, rng: np.random.Generator) -> Arrays:
        rows = [make(example, own) for make, own in zip(self.transforms, rng.spawn(len(self.transforms)), strict=True)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def choose_views(views: str, data: Data) -> tuple[Transform, ...]:
    """The transforms of the training pictures: "center", "center_flip" or "N", that many random ones of the config.

    Raises:
      UserError: another text.
    """
    named = {CENTER: (data.val_transform,), CENTER_FLIP: (data.val_transform, Mirrored(data.val_transform))}
    if views in named:
        return named[views]
    if not views.isdecimal() or int(views) < 1:
        raise UserError(f"--views={views}: write {CENTER}, {CENTER_FLIP}, or a number of random views such as 8")
    return (data.train_transform,) * int(views)


def encoded_parts(model: ImageTransformer) -> tuple[EncodedImage, ...]:
    """What of the model's condition has a VQGAN of its own."""
    return tuple(part for part in model.condition.parts if isinstance(part, EncodedImage))


def codebook_sizes(model: ImageTransformer) -> dict[str, int]:
    """The size of the codebook behind each key of codes."""
    sizes = {part.codes_key: part.vocab_size for part in encoded_parts(model)}
    return {IMAGE_CODES: model.first_stage.codebook_size} | sizes


def cached_keys(model: ImageTransformer) -> tuple[str, ...]:
    """The batch keys that stand for the pictures: the codes, and what a condition without a VQGAN is made of."""
    others = (part for part in model.condition.parts if not isinstance(part, EncodedImage))
    return (*codebook_sizes(model), *(key for part in others for key in part.keys))


def describe(
    config: ConfigDict, model: ImageTransformer, stages: Mapping[str, str], data: Data, views: str
) -> dict[str, Any]:
    """What decides every code: the manifest without its shards. Equal descriptions mean equal codes.

    Args:
      config: the whole config.
      model: encodes.
      stages: hashes of the VQGANs by name.
      data: the data set.
      views: see `choose_views`.
    """
    unimportant = ("threads", "processes", "max_corrupt_share")
    return plain(
        {
            "kind": records.CODES,
            "keys": cached_keys(model),
            "classes": data.train.classes,
            "stages": dict(stages),
            "grid": model.config.grid,
            "codebook_sizes": codebook_sizes(model),
            "dtype": config.dtype,
            "views": views,
            "seed": config.seed if views.isdecimal() else 0,
            "examples": {"train": len(data.train), "val": len(data.val)},
            "shard_examples": SHARD_EXAMPLES,
            "data": {name: value for name, value in plain(config.data).items() if name not in unimportant},
        }
    )


def is_finished(folder: epath.Path, described: Mapping[str, Any], *, replace: bool = False) -> bool:
    """Whether a folder holds all the codes of this description; False where it holds some of them or nothing.

    Args:
      folder: local or gs://.
      described: see `describe`.
      replace: answer False where it holds other codes.

    Raises:
      UserError: it holds other codes, and they are not to be replaced.
    """
    for name in (records.MANIFEST, records.UNFINISHED):
        if (folder / name).exists():
            found = _differences(folder, name, described)
            if found and not replace:
                raise UserError(f"{folder}: holds other codes: {'; '.join(found[:3])}. Name another folder")
            return not found and name == records.MANIFEST
    return False


def _differences(folder: epath.Path, name: str, described: Mapping[str, Any]) -> list[str]:
    theirs = records.read_manifest(folder, kind=records.CODES, name=name)
    return differences(described, {key: theirs[key] for key in theirs if key not in ("format", "splits")})


def write_codes(
    folder: epath.Path,
    described: Mapping[str, Any],
    *,
    model: ImageTransformer,
    frozen: Tree,
    data: Data,
    batch: int,
    threads: int,
    max_corrupt_share: float,
    replace: bool = False,
) -> None:
    """Encodes both splits, or what is still missing of them. All hosts call it together; the folder is common to them.

    Args:
      folder: local or gs://.
      described: see `describe`; `views` and `seed` in it are those of the training split, "val" has the centre alone.
      model: encodes.
      frozen: variables of the frozen networks by name, on every host.
      data: the data set.
      batch: pictures encoded at once on each host, about.
      threads: reading threads.
      max_corrupt_share: share of unreadable training examples above which the codes are refused.
      replace: remove other codes that the folder holds.

    Raises:
      UserError: the folder holds other codes, nothing or too little of a split can be read.
    """
    transforms = {"train": choose_views(described["views"], data), "val": (data.val_transform,)}
    if is_finished(folder, described, replace=replace):
        return
    _sync("looked for codes")
    if jax.process_index() == 0:
        _begin(folder, described)
    _sync("began to encode")
    sources = {"train": data.train, "val": data.val}
    shards = [shard for split, source in sources.items() for shard in _shards(split, len(source))]
    entries = folder / "entries"  # one small file a shard that is done
    mine = [s for s in shards[jax.process_index() :: jax.process_count()] if _entry(folder, s) is None]
    encoder = _Encoder(model, frozen, batch, threads, described["seed"])
    with tqdm(
        total=sum(len(shard.part) for shard in mine),
        desc=f"encode to {folder}",
        unit="image",
        disable=jax.process_index() > 0 or not mine,
    ) as bar:
        for shard in mine:
            examples = encoder.encode(sources[shard.split], AllViews(transforms[shard.split]), shard.part, bar.update)
            storage.write_json(entries / f"{shard.file}.json", records.write_shard(folder / shard.file, examples))
    _sync("encoded")
    manifest = {**described, "splits": {split: _split(folder, shards, split) for split in sources}}
    for split, source in sources.items():
        lost, allowed = len(source) - manifest["splits"][split]["count"], max_corrupt_share if split == "train" else 1
        if lost == len(source) or lost > allowed * len(source):
            raise UserError(
                f"{lost} of {len(source)} examples of the split '{split}' cannot be read; mend the files and remove "
                f"{folder}, or raise config.data.max_corrupt_share ({max_corrupt_share})"
            )
    _sync("read the entries")
    if jax.process_index() == 0:
        records.write_manifest(folder, manifest)
        (folder / records.UNFINISHED).unlink(missing_ok=True)
        entries.rmtree()
    _sync("wrote the codes")


@dataclasses.dataclass(frozen=True)
class _Shard:
    split: str
    file: str
    part: range


def _shards(split: str, examples: int) -> list[_Shard]:
    """A split's shards: equal runs of its examples, in their order."""
    count = math.ceil(examples / SHARD_EXAMPLES)
    parts = (range(k * SHARD_EXAMPLES, min((k + 1) * SHARD_EXAMPLES, examples)) for k in range(count))
    return [_Shard(split, f"{split}-{k:05d}-of-{count:05d}.arrayrecord", part) for k, part in enumerate(parts)]


def _begin(folder: epath.Path, described: Mapping[str, Any]) -> None:
    """Leaves in the folder what this job may go on with, and says what it will hold."""
    for name in (records.MANIFEST, records.UNFINISHED):
        if (folder / name).exists() and _differences(folder, name, described):
            folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)
    records.write_manifest(folder, {**described, "splits": {}}, name=records.UNFINISHED)


def _entry(folder: epath.Path, shard: _Shard) -> dict[str, Any] | None:
    """What the manifest will say of a shard; None where it is not done."""
    path = folder / "entries" / f"{shard.file}.json"
    if not path.exists():
        return None
    entry = json.loads(path.read_text())
    return None if records.shard_fault(folder, entry, hashed=False) else entry


def _split(folder: epath.Path, shards: list[_Shard], split: str) -> dict[str, Any]:
    done = [_entry(folder, shard) for shard in shards if shard.split == split]
    return {"count": sum(entry["count"] for entry in done), "shards": done}


def make_encoder(model: ImageTransformer) -> Callable[[Tree, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """The jitted `(frozen, batch of pictures) -> codes [b, h, w] by batch key`."""
    parts = encoded_parts(model)

    @jax.jit
    def encode(frozen: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        made = {IMAGE_CODES: model.to_grid(model.codes(frozen, batch))}
        for part in parts:
            made[part.codes_key] = part.tokens(frozen, batch).reshape(-1, *part.grid)
        return made

    return encode


class _Encoder:
    """Turns examples into records on the devices of this host."""

    def __init__(self, model: ImageTransformer, frozen: Tree, batch: int, threads: int, seed: int):
        self._mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
        self._frozen = parallel.put_tree(frozen, self._mesh)
        self._batch, self._threads, self._seed = batch, threads, seed
        self._dtypes = {key: np.min_scalar_type(size - 1) for key, size in codebook_sizes(model).items()}
        self._pictures = {model.first_stage.config.input_key, *(part.key for part in encoded_parts(model))}
        self._step = make_encoder(model)

    def encode(self, source: Any, views: AllViews, part: range, advance: Any) -> Iterator[Arrays]:
        """The records of the readable ones among the examples `part`, in order.

        Args:
          source: the examples.
          views: what each is encoded as.
          part: indices of a shard's examples.
          advance: told how many examples are done.
        """
        parts = math.ceil(self._batch / len(views.transforms) / self._mesh.size)
        batch = parts * self._mesh.size
        rows = parallel.host_rows(self._mesh, batch)
        batches = evaluation(
            source, rows=rows, global_batch=batch, transform=views, part=part, seed=self._seed, threads=self._threads
        )
        waiting = None  # the devices encode a batch while the host writes the one before
        for batch_rows in batches:
            started = self._start(batch_rows)
            yield from self._finish(waiting, advance)
            waiting = started
        yield from self._finish(waiting, advance)
        for name, reason in batches.unreadable.items():
            logging.warning("%s cannot be read (%s): left out", name, reason)

    def _start(self, rows: Arrays) -> tuple[dict[str, jax.Array], Arrays]:
        """Hands the pictures [b, v, ...] to the devices; what is no picture stays here."""
        pictures = {key: x.reshape(-1, *x.shape[2:]) for key, x in rows.items() if key in self._pictures}
        batch = parallel.put_batch(pictures, self._mesh, len(next(iter(pictures.values()))))
        with jax.set_mesh(self._mesh):
            return self._step(self._frozen, batch), {k: x for k, x in rows.items() if k not in self._pictures}

    def _finish(self, started: tuple[dict[str, jax.Array], Arrays] | None, advance: Any) -> Iterator[Arrays]:
        if started is None:
            return
        codes, kept = started
        valid = kept.pop("valid")
        for key, ids in codes.items():
            kept[key] = np.asarray(ids, self._dtypes[key]).reshape(len(valid), -1, *ids.shape[1:])
        for row in np.flatnonzero(valid):
            yield pack({key: values[row] for key, values in kept.items()})
        advance(int(valid.sum()))


def pack(record: Arrays) -> Arrays:
    """A record as it is written: coordinates [v, h, w, 2], of which every row and column is equal, as both alone."""
    if "coords" not in record:
        return record
    coords = record["coords"]
    axes = {"coords/y": coords[:, :, 0, 0], "coords/x": coords[:, 0, :, 1]}
    return {key: value for key, value in record.items() if key != "coords"} | axes


def unpack(record: Mapping[str, Any], key: str, view: int) -> np.ndarray:
    """One key of one view of a record, as a batch has it. Raises KeyError where the record lacks it."""
    if key == "coords":
        y, x = record["coords/y"][view], record["coords/x"][view]
        return np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
    value = record[key][view]
    return value.astype(np.int32) if key.startswith("codes/") else value


def _sync(what: str) -> None:
    multihost_utils.sync_global_devices(what)
