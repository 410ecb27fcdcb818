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

from vqgan_jax import cli, images, parallel, pretrained
from vqgan_jax.config import UserError
from vqgan_jax.sampling.job import SHEET, SampleFolder, host_share
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.sampling.strategy_flags import define_strategy_flags, strategy_of
from vqgan_jax.train.setup import DTYPES

FLAGS = flags.FLAGS
SHEET_ROWS, SHEET_COLUMNS = 16, 8


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
    grid = parse_size(size, factor) if size else model.config.grid
    devices = parallel.make_mesh(mesh, jax.local_devices())

    # What to sample: image i is of class labels[i]
    names = trained.record.get("classes") or []
    count = len(names) or model.condition.vocab_size  # a data set may have fewer classes than its model
    labels = choose_labels(model.condition.keys, count, names, classes, number)
    settings = {
        "workdir": workdir,
        "checkpoint": trained.checkpoint,
        "seed": seed,
        "strategy": strategy_record(strategy),
        "classes": list(classes),
        "grid": list(grid),
        "dtype": dtype,
    }

    # Sampling
    with SampleFolder(path, settings) as folder:
        share = host_share(number, jax.process_index(), jax.process_count())
        missing = np.array([index for index in share if index not in folder.done], int)
        done = len(share) - len(missing)
        with tqdm(total=len(share), initial=done, desc="sample", unit="image", disable=not len(missing)) as bar:
            batches = trained.samples(
                labels, grid, seed=seed, batch=min(batch, number), strategy=strategy, indices=missing, mesh=devices
            )
            start = 0
            for pictures in batches:
                for index, picture in zip(missing[start:], pictures, strict=False):
                    folder.write(index, picture)
                start += len(pictures)
                bar.update(len(pictures))
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


def parse_size(text: str, factor: int) -> tuple[int, int]:
    """ "64x512" as a grid of codes."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise UserError(f"--size={text}: write HEIGHTxWIDTH in pixels, such as 64x512")
    if any(int(part) % factor for part in parts):
        raise UserError(f"--size={text}: height and width must be multiples of {factor}")
    return int(parts[0]) // factor, int(parts[1]) // factor


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
        pictures = np.stack(list(folder.read(range(min(len(labels), SHEET_COLUMNS**2)))))
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
    flags.DEFINE_integer("seed", 0, "Seed of the run; image i depends on the seed and on i alone.")
    define_strategy_flags()
    flags.DEFINE_list("classes", [], "Class names or numbers to sample, in turn; all by default.")
    flags.DEFINE_string(
        "size", "", "HEIGHTxWIDTH in pixels, each at least the trained size; the trained size by default."
    )
    flags.DEFINE_bool("best", True, "The best checkpoint by validation NLL; --nobest takes the newest.")
    flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Of the computation; bfloat16 is fast on TPUs and GPUs.")
    flags.DEFINE_integer("fsdp", 1, "Devices that share each copy of the parameters.", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "Devices that share the heads of each copy of the model.", lower_bound=1)
    cli.define_distributed_flag()


def main() -> None:
    """Calls `sample` with the flags."""
    same = ("number", "batch", "seed", "classes", "size", "best", "dtype")
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
