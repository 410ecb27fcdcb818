"""How fast both stages train, and how close that is to the machine: the real train steps on random data.

    python -m benchmarks.train                                         (any machine: both stages, small, a minute)
    python -m benchmarks.train --models=imagenet_f16_1024 --batches=8,16,32 --dtypes=bfloat16       (a GPU, a TPU)
    python -m benchmarks.train --models=307M,1.4B,L,XXL --batches=8,32 --dtypes=bfloat16
    python -m benchmarks.train --models=imagenet_f16_1024 --batches=1 --steps=3 --convolutions      (a CPU, minutes)

Models are rows of configs/paper_vqgan.py and configs/paper_transformer.py (those of a class, on cached codes), 307M and
1.4B for the class-conditional ones of ImageNet, and the presets of configs/modern_transformer.py (B to 3B), with
LPIPS, discriminator and EMA as the row has them and random weights. MFU counts matrix products and convolutions,
without what remat computes again, against the chip's peak or, where that is not known, a large product of the same run.
"Over its roofline" is the time over the longer of two: those operations at that rate, and the bytes that the compiled
step moves at the bandwidth of the chip or, where that is not known, of a large reduction of the same run.
--convolutions times every convolution of the step alone: what is left if nothing else cost anything.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.machine import bandwidth, best, matmul_rate, transformer
from configs import paper_vqgan
from vqgan_jax import parallel
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.train import roofline, setup
from vqgan_jax.train.recipe import Recipe, frozen_networks, transformer_recipe, vqgan_recipe
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

EXAMPLES = 1_281_167  # of ImageNet, for durations
SMALL = ("cifar10", "class_imagenet")
COLUMNS = (
    "model", "dtype", "batch", "remat", "GFLOP", "ms p50", "ms p99", "images/s", "tokens/s", "MFU", "over its roofline",
    "GiB", "compile s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A run's functions and what its step is called with, on the host; `tokens`: codes an image, 0 for stage 1."""

    recipe: Callable[[str], Recipe]  # by remat
    batch: dict[str, np.ndarray]
    frozen: Any
    tokens: int


def make_job(name: str, batch: int, dtype: str, small: bool) -> tuple[ConfigDict, Job]:
    """A row of the paper's configs, with its adversarial loss on, or a preset; `small` shrinks its model."""
    first = None
    if name in paper_vqgan.ROWS:
        config = paper_vqgan.get_config(name)
    else:
        config, first = transformer(name)
    config.batch_size, config.dtype = batch, dtype
    return config, vqgan_job(config, small) if first is None else transformer_job(config, first, name, small)


def vqgan_job(config: ConfigDict, small: bool) -> Job:
    """Stage 1."""
    config.loss.adversarial_start, config.loss.adversarial_ramp = "0", "0"
    if small:
        config.model.autoencoder.channels, config.model.discriminator.channels = 32, 16
    model = VQGAN(VQGANConfig.from_config(config.model), setup.dtype_of(config))
    size, channels = config.data.image_size, config.model.autoencoder.in_channels
    rng = np.random.default_rng(0)
    batch = {model.config.input_key: rng.uniform(-1, 1, (config.batch_size, size, size, channels)).astype(np.float32)}
    if model.config.input_key == "segmentation":
        batch = {"segmentation": rng.integers(0, channels, (config.batch_size, size, size)).astype(np.int32)}
    frozen = {name: jax.jit(init)(jax.random.key(0)) for name, init in frozen_networks(config).items()}
    durations = setup.Durations(config, EXAMPLES)
    return Job(lambda remat: vqgan_recipe(config, model.clone(remat=remat), durations), batch, frozen, 0)


def transformer_job(config: ConfigDict, first: ConfigDict, name: str, small: bool) -> Job:
    """Stage 2, over the first stage of which `first` is `config.model`."""
    if small:
        shape = config.model.transformer
        shape.layers, shape.heads, shape.width = 2, 4, 128
    stage = Tokenizer(VQGAN(VQGANConfig.from_config(first)))
    model = ImageTransformer(TransformerConfig.from_config(config.model), stage, dtype=setup.dtype_of(config))
    if set(model.condition.keys) - {"label"}:
        raise SystemExit(f"{name}: only transformers without condition, or of a class, need nothing but codes")
    rng = np.random.default_rng(0)
    codes = rng.integers(0, stage.codebook_size, (config.batch_size, *config.model.grid)).astype(np.int32)
    labels = rng.integers(0, max(model.condition.vocab_size, 1), config.batch_size).astype(np.int32)
    batch = {"codes/image": codes} | {key: labels for key in model.condition.keys}
    durations = setup.Durations(config, EXAMPLES)
    recipe = lambda remat: transformer_recipe(config, dataclasses.replace(model, remat=remat), durations)  # noqa: E731
    return Job(recipe, batch, {}, len(model.order))


def seconds_of_steps(compiled: Any, state: Any, batch: Any, frozen: Any, steps: int) -> list[float]:
    """Seconds of each step after a first one, the metrics of each read once the next is dispatched, as in training."""
    state, metrics = compiled(state, batch, frozen)
    jax.block_until_ready(metrics)
    seconds, start = [], time.perf_counter()
    state, metrics = compiled(state, batch, frozen)
    for _ in range(steps):
        state, new = compiled(state, batch, frozen)
        values = jax.device_get(metrics)
        metrics = new
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    jax.block_until_ready(state)
    if not all(math.isfinite(float(value)) for value in values.values()):
        raise SystemExit("the step is not finite")
    return seconds


def memory_in_use(compiled: Any) -> int:
    """Peak bytes of the step on a device, as the compiler planned: the device's own count is of all rows together."""
    return parallel.device_bytes(compiled) - compiled.memory_analysis().alias_size_in_bytes


@functools.cache
def rates(dtype: str) -> tuple[float, float, str]:
    """FLOPs and bytes a second of one device at best, and where the numbers are from."""
    if chip := roofline.chip_of(jax.devices()[0].device_kind):
        return chip.peak_flops, chip.memory_bandwidth, f"the peak of {chip.name}"
    flops, product = matmul_rate(dtype)
    return flops, bandwidth(), f"{product} ({flops / 1e9:.0f} GFLOP/s), bandwidth that of a reduction"


def convolution_seconds(jaxpr: Any, repeats: int) -> tuple[float, int]:
    """Seconds of all convolutions of a step, each kind timed alone; and how many they are."""
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for equation, times in roofline.products(jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            shapes = tuple((v.aval.shape, v.aval.dtype) for v in equation.invars)
            kinds.setdefault((shapes, str(equation.params)), [equation, 0])[1] += times
    total = 0.0
    for (shapes, _), (equation, times) in kinds.items():
        run = jax.jit(functools.partial(equation.primitive.bind, **equation.params))
        inputs = [jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype) for shape, dtype in shapes]
        total += times * best(run, *inputs, repeats=repeats)
    return total, sum(times for _, times in kinds.values())


def measure(name: str, batch: int, dtype: str, args: argparse.Namespace, small: bool) -> None:
    """Prints one row."""
    config, job = make_job(name, batch, dtype, small)
    mesh = parallel.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        recipe = job.recipe(args.remat)
        state = parallel.init_sharded(recipe.init, mesh, jax.random.key(0))
        frozen = parallel.put_tree(job.frozen, mesh)
        rows = parallel.put_batch(job.batch, mesh, batch)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(recipe.step, donate_argnums=0, out_shardings=(shardings, None))
        start = time.perf_counter()
        compiled = step.lower(state, rows, frozen).compile()
        compile_seconds = time.perf_counter() - start
        jaxpr = roofline.trace_plain(job.recipe("").step, state, rows, frozen)
        seconds = seconds_of_steps(compiled, state, rows, frozen, args.steps)
    count, median = roofline.count_flops(jaxpr), float(np.median(seconds))
    flops, speed, _ = rates(dtype)
    compute, memory = count / mesh.size / flops, roofline.program_cost(compiled).memory_moved / speed
    cells = [
        f"{name}{' (small)' if small else ''}", dtype, batch, args.remat or "no", f"{count / 1e9:.4g}",
        f"{1e3 * median:.4g}", f"{1e3 * np.percentile(seconds, 99):.4g}", f"{batch / median:.4g}",
        f"{job.tokens * batch / median:.4g}" if job.tokens else "", f"{100 * compute / median:.1f} %",
        f"{median / max(compute, memory):.2f} ({'compute' if compute > memory else 'memory'})",
        f"{memory_in_use(compiled) / 2**30:.2f}", f"{compile_seconds:.0f}",
    ]  # fmt: skip
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    alone, number = convolution_seconds(jaxpr, repeats=2) if args.convolutions else (0.0, 0)
    if number:
        print(f"its {number} convolutions alone: {alone:.2f} s; the step takes {median / alone:.2f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="rows of the paper's configs; small ones by default")
    parser.add_argument("--batches", default="8")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--remat", default="")
    parser.add_argument("--steps", type=int, default=20, help="timed, after one that is not")
    parser.add_argument("--convolutions", action="store_true", help="time each convolution of the step alone, too")
    args = parser.parse_args()
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}; MFU is of", end=" ")
    print(rates(args.dtypes.split(",")[0])[2], end="\n\n")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    models = args.models.split(",") if args.models else SMALL
    for name, batch, dtype in itertools.product(models, args.batches.split(","), args.dtypes.split(",")):
        measure(name, int(batch), dtype, args, small=not args.models)


if __name__ == "__main__":
    main()
