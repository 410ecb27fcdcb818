"""Samples new images from a trained transformer, under any condition, and completes given ones.

    python sample.py --workdir=runs/gpt --out=samples --number=64 --top_k=100            # classes in turn, if any
    python sample.py --workdir=runs/gpt --out=suns --classes=noon_lake,3 --each=8
    python sample.py --workdir=runs/semantic --out=held_out                              # held-out segmentations
    python sample.py --workdir=runs/semantic --out=mine --condition=masks/ --each=4      # or of depth, edges, low_res
    python sample.py --workdir=runs/superres --out=large --condition=small.png
    python sample.py --workdir=runs/edges --out=redrawn --condition='photos/*.jpg' --derive
    python sample.py --workdir=runs/layout --out=layout --condition=boxes.json
    python sample.py --workdir=runs/gpt --out=halves --given=val                         # the lower half anew
    python sample.py --workdir=runs/gpt --out=mended --given=photo.jpg --mask=hole.png --each=8 --paste
    python sample.py --workdir=runs/gpt --out=panorama --number=4 --size=64x512
    python sample.py --workdir=runs/gpt --out=big --number=50000 --batch=64 --dtype=bfloat16 --guidance=2
    python sample.py --pretrained=llamagen-L --out=llama --number=8 --guidance=4 --top_k=2000

Writes one PNG an image, and at the end samples.npz (arr_0: uint8 [n, h, w, 3], and what each was asked for: label,
segmentation, boxes, ...; no masks and pictures of more than 4096 conditions) and grid.png: conditions, what their
tokens say, samples, originals. A size beyond the trained one is made with the sliding window. The same seed gives image
number i whatever the batch size and the devices. A job that was stopped goes on when started again; with a larger
--number it adds to what is there. Several hosts (--distributed) take a range of indices each and write to one folder.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from vqgan_jax import cli, images, parallel, pretrained, published, storage
from vqgan_jax.config import UserError
from vqgan_jax.request.flags import Asked, asked_of, define_request_flags
from vqgan_jax.request.request import Request
from vqgan_jax.request.sheet import draw_sheet
from vqgan_jax.sampling.job import SHEET, SampleFolder, host_share
from vqgan_jax.sampling.large import LargeOptions, centre_of
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.sampling.strategy_flags import define_strategy_flags, strategy_of
from vqgan_jax.train.setup import DTYPES

FLAGS = flags.FLAGS
MOST_PIXELS = 8192  # a side
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


def sample(
    workdir: str,
    out: str,
    asked: Asked,
    *,
    batch: int,
    seed: int,
    strategy: Strategy,
    size: str,
    stride: int,
    decode: str,
    memory: float,
    every: int,
    best: bool,
    dtype: str,
    mesh: Mapping[str, int],
    first_stage: str = "",
) -> epath.Path:
    """Samples and writes the images that the folder does not hold yet; returns the folder. Arguments: the flags'."""
    path = cli.check_workdir(out, "--out")

    # Model
    trained = pretrained.open_transformer(
        workdir, key="--workdir", best=best, dtype=DTYPES[dtype], first_stage=first_stage
    )
    model, factor = trained.model, trained.model.first_stage.factor
    if strategy.guided:
        _ = model.null_condition  # raises before anything is drawn, where the model has none
    height, width = parse_size(size) if size else (factor * n for n in model.config.grid)
    grid = tuple(max(-(-n // factor), trained) for n, trained in zip((height, width), model.config.grid, strict=True))
    devices = parallel.make_mesh(mesh, jax.local_devices())

    # What to sample: the condition of image i, and what is given of it
    request = Request(asked, trained, grid)
    number = request.number
    settings = {
        "workdir": str(storage.absolute(workdir)),
        "checkpoint": trained.checkpoint,
        "seed": seed,
        "strategy": strategy_record(strategy),
        "classes": list(asked.classes),
        "size": [height, width],
        "stride": stride,
        "decode": decode,
        "dtype": dtype,
        **request.record,
        **({"centre": "lower"} if centre_of(model) == "lower" and grid != model.config.grid else {}),
        **({"first_stage": str(storage.absolute(first_stage))} if first_stage else {}),
    }

    def finish(index: int, picture: np.ndarray) -> np.ndarray:
        return images.centre_crop(request.finished(index, picture), height, width)

    # Sampling
    def ahead(share: float) -> float:
        """Images between the bar and a share of this batch."""
        return done + start + share * min(together, len(missing) - start) - bar.n

    with SampleFolder(path, settings, later=() if request.encodes else ("decode",)) as folder:
        share = host_share(number, jax.process_index(), jax.process_count())
        missing = np.array([index for index in share if index not in folder.done], int)
        done = len(share) - len(missing)
        together = -(-len(missing) // max(1, -(-len(missing) // batch)))  # as few batches, the last one filled up least
        shown = {"desc": "sample", "unit": "image", "bar_format": BAR, "disable": not len(missing)}
        with tqdm(total=len(share), initial=done, **shown) as bar:
            start = 0
            large = LargeOptions(
                stride=stride,
                memory=int(memory * 2**30),
                tiles=decode == "tiles",
                folder=folder,
                every=every,
                finish=finish,
                begun=lambda share: hold(bar, ahead(share)),
                progress=lambda share: bar.update(ahead(share)),
                announce=bar.write,
            )
            batches = trained.samples(
                request.rows,
                grid,
                seed=seed,
                batch=max(1, together),
                strategy=strategy,
                indices=missing,
                mesh=devices,
                large=large,
                leading=request.leading,
            )
            for pictures in batches:
                for index, picture in zip(missing[start:], pictures, strict=False):
                    folder.write(index, finish(index, picture))
                start += len(pictures)
                bar.update(ahead(0))
    multihost_utils.sync_global_devices("every image is written")

    # Sheets
    if jax.process_index() == 0:
        arrays = request.arrays()
        for name, x in arrays.items():
            if x.shape[1:3] == request.size:
                arrays[name] = np.stack([images.centre_crop(picture, height, width) for picture in x])
        folder.write_arrays(number, **arrays)
        images.save_png(path / SHEET, draw_sheet(folder, request, trained))
        print(f"{number} images ({done} of this host's were there) in {path}")
    return path


def hold(bar: tqdm, held: float) -> None:
    """Counts what an earlier job drew of a batch as there, not as done in no time."""
    bar.initial, bar.n, bar.last_print_n = (n + held for n in (bar.initial, bar.n, bar.last_print_n))


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


def define_flags() -> None:
    """The flags of this script."""
    flags.DEFINE_string("workdir", None, "Workdir of train_transformer.py, or an imported transformer.")
    flags.DEFINE_enum(
        "pretrained", None, sorted(published.MODELS), "In its place a published model, fetched into the cache folder."
    )
    flags.DEFINE_string("out", None, "Folder to write to.")
    flags.DEFINE_string(
        "first_stage",
        "",
        "VQGAN of the same codes to decode with, such as one whose decoder was trained on.",
    )
    define_request_flags()
    flags.DEFINE_integer("batch", 16, "Images sampled at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the run; image i depends on the seed and on i alone.", 0, 2**31 - 1)
    define_strategy_flags()
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
    flags.DEFINE_enum("decode", "exact", ["exact", "tiles"], "Beyond the trained size; or in tiles of it, approximate.")
    flags.DEFINE_float(
        "memory", 0, "GiB a device for converting larger pictures and for their block windows; 0: all.", 0
    )
    flags.DEFINE_integer(
        "every", 0, "Beyond the trained size: a PNG after so many more rows of codes, to OUT/growing; 0: none.", 0
    )
    flags.DEFINE_bool("best", True, "The best checkpoint by validation NLL; --nobest takes the newest.")
    flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Of the computation; bfloat16 is fast on TPUs and GPUs.")
    flags.DEFINE_integer("fsdp", 1, "Devices that share each copy of the parameters.", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "Devices that share the heads of each copy of the model.", lower_bound=1)
    cli.define_distributed_flag()


def main() -> None:
    """Calls `sample` with the flags."""
    if bool(FLAGS.workdir) == bool(FLAGS.pretrained):
        raise UserError("--workdir: name a trained transformer, or with --pretrained a published one, and not both")
    workdir = FLAGS.workdir or str(published.published(FLAGS.pretrained, flag="--pretrained"))
    same = ("first_stage", "batch", "seed", "size", "stride", "decode", "memory", "every", "best", "dtype")
    sample(
        workdir,
        FLAGS.out,
        asked_of(FLAGS),
        strategy=strategy_of(FLAGS),
        mesh={"data": -1, "fsdp": FLAGS.fsdp, "tensor": FLAGS.tensor},
        **{name: FLAGS[name].value for name in same},
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("out",))
