"""The memorisation score: samples and held-out pictures against the whole training set (evals/memorisation.py)."""

from typing import Any

import jax
import numpy as np

from vqgan_jax.evals import memorisation
from vqgan_jax.evals.progress import watched
from vqgan_jax.evals.references import numbered
from vqgan_jax.images import from_uint8, to_uint8
from vqgan_jax.scoring import pictures
from vqgan_jax.scoring.bench import Bench
from vqgan_jax.scoring.judges import read_examples
from vqgan_jax.train import setup

CANDIDATES = 8  # nearest by features, among which LPIPS chooses
SHOWN = 32


def score(samples: np.ndarray, data: setup.Data, bench: Bench) -> tuple[dict[str, Any], np.ndarray]:
    """How near samples come to the training set, compared with as many held-out pictures.

    Args:
      samples: uint8 [n, h, w, 3], the same on all hosts.
      data: the data set; every training picture is looked at.
      bench: the feature network; LPIPS orders the nearest by feature where it has it.

    Returns:
      memorisation_closer and memorisation_copies (evals.memorisation), the same with _lpips where there is LPIPS,
      memorisation_samples, memorisation_held_out; and a sheet of samples, each with its nearest training picture on
      its right, the nearest pairs first.
    """
    held_out = read_examples(data.val, data.val_transform, len(samples))["image"]
    queries = np.concatenate([samples, held_out])
    found = list(bench.extract(numbered([queries])))
    vectors = np.concatenate([f.pool for f in found])[np.argsort(np.concatenate([f.indices for f in found]))]
    nearest = memorisation.Nearest(vectors, CANDIDATES)
    count = len(data.train)
    batches = setup.evaluation_batches(bench.batch, bench.mesh, data.train, data.val_transform, 0)
    train = pictures.of_batches(batches, bench.mesh, bench.batch, count)
    features_of = bench.extract(train)
    for features in watched(features_of, count, "training images", rows=lambda features: len(features.indices)):
        nearest.add(features.pool, features.indices)
    distances, indices = nearest.result()
    ours, theirs = np.split(distances[:, 0], [len(samples)])
    result: dict[str, Any] = {
        "memorisation_closer": memorisation.closer_share(ours, theirs),
        "memorisation_copies": memorisation.copy_share(ours, theirs),
        "memorisation_samples": len(samples),
        "memorisation_held_out": len(held_out),
    }
    chosen, order = indices[: len(samples), 0], ours

    def read(index: int) -> np.ndarray:
        return to_uint8(data.val_transform(data.train[index], np.random.default_rng(0))["image"])

    if bench.perceptual is not None:
        network, variables = bench.perceptual
        apply = jax.jit(network.apply)

        def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            with jax.set_mesh(bench.mesh.local_mesh), jax.default_matmul_precision("highest"):  # as val_lpips
                return np.asarray(apply(variables, from_uint8(a), from_uint8(b)))

        by_lpips, best = memorisation.nearest_by(distance, queries, indices, read)
        ours, theirs = np.split(by_lpips, [len(samples)])
        result["memorisation_closer_lpips"] = memorisation.closer_share(ours, theirs)
        result["memorisation_copies_lpips"] = memorisation.copy_share(ours, theirs)
        chosen, order = best[: len(samples)], ours
    shown = np.argsort(order, kind="stable")[:SHOWN]
    return result, memorisation.sheet(samples[shown], np.stack([read(int(chosen[i])) for i in shown]))
