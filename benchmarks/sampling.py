"""How close sampling comes to what memory allows: the paper's transformers and the presets of 2026, beside two
baselines of ours.

    python -m benchmarks.sampling --models=307M --batches=1 --dtypes=float32        (a CPU: minutes)
    python -m benchmarks.sampling --models=307M,1.4B --batches=1,8,64 --dtypes=bfloat16 --guidance=1,2   (a GPU)
    python -m benchmarks.sampling --models=1.4B --batches=64 --aot=v5e,v5p,v6e     (bytes alone; needs libtpu, no TPU)
    python -m benchmarks.sampling --device-smoke                                    (a small model, seconds)

The bound of a token step: the bytes it must read (every weight once, of the cache what is filled) over the bandwidth of
a reduction over a large array in the same run. Parameters are random. Baselines: a cache attended over in full, and no
cache (every token runs the whole sequence so far; timed at a few lengths, and summed over all by interpolation).
Images are counted without decoding their codes. Keep the machine idle meanwhile.
"""

import argparse
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.machine import TRANSFORMERS, bandwidth, best, transformer
from vqgan_jax.hlo import Module
from vqgan_jax.models.blocks import MODULATIONS
from vqgan_jax.models.gpt import GPT, cast_weights
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.sampling.decoder import decode, spans
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.tools import topologies
from vqgan_jax.train.setup import DTYPES
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

UNCACHED_LENGTHS = (1, 64, 128, 256)
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # slices of one host


def build(name: str, dtype: Any, smoke: bool = False) -> ImageTransformer:
    """One of TRANSFORMERS that can be guided, or one of its shape that is small."""
    run, stage = transformer(name)
    config = run.model
    config.condition_dropout = 0.1
    if smoke:
        config.transformer.layers, config.transformer.heads, config.transformer.width = 2, 4, 64
    tokenizer = Tokenizer(VQGAN(VQGANConfig.from_config(stage, key="model")))
    return ImageTransformer(TransformerConfig.from_config(config), tokenizer, dtype=dtype)


def initial(model: ImageTransformer, key: jax.Array) -> Any:
    """Random parameters, as the sampler takes them."""
    ids = jnp.zeros((1, 2), jnp.int32)
    boxed = GPT(model.gpt, model.dtype, scan_layers=False).init(key, ids, positions_bt=ids)["params"]
    return cast_weights(nn.unbox(boxed), model.dtype)


@dataclasses.dataclass(frozen=True)
class Counted:
    """Bytes of the mean token step."""

    weights: int
    cache: float  # read: the filled part, the token itself included, and AdaLN's vectors; and the token's row written

    @property
    def total(self) -> float:
        return self.weights + self.cache


def count(model: ImageTransformer, params: Any, sequences: int, attended: float | None = None) -> Counted:
    """What a token step must move for `sequences` rows (guided: twice the images); `attended` positions, by default the
    mean over an image of those that are filled."""
    c, size = model.gpt, jnp.dtype(model.dtype).itemsize
    once = ("_embedding", "modulation_kernel", "modulation_bias")  # of these a row a token, or once a picture
    weights = sum(
        x.size * x.dtype.itemsize
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith(once)
    )
    length = len(model.order)
    start = model.condition.length
    attended = start + (length - 1) / 2 if attended is None else attended
    kept = 2 * c.kv_width * (attended + 1) + c.adaln * MODULATIONS * c.width  # of each layer
    return Counted(weights, sequences * c.layers * kept * size)


def sampler(model: ImageTransformer, buckets: int | None) -> Callable[..., jax.Array]:
    """`(params, labels [b, 1], keys, strategy) -> codes [b, t]`, jitted."""

    @jax.jit
    def run(params: Any, labels: jax.Array, keys: jax.Array, strategy: Strategy) -> jax.Array:
        apply, empty = model.decoder(params)
        null = model.layout.condition(model.null_condition) if strategy.guided else None
        prefix = model.layout.condition(labels)
        return decode(apply, empty, prefix, len(model.order), keys, strategy, null_bt=null, buckets=buckets)

    return run


def uncached(model: ImageTransformer, params: Any, sequences: int, repeats: int) -> float:
    """Seconds an image batch without cache: the whole sequence so far for every token."""
    module = GPT(model.gpt, model.dtype, scan_layers=False)

    @jax.jit
    def last(params: Any, ids: jax.Array) -> jax.Array:
        positions = jnp.arange(ids.shape[1])[None]
        return module.apply({"params": params}, ids, positions_bt=positions, attend=model.attend, last=1)[0]

    length = len(model.order)
    lengths = sorted({min(n, length) for n in UNCACHED_LENGTHS})
    seconds = [best(last, params, jnp.zeros((sequences, n), jnp.int32), repeats=repeats) for n in lengths]
    return float(np.interp(np.arange(1, length + 1), lengths, seconds).sum())


def row(*cells: Any) -> None:
    """Prints a line of a Markdown table."""
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Prints the table of this machine."""
    speed = bandwidth()
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{device}; a reduction reads {speed / 1e9:.1f} GB/s\n")
    names = ("ms/step", "tokens/s", "images/s", "MB/step", "of the bound", "full-length cache")
    names += (f"no cache (interpolated from {len(UNCACHED_LENGTHS)} lengths)",)
    row("model", "dtype", "batch", "guided", *names)
    row(*["---"] * (4 + len(names)))
    for name, dtype in itertools.product(args.models, args.dtypes):
        model = build(name, DTYPES[dtype], args.device_smoke)
        params, length = jax.jit(functools.partial(initial, model))(jax.random.key(0)), len(model.order)
        for batch, scale in itertools.product(args.batches, args.guidance):
            strategy = Strategy(top_k=args.top_k, guidance=scale)
            inputs = params, jnp.zeros((batch, 1), jnp.int32), row_keys(0, jnp.arange(batch)), strategy
            ours, full = (best(sampler(model, n), *inputs, repeats=args.repeats) for n in (None, 1))
            rows = batch * (1 + strategy.guided)
            bytes_step = count(model, params, rows).total
            speeds = f"{1e3 * ours / length:.2f}", f"{batch * length / ours:.1f}", f"{batch / ours:.3f}"
            bound = f"{bytes_step / 1e6:.0f}", f"{length * bytes_step / speed / ours:.0%}"
            without = f"{uncached(model, params, rows, args.repeats) / ours:.1f}x" if args.uncached else ""
            guided = "yes" if strategy.guided else "no"
            row(name, dtype, batch, guided, *speeds, *bound, f"{full / ours:.2f}x", without)
    print(
        "\nThe last two columns: how many times longer an image takes; without a cache, from one token's time", end=" "
    )
    print(f"at {', '.join(map(str, UNCACHED_LENGTHS))} tokens, interpolated between.")


def ahead_of_time(args: argparse.Namespace) -> None:
    """Prints what the TPU compiler moves in a token step, against the count, without a TPU."""
    names = ("attended", "GB counted", "GB moved", "ratio", "by cost analysis", "temporaries / cache", "buckets")
    row("model", "chip", "batch", "guided", *names)
    row(*["---"] * (4 + len(names)))
    for name, chip in itertools.product(args.models, args.aot):
        model = build(name, jnp.bfloat16, args.device_smoke)
        for batch, scale in itertools.product(args.batches, args.guidance):
            guided = scale != 1
            row(
                name,
                chip,
                batch,
                "yes" if guided else "no",
                *compiled_step(model, chip, batch * (1 + guided)),
            )
    print("\nBuckets: what they attend over beyond what is filled, in all bytes of an image.")


def compiled_step(model: ImageTransformer, chip: str, rows: int) -> tuple[str, ...]:
    """One token step in the middle bucket, compiled for a chip: the columns of `ahead_of_time`."""
    devices = topologies.devices_of(CHIPS[chip])
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), P())

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    found = spans(model.condition.length, len(model.order))
    span = found[len(found) // 2][2]

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params: Any, ids: jax.Array, cache: Any) -> Any:
        return model.decoder(params)[0](ids, cache, span)

    params = there(jax.eval_shape(functools.partial(initial, model), jax.random.key(0)))
    cache = there(jax.eval_shape(lambda: model.decoder({})[1](rows)))
    compiled = step.lower(params, there(jnp.zeros((rows, 1), jnp.int32)), cache).compile()
    counted, moved = count(model, params, rows, span).total, Module(compiled.as_text()).counts().memory
    claimed = compiled.cost_analysis()["bytes accessed"] / counted
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    temporaries = compiled.memory_analysis().temp_size_in_bytes / held
    bucketed = sum((last - first) * count(model, params, rows, s).total for first, last, s in found)
    buckets = bucketed / count(model, params, rows).total / found[-1][1]
    gigabytes = f"{counted / 1e9:.2f}", f"{moved / 1e9:.2f}", f"{moved / counted:.2f}"
    return str(span), *gigabytes, f"{claimed:.2f}", f"{temporaries:.3f}", f"{buckets:.2f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.partition("\n")[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=words, default=["307M"], help=f"of {', '.join(TRANSFORMERS)}")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--dtypes", type=words, default=["float32"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--guidance", type=lambda text: [float(n) for n in text.split(",")], default=[1.0])
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-uncached", dest="uncached", action="store_false", help="leave that baseline out")
    parser.add_argument("--aot", type=words, default=[], help=f"count bytes for {', '.join(CHIPS)} instead")
    parser.add_argument("--device-smoke", action="store_true", help="small models: does it run here?")
    args = parser.parse_args()
    (ahead_of_time if args.aot else measure)(args)


if __name__ == "__main__":
    main()
