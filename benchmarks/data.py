"""How fast data arrive: pictures and records a second and core, and what reading them costs a training step.

    python -m benchmarks.data [--only=decode,pipeline,records,vqgan,transformer] [--seconds=5]

Prints a Markdown table beside the figures aimed at, and fails on nothing but a bug. Everything is made by the benchmark
itself: JPEGs of 500 x 375 pixels and about 82 kB (scenes and noise), and random codes. Keep the machine idle meanwhile.
"""

import argparse
import datetime
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import common, quantizers
from vqgan_jax import parallel
from vqgan_jax.data import decoding, records, scenes, transforms
from vqgan_jax.data.sources import open_source
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.train import code_cache, setup
from vqgan_jax.train.recipe import transformer_recipe, vqgan_recipe
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

PICTURES, HEIGHT, WIDTH, BYTES = 64, 375, 500, 82_000


class Row(NamedTuple):
    """One line of the table; `aim` as text, "" where there is none."""

    what: str
    measured: str
    aim: str = ""


def write_pictures(folder: Path) -> None:
    """JPEGs like those of ImageNet in size: scenes with as much noise as makes BYTES at quality 90."""
    (folder / "train").mkdir(parents=True)
    for index in range(PICTURES):
        rng, clean = np.random.default_rng(index), scenes.render(0, index, HEIGHT, WIDTH)["image"]
        noise, low, high = rng.standard_normal(clean.shape), 0.0, 64.0
        for _ in range(8):
            middle = (low + high) / 2
            data = io.BytesIO()
            noisy = np.clip(clean + middle * noise, 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(data, "JPEG", quality=90)
            low, high = (middle, high) if data.tell() < BYTES else (low, middle)
        (folder / "train" / f"{index:03d}.jpg").write_bytes(data.getvalue())


def picture_config(folder: Path, resize: str) -> ConfigDict:
    """config.data of those pictures at 256 pixels."""
    data = common.data("folder")
    data.path, data.train_split, data.val_split = str(folder), "train", ""
    data.image_size, data.resize, data.crop, data.flip, data.val_share = 256, resize, "random", True, 0.0
    return data


def rate(step: Callable[[int], Any], seconds: float) -> float:
    """Calls a second of step(0), step(1), ... over about so many seconds, the first tenth left out."""
    count, start, counted = 0, time.perf_counter(), None
    while (now := time.perf_counter()) < start + 1.1 * seconds:
        if counted is None and now > start + 0.1 * seconds:
            counted = (count, now)
        step(count)
        count += 1
    first, since = counted
    return (count - first) / (time.perf_counter() - since)


def on_one_core(measure: Callable[[], float]) -> float:
    """Runs `measure` on one core, where the system lets a process choose."""
    if not hasattr(os, "sched_setaffinity"):
        return measure()
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        return measure()
    finally:
        os.sched_setaffinity(0, cores)


def decode(folder: Path, seconds: float) -> Iterator[Row]:
    """From files to float32 rows on one core, with the fast extra and without it."""
    sizes = [path.stat().st_size for path in (folder / "train").iterdir()]
    yield Row(f"JPEGs: {PICTURES} of {WIDTH} x {HEIGHT}", f"{np.mean(sizes) / 1000:.0f} kB")
    fast = decoding.simplejpeg, transforms.cv2
    for extra, libraries, aim in (("simplejpeg", fast, 450), ("Pillow alone", (None, None), 300)):
        if extra == "simplejpeg" and None in fast:
            yield Row("decode with simplejpeg", "not measured: pip install -r requirements-fast.txt", f"{aim}")
            continue
        decoding.simplejpeg, transforms.cv2 = libraries
        try:
            for resize in (*transforms.FILTERS,):
                data = picture_config(folder, resize)
                source = open_source(data, "train")
                transform = transforms.Transform.from_config(data, keys=("image",), classes=0, train=True)

                def make(k: int, source: Any = source, transform: Any = transform) -> None:
                    transform(source[k % PICTURES], np.random.default_rng(k))

                measured = on_one_core(lambda make=make: rate(make, seconds))
                aimed = f"{aim} images/s a core" if resize == "box" else ""
                yield Row(f"decode, {resize} to 256, random crop: {extra}", f"{measured:.0f} images/s a core", aimed)
        finally:
            decoding.simplejpeg, transforms.cv2 = fast


def pipeline(folder: Path, seconds: float) -> Iterator[Row]:
    """Whole batches through Grain on all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for threads, processes in ((2 * cores, 0), (2, cores)):
        with open_pictures(folder, batch=64, threads=threads, processes=processes) as batches:
            next(batches)
            measured = 64 * rate(lambda _, batches=batches: next(batches), seconds)
        how = f"{threads} threads" if not processes else f"{processes} processes of {threads} threads"
        yield Row(f"pipeline, box, batches of 64: {how} on {cores} cores", f"{measured:.0f} images/s")


def open_pictures(folder: Path, *, batch: int, threads: int, processes: int = 0) -> Any:
    """Training batches of the pictures on the device, as a trainer opens them."""
    config = common.run()
    config.batch_size, config.data = batch, picture_config(folder, "box")
    config.data.threads, config.data.processes = threads, processes
    transform = transforms.Transform.from_config(config.data, keys=("image",), classes=0, train=True)
    return setup.training_batches(config, one_device(), open_source(config.data, "train"), transform, 0)


def one_device() -> Any:
    return parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def write_codes(folder: Path, count: int, side: int, size: int) -> None:
    """A folder of random codes, as the code cache reads them."""
    rng = np.random.default_rng(0)

    def examples(count: int) -> Iterator[dict[str, np.ndarray]]:
        for _ in range(count):
            codes = rng.integers(size, size=(2, side, side), dtype=np.uint16)
            yield {"codes/image": codes, "label": rng.integers(8, size=2, dtype=np.int32)}

    splits = {}
    for split, n in (("train", count), ("val", 1)):
        shard = records.write_shard(folder / f"{split}.arrayrecord", examples(n))
        splits[split] = {"count": n, "shards": [shard]}
    manifest = {"kind": records.CODES, "keys": ["codes/image", "label"], "classes": [str(i) for i in range(8)]}
    records.write_manifest(folder, manifest | {"splits": splits, "stages": {"first_stage": ""}, "grid": [side, side]})


def read_records(folder: Path, seconds: float) -> Iterator[Row]:
    """Random access to small records on one core: two views of 16 x 16 codes."""
    write_codes(folder, 50_000, 16, 1024)
    source = records.Records(folder, "train", kind=records.CODES)
    order = np.random.default_rng(1).permutation(len(source)).tolist()
    view = code_cache.ReadView(("codes/image", "label"), draw=True)
    rng = np.random.default_rng(2)
    plain = on_one_core(lambda: rate(lambda k: source[order[k % len(order)]], seconds))
    yield Row("ArrayRecord, random reads of 1 kB", f"{plain:.0f} records/s a core", "10,000 records/s a core")
    rows = on_one_core(lambda: rate(lambda k: view(source[order[k % len(order)]], rng), seconds))
    yield Row("the same, as rows with a view drawn", f"{rows:.0f} records/s a core")


def vqgan_step_cost(folder: Path, seconds: float) -> Iterator[Row]:
    """A VQGAN's step on JPEGs of 256 pixels against the same step on one batch that stays on the device."""
    config = common.vqgan()
    ae, batch = config.model.autoencoder, 2
    ae.stem, ae.channels, ae.multipliers = 4, 64, (1, 2, 4)  # small, so that a CPU can tell: the paper's hides far more
    config.model.discriminator.channels, config.loss.perceptual_weight = 16, 0.0
    config.loss.adversarial_start = config.loss.adversarial_ramp = "0"
    config.steps, config.batch_size = "1000", batch
    recipe = vqgan_recipe(config, VQGAN(VQGANConfig.from_config(config.model)), setup.Durations(config, 1000))
    state = parallel.init_sharded(recipe.init, one_device(), jax.random.key(0))
    real, fixed = compare(recipe.step, state, {}, lambda: open_pictures(folder, batch=batch, threads=4), seconds)
    yield cost_row(f"VQGAN step, 256 pixels, batch {batch}: JPEGs against one batch", real, fixed, 2)


def transformer_step_cost(folder: Path, seconds: float) -> Iterator[Row]:
    """A transformer's step on cached codes against the same step on one batch that stays on the device."""
    for name, side, layers, width, batch in (
        ("64 codes, 4 x 128", 8, 4, 128, 32),
        ("256 codes, 8 x 256", 16, 8, 256, 8),
    ):
        write_codes(folder / name, 20_000, side, 256)
        config = common.transformer()
        config.batch_size = batch
        gpt = config.model.transformer
        gpt.layers, gpt.heads, gpt.width, config.model.grid = layers, 4, width, (side, side)
        config.model.condition = ConfigDict(dict(name="class", classes=8))
        stage = common.vqgan_model()
        stage.quantizer = quantizers.vq(256, 256)
        first = Tokenizer(VQGAN(VQGANConfig.from_config(stage)))
        model = ImageTransformer(TransformerConfig.from_config(config.model), first)
        data = code_cache.open_codes(folder / name, model, {"first_stage": ""})
        recipe = transformer_recipe(config, model, setup.Durations(config, 1000))
        state = parallel.init_sharded(recipe.init, one_device(), jax.random.key(0))

        def batches(config: ConfigDict = config, data: setup.Data = data) -> Any:
            return setup.training_batches(config, one_device(), data.train, data.train_transform, 0)

        real, fixed = compare(recipe.step, state, {}, batches, seconds)
        yield cost_row(f"transformer step, {name}, batch {batch}: cached codes against one batch", real, fixed, 3)


def compare(
    step: Callable[..., Any], state: Any, frozen: Any, open_batches: Callable[[], Any], seconds: float
) -> tuple[float, float]:
    """Seconds of a step that reads its batches, and of one that has its batch: medians over blocks in turn.

    Reading is measured once it has settled: what was read ahead is used up, and no reader runs beside the other blocks.
    """
    step = jax.jit(step, donate_argnums=0)
    with open_batches() as batches:
        fixed = next(batches)

    def timed(batch_of: Callable[[], Any], count: int) -> list[float]:
        nonlocal state
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            state, metrics = step(state, batch_of(), frozen)
            jax.block_until_ready(metrics)
            taken.append(time.perf_counter() - start)
        return taken

    timed(lambda: fixed, 3)
    count = max(4, int(seconds / np.median(timed(lambda: fixed, 3))))
    real, still = [], []
    for _ in range(4):
        still += timed(lambda: fixed, count)
        with open_batches() as batches:
            timed(lambda batches=batches: next(batches), min(count, 16))
            real += timed(lambda batches=batches: next(batches), count)
    return float(np.median(real)), float(np.median(still))


def cost_row(what: str, real: float, fixed: float, aim: float) -> Row:
    """The table's line: both times, and how much longer the real one takes."""
    return Row(what, f"{1e3 * real:.1f} ms against {1e3 * fixed:.1f} ms: {100 * (real / fixed - 1):+.1f} %", f"{aim} %")


def main() -> None:
    """The command line."""
    questions: dict[str, Callable[[Path, float], Iterator[Row]]] = {
        "decode": decode,
        "pipeline": pipeline,
        "records": read_records,
        "vqgan": vqgan_step_cost,
        "transformer": transformer_step_cost,
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(questions), help="some of %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, about")
    args = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} CPU cores, jax {jax.__version__} on {jax.default_backend()}\n")
    print("| what | measured | aim |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "pictures")
        for question in args.only.split(","):
            where = folder / ("pictures" if question in ("decode", "pipeline", "vqgan") else question)
            for row in questions[question](where, args.seconds):
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
