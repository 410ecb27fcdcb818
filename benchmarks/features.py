"""How fast are the features of FID, and what do its distances cost?

    python -m benchmarks.features --batches=64,256 --images=4096 --size=256

Random weights and random pictures in memory, so no file is read: images/s of the network alone, of everything that a
score does with a picture, and seconds for the distances between two sets of --vectors. Speeds do not depend on either.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vqgan_jax import cli, parallel
from vqgan_jax.evals import distances
from vqgan_jax.evals.features import PRESETS, FeatureNet, make_extractor
from vqgan_jax.evals.moments import Moments
from vqgan_jax.evals.references import collect, numbered
from vqgan_jax.models import inception

FLAGS = flags.FLAGS
flags.DEFINE_list("batches", ["16", "64"], "Pictures at once.")
flags.DEFINE_integer("images", 256, "Pictures to time.", lower_bound=2)
flags.DEFINE_integer("size", 256, "Height and width of the pictures.")
flags.DEFINE_integer("vectors", 4000, "Feature vectors a side for the distances.", lower_bound=2)


def network_speed(extract, count: int, size: int) -> float:
    """Images a second of resize and network, dispatched without waiting."""
    pixels = np.random.default_rng(0).integers(0, 256, (extract.rows, size, size, 3), np.uint8)
    jax.block_until_ready(extract.run(pixels))  # compiles
    start, runs = time.perf_counter(), max(1, count // extract.rows)
    outputs = [extract.run(pixels)["pool"] for _ in range(runs)]
    jax.block_until_ready(outputs)
    return runs * extract.rows / (time.perf_counter() - start)


def whole_speed(extract, count: int, size: int) -> float:
    """Images a second of `collect`: also fetching, float64 sums and the Inception Score."""
    pixels = np.random.default_rng(0).integers(0, 256, (extract.rows, size, size, 3), np.uint8)
    batches = (pixels[: count - start] for start in range(0, count, extract.rows))
    start = time.perf_counter()
    collect(numbered(batches), extract, count=count, source={})
    return count / (time.perf_counter() - start)


def seconds_of_distances(n: int, dims: int = 2048) -> dict[str, float]:
    """What each distance between two sets of n vectors takes."""
    rng = np.random.default_rng(0)
    a, b = (rng.gamma(0.5, size=(n, dims)).astype(np.float32) for _ in range(2))
    sides = []
    for vectors in (a, b):
        moments = Moments.empty(dims)
        moments.add(vectors)
        sides.append(moments.gaussian())
    timed = {
        "Frechet distance": lambda: distances.frechet(*sides),
        f"KID, {distances.KID_SUBSETS} subsets": lambda: distances.kid(a, b),
        "precision and recall": lambda: distances.precision_recall(a, b),
    }
    seconds = {}
    for name, function in timed.items():
        start = time.perf_counter()
        function()
        seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Prints the two tables."""
    variables = jax.jit(inception.Inception().init)(
        jax.random.key(0), jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    )
    net = FeatureNet("inception", inception.Inception().apply, variables, "", inception.SIZE)
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, pictures of {FLAGS.size} x {FLAGS.size}\n")
    print("| batch | network, images/s | whole score, images/s | 50,000 images |")
    print("|---|---|---|---|")
    for batch in map(int, FLAGS.batches):
        extract = make_extractor(net, PRESETS["adm"], mesh, batch)
        network = network_speed(extract, FLAGS.images, FLAGS.size)
        whole = whole_speed(extract, FLAGS.images, FLAGS.size)
        print(f"| {extract.rows} | {network:.1f} | {whole:.1f} | {50_000 / whole:.0f} s |", flush=True)
    print(f"\n| distance of 2 x {FLAGS.vectors} vectors | seconds |\n|---|---|")
    for name, seconds in seconds_of_distances(FLAGS.vectors).items():
        print(f"| {name} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    cli.run(main, required=())
