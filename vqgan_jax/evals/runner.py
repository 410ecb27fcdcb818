"""Scores a data set: loops over padded batches on all devices and hosts and accumulates clu metrics."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vqgan_jax import losses, parallel
from vqgan_jax.config import UserError
from vqgan_jax.evals.codes import NLLMetrics, PerImage
from vqgan_jax.evals.pixels import ReconstructionMetrics, through_uint8
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN, model_input
from vqgan_jax.stopping import breakable
from vqgan_jax.transformer import ImageTransformer

Batches = Iterable[Mapping[str, np.ndarray]]
Tree = Any


@functools.lru_cache(maxsize=4)  # a jit of its own would compile anew at every score inside a training
def reconstruction_step(model: VQGAN, perceptual: LPIPS | None = None) -> Callable[..., tuple[Any, jax.Array, Any]]:
    """Returns the jitted `step(variables, lpips, batch) -> (metrics, reconstructions, lpips values)` of a VQGAN of
    pictures: the batch's ReconstructionMetrics, uint8 [b, h, w, c], and a PerImage of LPIPS distances (None without
    `perceptual`, whose variables are `lpips`)."""
    size = model.config.quantizer.codebook_size

    @jax.jit
    def step(variables: Tree, lpips: Tree, batch: Mapping[str, jax.Array]) -> tuple[Any, jax.Array, Any]:
        images, valid = model_input(model.config, batch), batch["valid"]
        output = model.apply(variables, images)
        scores = ReconstructionMetrics.single_from_model_output(
            image=images, reconstruction=output.reconstruction, codes=output.ids, codebook_size=size, valid=valid
        )
        rebuilt = through_uint8(output.reconstruction)
        distances = None
        if perceptual is not None:
            with jax.default_matmul_precision("highest"):  # accelerators would round inputs to fewer bits
                values = perceptual.apply(lpips, through_uint8(images), rebuilt)
            distances = PerImage.from_model_output(values=values, mask=valid)
        return scores, jnp.round((rebuilt + 1) * 127.5).astype(jnp.uint8), distances

    return step


def reconstruction_scorer(model: VQGAN, mesh: Mesh, batch: int) -> Callable[[Tree, Batches], dict[str, float]]:
    """Returns `score(variables, batches)`: PSNR, SSIM, L1, codebook usage and perplexity of pictures in uint8; for a
    segmentation `bce` and `accuracy`, the share of pixels whose likeliest label is right."""
    if model.config.input_key != "segmentation":
        step = reconstruction_step(model)
        return lambda variables, batches: merge(
            _collect(lambda rows: step(variables, {}, rows)[0], batches, mesh, batch)
        )

    @jax.jit
    def step(variables: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        images, valid = model_input(model.config, batch), batch["valid"]
        output = model.apply(variables, images)
        right = jnp.mean(output.reconstruction.argmax(-1) == images.argmax(-1), axis=(1, 2))
        bce = jax.vmap(losses.binary_cross_entropy)(output.reconstruction, images)
        sums = {name: jnp.sum(jnp.where(valid, x, 0)) for name, x in (("accuracy", right), ("bce", bce))}
        return sums | {"images": valid.sum()}

    def score(variables: Tree, batches: Batches) -> dict[str, float]:
        results = _collect(lambda rows: step(variables, rows), batches, mesh, batch)
        sums = jax.tree.map(lambda *x: float(sum(x)), *results)
        return {name: value / sums["images"] for name, value in sums.items() if name != "images"}

    return score


def likelihood_scorer(
    model: ImageTransformer, mesh: Mesh, batch: int
) -> Callable[[Tree, Tree, Batches], dict[str, float]]:
    """Returns `score(params, frozen, batches)`: `nll` in nats a token, `bits`, `accuracy`, number of tokens."""

    @jax.jit
    def step(params: Tree, frozen: Tree, batch: Mapping[str, jax.Array]) -> NLLMetrics:
        codes = model.codes(frozen, batch)
        logits = model.logits(params, model.condition.tokens(frozen, batch), codes, grouped=True)
        return NLLMetrics.single_from_model_output(logits=logits, targets=model.targets(codes), valid=batch["valid"])

    def score(params: Tree, frozen: Tree, batches: Batches) -> dict[str, float]:
        return merge(_collect(lambda rows: step(params, frozen, rows), batches, mesh, batch))

    return score


def encode_all(model: ImageTransformer, frozen: Tree, batches: Batches, mesh: Mesh, batch: int, what: str) -> Tree:
    """Codes of a whole data set, in order, on every host: {"codes/image": int32 [n, h, w], and `label` where there is
    one}. Reading errors are left out, so that rows keep together."""

    @jax.jit
    def step(frozen: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        ids = model.to_grid(model.codes(frozen, batch))
        return {"codes/image": ids, **{name: batch[name] for name in ("label", "valid") if name in batch}}

    rows = _collect(lambda rows: step(frozen, rows), tqdm(batches, desc=what, unit="batch", delay=2), mesh, batch)
    together = {name: np.concatenate([parallel.to_host(r[name]) for r in rows]) for name in rows[0]}
    valid = together.pop("valid")
    return {name: values[valid] for name, values in together.items()}


def _collect(step: Callable[[Any], Any], batches: Batches, mesh: Mesh, batch: int) -> list[Any]:
    results: list[Any] = []
    with jax.set_mesh(mesh):
        for rows in breakable(batches):
            results.append(step(parallel.put_batch(rows, mesh, batch)))
            jax.block_until_ready(results[-2:-1])  # no long queue on the device, behind which a save would wait
    return results


def merge(results: list[Any]) -> dict[str, float]:
    """One set of figures from the metrics of every batch. Raises UserError: there was none."""
    if not results:
        raise UserError("the data set has no held-out examples to score")
    total = functools.reduce(lambda a, b: a.merge(b), results)
    return {name: float(value) for name, value in total.compute().items()}
