"""What a picture beyond the trained size costs: a window a token, rows at once, and block windows.

    python -m benchmarks.sliding --devices=2                        (the demo's model on a CPU of two cores: minutes)
    python -m benchmarks.sliding --models=small --devices=2 --batches=8 --steps=8
    python -m benchmarks.sliding --models=307M --dtypes=bfloat16    (GPUs)
    python -m benchmarks.sliding --sizes=1024x1024 --ways=serial,wavefront --batches=1

307M is the paper's model for depth maps: 256 condition tokens before a window of 16 x 16 codes, 16 pixels a code; small
has its layout and the demo's size; demo is the demo's, a class before a window of 8 x 8 codes, 8 pixels a code; tiny an
eighth of that. A picture is drawn in parts of a few kinds, each one program: one part of every kind is timed (the
fastest of `--repeats`, after a run that compiles) and counts as often as the picture has parts of its kind; the last
column says how many of how many parts were run. A part of serial and wavefront is `--steps` of them; fewer are timed
sooner. Windows are spread over the devices; one token after the other has one window a picture, and runs on one device
where the batch does not divide. XLA runs a small model's operations on one core, so a CPU is cut into as many devices
as it has cores. Parameters are random; codes alone, without decoding them. "Of a matmul" is the floating-point
operations that drawing needs (no idle windows, each as short as can be) over the time, as a share of the rate of a
large matrix product in the same run. Keep the machine idle meanwhile.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from benchmarks.machine import matmul_rate, transformer
from benchmarks.sampling import initial, row
from configs import demo_transformer, demo_vqgan, paper_transformer, paper_vqgan
from vqgan_jax import cli, parallel
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.sampling.blocks import Blocks
from vqgan_jax.sampling.large import LargeSampler
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.train.setup import DTYPES
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

WAYS = {"serial": dict(serial=True), "wavefront": {}, "stride 4": dict(stride=4), "stride 8": dict(stride=8)}


def _paper() -> tuple[ConfigDict, ConfigDict, dict[str, ConfigDict]]:
    config, first = transformer("depth_imagenet")
    depth = paper_vqgan.get_config(paper_transformer.ROWS["depth_imagenet"].cond).model
    return config.model, first, {"depth": depth}


def _demo() -> tuple[ConfigDict, ConfigDict, dict[str, ConfigDict]]:
    return demo_transformer.get_config().model, demo_vqgan.get_config().model, {}


class Model(NamedTuple):
    """A row: `layout` gives `config.model` of the transformer, of its first stage, and of its conditions' stages."""

    layout: Callable[[], tuple[ConfigDict, ConfigDict, dict[str, ConfigDict]]]
    layers: int
    heads: int
    width: int


MODELS = {
    "tiny": Model(_demo, 2, 4, 64),
    "demo": Model(_demo, 4, 4, 128),
    "small": Model(_paper, 4, 4, 128),
    "307M": Model(_paper, 24, 16, 1024),
}


def build(name: str, dtype: Any) -> ImageTransformer:
    """One of MODELS."""
    layout, *size = MODELS[name]
    config, *stages = layout()
    gpt = config.transformer
    gpt.layers, gpt.heads, gpt.width = size
    first, conditions = jax.tree.map(
        lambda stage: Tokenizer(VQGAN(VQGANConfig.from_config(stage, key="model"))),
        stages,
        is_leaf=lambda x: isinstance(x, ConfigDict),
    )
    return ImageTransformer(TransformerConfig.from_config(config), first, conditions, dtype=dtype)


def flops(model: ImageTransformer, grid: tuple[int, int], stride: int) -> float:
    """Floating-point operations that drawing one picture needs: two a weight and token, and those of attention."""
    c, known = model.gpt, model.condition.length
    d, weights = c.width, 12 * c.width**2 * c.layers

    def window(tokens: np.ndarray) -> np.ndarray:  # its last token's logits, from all before it
        return 2 * tokens * weights + 2 * c.layers * d * tokens * (tokens + 1) + 2 * d * c.head_size

    h, w = model.config.grid
    if not stride:
        rows, columns = (
            range(size) - np.clip(np.arange(size) - n // 2, 0, size - n) for n, size in zip((h, w), grid, strict=True)
        )
        return window(known + rows[:, None] * w + columns).sum()
    total = 0.0
    for windows, (first, column) in Blocks(grid, (h, w), stride).batches():
        drawn = (h - first) * (w - column)
        total += len(windows) * (window(np.asarray(known + h * w - 1)) + (drawn - 1) * 2 * d * c.head_size)
    return total


def seconds(
    model: ImageTransformer,
    params: Any,
    grid: tuple[int, int],
    way: dict[str, Any],
    batch: int,
    top_k: int,
    repeats: int,
    steps: int,
) -> tuple[float, int, int]:
    """Seconds of a batch of pictures, and how many parts were run of how many."""
    alone = "serial" in way and batch % jax.device_count()
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:1] if alone else None)
    sampler = LargeSampler(model, grid, **way, parts=mesh.size, batch=batch, steps=steps)
    with jax.set_mesh(mesh):
        return _seconds(sampler, jax.device_put(params, NamedSharding(mesh, P())), batch, top_k, repeats)


def _seconds(sampler: LargeSampler, params: Any, batch: int, top_k: int, repeats: int) -> tuple[float, int, int]:
    condition = jnp.zeros((batch, sampler.model.condition.length_on(sampler.grid)), jnp.int32)
    keys, strategy = row_keys(0, jnp.arange(batch)), Strategy(top_k=top_k)
    total, programs = 0.0, sampler.programs()
    for positions in programs.values():
        found = []
        for repeat in range(repeats + 1):
            ids = jax.block_until_ready(jnp.zeros((batch, *sampler.grid), jnp.int32))
            start = time.perf_counter()
            jax.block_until_ready(next(sampler(params, condition, keys, strategy, begun=(ids, positions[0]))))
            found += [time.perf_counter() - start] * (repeat > 0)
        total += min(found) * len(positions)
    return total, len(programs), sum(map(len, programs.values()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sliding", description=__doc__.partition("\n")[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=words, default=["demo"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--dtypes", type=words, default=["float32"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--sizes", type=words, default=["512x512", "1024x1024", "2048x512"], help="WIDTHxHEIGHT")
    parser.add_argument("--ways", type=words, default=list(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="of serial and wavefront that are timed at once")
    parser.add_argument("--devices", type=int, default=0, help="simulated, of a CPU")
    args = parser.parse_args()
    if args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
        cli.spread_cpu()
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    for name, dtype in itertools.product(args.models, args.dtypes):
        rate = matmul_rate(DTYPES[dtype])[0] * (1 if jax.default_backend() == "cpu" else jax.device_count())
        print(f"{device}; {name} in {dtype}; a matrix product runs {rate / 1e9:.0f} GFLOP/s\n")
        names = ("s an image", "images/min", "times serial", "TFLOP an image", "of a matmul", "parts run")
        row("width x height", "batch", "way", *names)
        row(*["---"] * (3 + len(names)))
        model = build(name, DTYPES[dtype])
        params = jax.jit(lambda key: initial(model, key))(jax.random.key(0))  # noqa: B023
        for size, batch in itertools.product(args.sizes, args.batches):
            width, height = (int(n) // model.first_stage.factor for n in size.split("x"))
            settings = batch, args.top_k, args.repeats, args.steps
            serial = None
            for way in args.ways:
                took, run, parts = seconds(model, params, (height, width), WAYS[way], *settings)
                serial = took if way == "serial" else serial
                needed = flops(model, (height, width), WAYS[way].get("stride", 0))
                speeds = f"{took / batch:.2f}", f"{60 * batch / took:.2f}", f"{serial / took:.1f}" if serial else ""
                shares = f"{needed / 1e12:.2f}", f"{needed * batch / took / rate:.0%}", f"{run} of {parts}"
                row(size, batch, way, *speeds, *shares)
        print()


if __name__ == "__main__":
    main()
