"""Samples new images from a trained transformer.

    python sample.py --workdir=runs/transformer --out=samples --number=64 --top_k=100
    python sample.py --workdir=runs/transformer --out=panorama --number=4 --size=64x512
    python sample.py --workdir=runs/transformer --out=big --number=50000 --batch=64 --dtype=bfloat16 --guidance=2

Writes one PNG an image, and at the end samples.npz (arr_0: uint8 [n, h, w, 3], and `label` where there is one) and
grid.png. A size beyond the trained one is made with the sliding window. The same seed gives image number i whatever
the batch size and the devices. A job that was stopped goes on when started again; with a larger --number it adds to
what is there. Several hosts (--distributed) take a range of indices each and write to one folder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from vqgan_jax import cli, images, parallel, pretrained, storage
from vqgan_jax.config import UserError
from vqgan_jax.sampling.job import SHEET, SampleFolder, host_share
from vqgan_jax.sampling.large import Large
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.sampling.strategy_flags import define_strategy_flags, strategy_of
from vqgan_jax.train.setup import DTYPES

FLAGS = flags.FLAGS
SHEET_ROWS, SHEET_COLUMNS = 16, 8
MOST_PIXELS = 8192  # a side
SHEET_PIXELS = 1 << 27  # in all, of pictures without names


def sample(
    workdir: str,
    out: str,
    *,
    number: int,
    batch: int,
    seed: int,
    strategy: Strategy,
    classes: Sequence[str],
    size: str,
    stride: int,
    decode: str,
    memory: float,
    best: bool,
    dtype: str,
    mesh: Mapping[str, int],
) -> epath.Path:
    """Samples and writes the images that the folder does not hold yet; returns the folder. Arguments: the flags'."""
    path = cli.check_workdir(out, "--out")

    # Model
    trained = pretrained.open_transformer(workdir, key="--workdir", best=best, dtype=DTYPES[dtype])
    model, factor = trained.model, trained.model.first_stage.factor
    if strategy.guided:
        _ = model.null_condition  # raises before anything is drawn, where the model has none
    height, width = parse_size(size) if size else (factor * n for n in model.config.grid)
    grid = tuple(max(-(-n // factor), trained) for n, trained in zip((height, width), model.config.grid, strict=True))
    devices = parallel.make_mesh(mesh, jax.local_devices())

    # What to sample: image i is of class labels[i]
    names = trained.record.get("classes") or []
    count = len(names) or model.condition.vocab_size  # a data set may have fewer classes than its model
    labels = choose_labels(model.condition.keys, count, names, classes, number)
    settings = {
        "workdir": str(storage.absolute(workdir)),
        "checkpoint": trained.checkpoint,
        "seed": seed,
        "strategy": strategy_record(strategy),
        "classes": list(classes),
        "size": [height, width],
        "stride": stride,
        "decode": decode,
        "dtype": dtype,
    }

    # Sampling
    with SampleFolder(path, settings) as folder:
        share = host_share(number, jax.process_index(), jax.process_count())
        missing = np.array([index for index in share if index not in folder.done], int)
        done = len(share) - len(missing)
        with tqdm(total=len(share), initial=done, desc="sample", unit="image", disable=not len(missing)) as bar:
            start = 0
            large = Large(
                stride=stride,
                memory=int(memory * 2**30),
                tiles=decode == "tiles",
                progress=lambda share: bar.update(done + start + share * min(batch, len(missing) - start) - bar.n),
                announce=bar.write,
            )
            batches = trained.samples(
                labels,
                grid,
                seed=seed,
                batch=min(batch, number),
                strategy=strategy,
                indices=missing,
                mesh=devices,
                large=large,
            )
            for pictures in batches:
                for index, picture in zip(missing[start:], pictures, strict=False):
                    folder.write(index, centre_crop(picture, height, width))
                start += len(pictures)
                bar.update(done + start - bar.n)
    multihost_utils.sync_global_devices("every image is written")

    # Sheets
    if jax.process_index() == 0:
        extra = {"label": labels} if "label" in model.condition.keys else {}
        folder.write_arrays(number, **extra)
        images.save_png(path / SHEET, sheet(folder, labels, names if extra else []))
        print(f"{number} images ({done} of this host's were there) in {path}")
    return path


def strategy_record(strategy: Strategy) -> dict[str, Any]:
    """The strategy as plain data."""
    names = ("temperature", "top_k", "top_p", "min_p", "guidance", "power", "greedy", "schedule")
    return {name: getattr(strategy, name) for name in names} | {"interval": list(strategy.interval)}


def parse_size(text: str) -> tuple[int, int]:
    """ "64x512" as height and width in pixels."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and 0 < int(part) <= MOST_PIXELS for part in parts):
        raise UserError(f"--size={text}: write HEIGHTxWIDTH in pixels, such as 64x512, each at most {MOST_PIXELS}")
    return int(parts[0]), int(parts[1])


def centre_crop(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture [h, w, c]: [height, width, c]."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def choose_labels(keys: tuple[str, ...], count: int, names: list[str], asked: list[str], number: int) -> np.ndarray:
    """One label a sample, int32 [number]: the classes asked for in turn, or all of them."""
    if "label" not in keys:
        if keys:
            raise UserError(
                f"--workdir: this model needs a condition ({', '.join(keys)}), which sample.py cannot give it yet"
            )
        if asked:
            raise UserError("--classes: this model is unconditional")
        return np.zeros(number, np.int32)
    ids = []
    for text in asked:
        if text not in names and not (text.isdigit() and int(text) < count):
            raise UserError(f"--classes: no class '{text}'; there are 0 to {count - 1}: {', '.join(names)}")
        ids.append(names.index(text) if text in names else int(text))
    return np.resize(np.asarray(ids or range(count), np.int32), number)


def sheet(folder: SampleFolder, labels: np.ndarray, names: list[str]) -> np.ndarray:
    """A grid of the first pictures, one labelled row a class where classes have names."""
    if not names:
        most = max(1, SHEET_PIXELS // next(folder.read([0])).size)
        pictures = np.stack(list(folder.read(range(min(len(labels), SHEET_COLUMNS**2, most)))))
        wide = pictures.shape[2] > 2 * pictures.shape[1]
        return images.grid(pictures, columns=1 if wide else None)
    rows = {}
    for label in np.unique(labels)[:SHEET_ROWS]:
        rows[names[label]] = np.stack(list(folder.read(np.flatnonzero(labels == label)[:SHEET_COLUMNS])))
    return images.labelled_rows(rows)


def define_flags() -> None:
    """The flags of this script."""
    flags.DEFINE_string("workdir", None, "Workdir of train_transformer.py, or an imported transformer.")
    flags.DEFINE_string("out", None, "Folder to write to.")
    flags.DEFINE_integer("number", 16, "How many images.", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "Images sampled at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the run; image i depends on the seed and on i alone.", 0, 2**31 - 1)
    define_strategy_flags()
    flags.DEFINE_list("classes", [], "Class names or numbers to sample, in turn; all by default.")
    flags.DEFINE_string(
        "size", "", "HEIGHTxWIDTH in pixels, below the trained size a crop; the trained one by default."
    )
    flags.DEFINE_integer(
        "stride",
        0,
        "Beyond the trained size: 0 gives every token a window of its own (exact); N moves windows by N codes and "
        "draws a block in each, many times faster, with less of the picture in view.",
        lower_bound=0,
    )
    flags.DEFINE_enum("decode", "exact", ["exact", "tiles"], "Beyond the trained size: tiles are fast, approximate.")
    flags.DEFINE_float("memory", 0, "GiB that decoding beyond the trained size may use a device; 0: what there is.", 0)
    flags.DEFINE_bool("best", True, "The best checkpoint by validation NLL; --nobest takes the newest.")
    flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Of the computation; bfloat16 is fast on TPUs and GPUs.")
    flags.DEFINE_integer("fsdp", 1, "Devices that share each copy of the parameters.", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "Devices that share the heads of each copy of the model.", lower_bound=1)
    cli.define_distributed_flag()


def main() -> None:
    """Calls `sample` with the flags."""
    same = ("number", "batch", "seed", "classes", "size", "stride", "decode", "memory", "best", "dtype")
    sample(
        FLAGS.workdir,
        FLAGS.out,
        strategy=strategy_of(FLAGS),
        mesh={"data": -1, "fsdp": FLAGS.fsdp, "tensor": FLAGS.tensor},
        **{name: FLAGS[name].value for name in same},
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("workdir", "out"))
