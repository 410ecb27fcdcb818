"""Writes any source of examples as ArrayRecord shards with a manifest: one pass over many small files, then fast reads.

A picture keeps the bytes of its file, so nothing is lost; what describes it is kept as the source gives it. Killed and
started again it goes on where it stood, and ends with the same bytes.
"""

import argparse
import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from vqgan_jax import storage
from vqgan_jax.config import UserError, differences, plain
from vqgan_jax.data import records
from vqgan_jax.data.scenes_source import cores
from vqgan_jax.data.source import CorruptExample, Example, Source
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.transforms import ANTIALIASED, NO_ANTIALIAS

SPLITS = ("train", "val")
SHARD_EXAMPLES, MOST_SHARDS = 1024, 256  # a split; the limit, because a reader keeps every shard open
# The fields of config.data that lie between an example and a batch: the same records serve any of them.
_LOADING = {"resize", "resize_to", "crop", "crop_scale", "flip", "max_boxes", "threads", "processes"}
_LOADING |= {"max_corrupt_share"}
_THREADS = 8  # a worker: reading waits for the disk or the bucket, and decoding frees the interpreter
_TASK = 64  # examples that they share out


class Picture(NamedTuple):
    """How pictures are kept.

    Fields:
      side: what the short side is resized to, once; 0 keeps the bytes of the file. No picture is enlarged.
      filter: one of ANTIALIASED.
      jpeg: quality of a resized picture as JPEG without colour subsampling; 0 is PNG, without loss.
    """

    side: int = 0
    filter: str = "bilinear"  # as configs resize
    jpeg: int = 0


class Shard(NamedTuple):
    """One file: the examples start to stop - 1 of a split."""

    file: str
    split: str
    start: int
    stop: int


def prepare(
    data: ConfigDict, out: str, *, splits: Sequence[str], picture: Picture, shards: int, workers: int
) -> dict[str, Any]:
    """Writes splits of the source that `data` names, and their manifest; finished shards of a killed run are kept.

    Args:
      data: `config.data`.
      out: folder to write, local or gs://.
      splits: of SPLITS.
      picture: how pictures are kept.
      shards: files a split; 0 decides by the number of examples.
      workers: processes.

    Returns:
      the manifest, as `records.write_manifest` takes it; and "settings", what the records were made from and how, and
      in each split "corrupt", path and reason of the examples that could not be read and are left out.

    Raises:
      UserError: what opening the source raises; a folder that holds other things or was made with other settings; no
        example of a split can be read; a worker died.
    """
    data = ConfigDict(data)
    made_from = {key: value for key, value in plain(data).items() if key not in _LOADING}
    data.resize = NO_ANTIALIAS  # for which sources decode JPEGs at their full size
    sources = {split: open_source(data, split) for split in splits}
    folder = storage.make_folder(out, f"--out={out}")
    plan = [shard for split, source in sources.items() for shard in _plan(split, len(source), shards)]
    files = {split: _digest([str(len(source)), *getattr(source, "names", ())]) for split, source in sources.items()}
    settings = {"data": made_from, "picture": picture._asdict(), "files": files, "shards": len(plan)}
    if (finished := _found(folder, records.MANIFEST, settings)) is not None:
        for shard in (shard for split in finished["splits"].values() for shard in split["shards"]):
            if fault := records.shard_fault(folder, shard, hashed=False):
                raise UserError(f"{fault}, or delete the folder to prepare all of it anew")
        return finished
    done = _finished_shards(folder, settings)
    if not storage.is_remote(folder):
        for path in folder.glob(".*.tmp.*.arrayrecord"):  # what a killed run was writing
            path.unlink()
    progress = {"kind": records.IMAGES, "settings": settings, "done": done}
    for file, made in _write_all(_Writer(sources, folder, picture), [s for s in plan if s.file not in done], workers):
        done[file] = made
        records.write_manifest(folder, progress, name=records.UNFINISHED)
    manifest = _manifest(sources, plan, done) | {"settings": settings}
    records.write_manifest(folder, manifest)
    (folder / records.UNFINISHED).unlink(missing_ok=True)
    return manifest


def _plan(split: str, examples: int, shards: int) -> list[Shard]:
    """The shards of a split, of equal size but for one example."""
    shards = max(1, min(shards or min(-(-examples // SHARD_EXAMPLES), MOST_SHARDS), examples))
    bounds = [n * examples // shards for n in range(shards + 1)]
    return [
        Shard(f"{split}-{n:05d}-of-{shards:05d}.arrayrecord", split, bounds[n], bounds[n + 1]) for n in range(shards)
    ]


class _Writer:
    """Writes one shard; worker processes have a copy."""

    def __init__(self, sources: Mapping[str, Source], folder: epath.Path, picture: Picture):
        self.sources, self.folder, self.picture = sources, folder, picture

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Returns {"shard": its entry of the manifest, "keys": of its examples, "corrupt": [[path, reason], ...]}."""
        keys: set[str] = set()
        corrupt: list[list[str]] = []

        def payloads() -> Iterator[Example]:
            source = self.sources[shard.split]
            with ThreadPoolExecutor(_THREADS) as pool:
                for start in range(shard.start, shard.stop, _TASK):
                    indices = range(start, min(start + _TASK, shard.stop))
                    for made in pool.map(lambda index: self._payload(source, index), indices):
                        if isinstance(made, CorruptExample):
                            corrupt.append([made.path, made.reason])
                        else:
                            keys.update(made)
                            yield made

        written = records.write_shard(self.folder / shard.file, payloads())
        return {"shard": written, "keys": sorted(keys), "corrupt": corrupt}

    def _payload(self, source: Source, index: int) -> Example | CorruptExample:
        try:
            example = source[index]  # decoded in any case, so that what cannot be read is found now
            image = example.pop("image")
            if self.picture.side and min(image.shape[:2]) > self.picture.side:
                return example | {"image_bytes": _encode(_resized(image, self.picture), self.picture.jpeg)}
            encoded = source.encoded(index) if hasattr(source, "encoded") else {}
            return encoded if "image_bytes" in encoded else example | {"image_bytes": _encode(Image.fromarray(image))}
        except CorruptExample as error:
            return error


def _resized(image: np.ndarray, picture: Picture) -> Image.Image:
    height, width = image.shape[:2]
    scale = picture.side / min(height, width)
    size = max(picture.side, round(width * scale)), max(picture.side, round(height * scale))
    return Image.fromarray(image).resize(size, ANTIALIASED[picture.filter])


def _encode(image: Image.Image, jpeg: int = 0) -> bytes:
    """The file of a picture: JPEG of this quality, or PNG."""
    buffer = io.BytesIO()
    image.save(buffer, **dict(format="JPEG", quality=jpeg, subsampling=0) if jpeg else dict(format="PNG"))
    return buffer.getvalue()


def _write_all(writer: _Writer, shards: Sequence[Shard], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Writes shards in this or in other processes; yields file and result as they are done."""
    workers = min(workers, len(shards))
    total = sum(shard.stop - shard.start for shard in shards)
    with tqdm(total=total, desc="preparing", unit="image", disable=None) as bar:
        if workers < 2:
            for shard in shards:
                yield shard.file, writer(shard)
                bar.update(shard.stop - shard.start)
            return
        # Spawned, because forking a process in which JAX runs threads can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start_worker, (writer,)) as pool:
            try:
                futures = {pool.submit(_work, shard): shard for shard in shards}
                for future in as_completed(futures):
                    shard = futures[future]
                    yield shard.file, future.result()
                    bar.update(shard.stop - shard.start)
            except BrokenProcessPool:
                raise UserError(
                    f"a worker process died, often for want of memory: the same command with fewer --workers than "
                    f"{workers} goes on"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


_writer: _Writer  # of a worker process


def _start_worker(writer: _Writer) -> None:
    global _writer
    _writer = writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker whose parent was killed would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(shard: Shard) -> dict[str, Any]:
    return _writer(shard)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _found(folder: epath.Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of this name, if there is one. Raises UserError: it is that of other records."""
    if not (folder / name).exists():
        return None
    found = records.read_manifest(folder, kind=records.IMAGES, name=name)
    if others := differences(settings, found.get("settings", {})):
        raise UserError(f"--out={folder}: was made with other settings ({others[0]}); name another folder or delete it")
    return found


def _finished_shards(folder: epath.Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a killed run of the same settings has finished, by file. Raises UserError: the folder holds other things."""
    if (unfinished := _found(folder, records.UNFINISHED, settings)) is not None:
        done = unfinished["done"].items()
        return {file: made for file, made in done if records.shard_fault(folder, made["shard"]) is None}
    there = folder.iterdir() if folder.is_dir() else ()
    if others := [path.name for path in there if not path.name.startswith(".")]:
        raise UserError(f"--out={folder}: holds other files, such as '{min(others)}'; name an empty folder")
    return {}


def _manifest(
    sources: Mapping[str, Source], plan: Sequence[Shard], done: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    splits, keys = {}, set()
    for split in sources:
        made = [done[shard.file] for shard in plan if shard.split == split]
        corrupt = [pair for one in made for pair in one["corrupt"]]
        count = sum(one["shard"]["count"] for one in made)
        if not count:
            path, reason = corrupt[0] if corrupt else ("the source", "it is empty")
            raise UserError(f"the split '{split}' has no example that can be read: {path}: {reason}")
        splits[split] = {"count": count, "shards": [one["shard"] for one in made], "corrupt": corrupt}
        keys.update(key for one in made for key in one["keys"])
    first, *others = sources.values()
    if any(other.classes != first.classes for other in others):
        raise UserError("the splits have other classes each; prepare them one by one with --splits")
    return {
        "kind": records.IMAGES,
        "splits": splits,
        "classes": list(first.classes),
        "tables": {key: list(names) for key, names in getattr(first, "tables", {}).items()},
        "keys": sorted(keys - {"image_bytes"} | {"image"}),
    }


def _summary(out: str, manifest: Mapping[str, Any], seconds: float) -> str:
    parts, size, corrupt = [], 0, []
    for name, split in manifest["splits"].items():
        parts.append(f"{name} {split['count']:,} in {len(split['shards'])} shards")
        size += sum(shard["bytes"] for shard in split["shards"])
        corrupt += split["corrupt"]
    text = f"{out}: {', '.join(parts)}; {size / 1e6:,.1f} MB; {seconds:.1f} s"
    if corrupt:
        path, reason = corrupt[0]
        text += f"; {len(corrupt)} left out that cannot be read, named in {records.MANIFEST}, such as {path}: {reason}"
    return text


def _parser(defaults: ConfigDict) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vqgan_jax.tools.prepare",
        description="Writes any source of examples as ArrayRecord shards with a manifest, to be read by "
        "--config.data.source=records --config.data.path=OUT. Give the same command again to go on after a stop.",
        epilog="example: python -m vqgan_jax.tools.prepare --source=archive --path=p.zip --val_split= --out=records",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder to write, local or gs://")
    parser.add_argument("--splits", default=",".join(SPLITS), help="those to write: %(default)s")
    parser.add_argument("--resize", type=int, default=0, metavar="SIDE", help="shrink the short side to so many pixels")
    parser.add_argument("--filter", choices=ANTIALIASED, default=Picture().filter, help="of --resize: %(default)s")
    parser.add_argument("--jpeg", type=int, default=0, metavar="QUALITY", help="95 to 100, of --resize; else PNG")
    parser.add_argument("--shards", type=int, default=0, metavar="N", help="files a split; by default by its size")
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes: %(default)s")
    parser.add_argument("--verify", action="store_true", help="compare the shards in --out with their hashes, no more")
    fields = parser.add_argument_group("the source", "fields of config.data; configs/common.py says what they mean")
    for name, value in defaults.items():
        if name not in _LOADING:
            kind = type(value)
            fields.add_argument(f"--{name}", dest=f"data.{name}", type=kind, default=value, metavar=kind.__name__)
    return parser


def _defaults() -> ConfigDict:
    try:
        from configs import common
    except ImportError:
        raise UserError(f"there is no folder configs in {Path.cwd()}: run this from the repository's folder") from None
    return common.data("")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        defaults = _defaults()
        args = _parser(defaults).parse_args(argv)
        start = time.monotonic()
        if args.verify:
            print(f"{args.out}: {records.verify(args.out)} shards are as they were written")
            return 0
        data = ConfigDict({name: getattr(args, f"data.{name}", value) for name, value in defaults.items()})
        manifest = prepare(
            data,
            args.out,
            splits=_splits(args.splits),
            picture=_picture(args),
            shards=args.shards,
            workers=args.workers,
        )
    except UserError as error:
        print(f"error: {str(error).replace('config.data.', '--')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(_summary(args.out, manifest, time.monotonic() - start))
    return 0


def _splits(text: str) -> list[str]:
    splits = [split for split in SPLITS if split in text.split(",")]
    if not splits or set(text.split(",")) - set(splits):
        raise UserError(f"--splits={text}: takes {' or '.join((*SPLITS, ','.join(SPLITS)))}")
    return splits


def _picture(args: argparse.Namespace) -> Picture:
    if args.jpeg and not (args.resize and 95 <= args.jpeg <= 100):
        raise UserError(f"--jpeg={args.jpeg}: takes 95 to 100, and only with --resize: pictures keep their bytes")
    if args.resize < 0 or args.shards < 0 or args.workers < 1:
        raise UserError("--resize and --shards take 0 or more, --workers 1 or more")
    return Picture(args.resize, args.filter, args.jpeg)


if __name__ == "__main__":
    sys.exit(main())
