"""How well a VQGAN reconstructs held-out pictures: pixel metrics, LPIPS and rFID, all of one pass."""

from typing import Any

import jax
import numpy as np

from vqgan_jax import images, parallel
from vqgan_jax.evals.codes import PerImage, mean_and_error
from vqgan_jax.evals.progress import watched
from vqgan_jax.evals.references import Statistics, collect_pairs, compare
from vqgan_jax.evals.runner import merge, reconstruction_scorer, reconstruction_step
from vqgan_jax.images import to_uint8
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.scoring import pictures
from vqgan_jax.scoring.bench import Bench
from vqgan_jax.train import setup

Tree = Any


def score(
    model: VQGAN,
    variables: Tree,
    data: setup.Data,
    bench: Bench,
    examples: int,
    reference: Statistics | None = None,
) -> dict[str, Any]:
    """The scores of a stage on the held-out split.

    Args:
      model: the VQGAN.
      variables: its variables.
      data: the data set; its validation split is scored.
      bench: devices and networks; LPIPS and rFID only where it has theirs.
      examples: at most so many, spread out; 0 for all.
      reference: another set that the reconstructions are compared with.

    Returns:
      val_psnr, val_psnr_p10, val_ssim, val_l1, codebook_usage, codebook_perplexity, val_images (segmentations: val_bce,
      val_accuracy), val_lpips, each mean with its NAME_stderr; rfid and rsfid against the same pictures, rfid_images;
      rfid_reference against `reference`.
    """
    batches = setup.evaluation_batches(bench.batch, bench.mesh, data.val, data.val_transform, examples)
    if model.config.input_key != "image":
        return _named(reconstruction_scorer(model, bench.mesh, bench.batch)(variables, batches))
    count = min(examples or len(data.val), len(data.val))
    network, lpips = bench.perceptual or (None, {})
    step = reconstruction_step(model, network)
    scores: list[Any] = []
    distances: list[PerImage] = []

    def pairs():
        for number, rows in enumerate(batches):
            with jax.set_mesh(bench.mesh):
                metrics, rebuilt, distance = step(variables, lpips, parallel.put_batch(rows, bench.mesh, bench.batch))
            scores.append(metrics)
            distances.extend([] if distance is None else [distance])
            if bench.extract is None:
                continue  # nobody looks at the pictures
            kept, place = pictures.positions(bench.mesh, bench.batch, count, number, rows["valid"])
            yield to_uint8(rows["image"][kept]), parallel.local_rows(rebuilt)[kept], place

    features: dict[str, float] = {}
    if bench.extract is None:
        for _ in pairs():
            pass
    else:
        source = {"split": "val", "images": count}
        originals, rebuilt = collect_pairs(
            watched(pairs(), count, "reconstructions"), bench.extract, count=count, source=source, keep=0
        )
        found = compare(rebuilt, originals)
        features = {f"r{name}": found[name] for name in ("fid", "sfid") if name in found} | {"rfid_images": count}
        if reference is not None:
            features["rfid_reference"] = compare(rebuilt, reference)["fid"]
    result = _named(merge(scores)) | features
    if distances:
        whole = distances[0]
        for part in distances[1:]:
            whole = whole.merge(part)
        result |= mean_and_error("val_lpips", whole.compute())
    return result


def _named(scores: dict[str, float]) -> dict[str, Any]:
    return {name if name.startswith("codebook") else f"val_{name}": value for name, value in scores.items()}


def sheet(model: VQGAN, variables: Tree, data: setup.Data, bench: Bench) -> np.ndarray | None:
    """Held-out pictures above their reconstructions, uint8 [h, w, 3]; None for another kind of input."""
    if model.config.input_key != "image":
        return None
    batches = setup.evaluation_batches(bench.batch, bench.mesh, data.val, data.val_transform, bench.batch)
    shown = parallel.put_batch(next(iter(batches)), bench.mesh, bench.batch)["image"]
    with jax.set_mesh(bench.mesh):
        rebuilt = jax.jit(lambda v, x: model.apply(v, x).reconstruction)(variables, shown)
    shown, rebuilt = (to_uint8(parallel.to_host(x))[:16] for x in (shown, rebuilt))
    rows = [half[x] for x in (slice(0, 8), slice(8, 16)) for half in (shown, rebuilt)]
    return images.grid(np.concatenate(rows), columns=len(rows[0]))
