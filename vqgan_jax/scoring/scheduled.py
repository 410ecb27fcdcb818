"""The same scores inside the trainers, every `config.fid_every`: rFID of held-out pictures, FID of fresh samples."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax import parallel
from vqgan_jax.config import UserError
from vqgan_jax.evals.features import FeatureNet
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.scoring import reconstruction
from vqgan_jax.scoring.bench import SPLITS, Bench, open_bench, statistics_cache
from vqgan_jax.scoring.generation import Generation
from vqgan_jax.train import setup
from vqgan_jax.trained_transformer import Stages, TrainedTransformer
from vqgan_jax.transformer import ImageTransformer

Scorer = Callable[[Any, int], Mapping[str, float]]
_RANKS = ("val/fid", "val/rfid")


def is_on(config: ConfigDict, examples: int) -> bool:
    """Whether a run over so many training examples scores itself. Raises UserError where the best checkpoint could not
    be told by it."""
    durations = setup.Durations(config, examples)
    every, evaluated = (
        durations.steps(config[key], f"config.{key}", at_least=1) for key in ("fid_every", "eval_every")
    )
    if config.checkpoint.best_metric in _RANKS and (not every or every != evaluated):
        raise UserError(
            f"config.fid_every: '{config.fid_every}', but the best checkpoint is told by "
            f"{config.checkpoint.best_metric}; set it to config.eval_every, '{config.eval_every}'"
        )
    return every > 0


def _bench(config: ConfigDict, mesh: Mesh, net: FeatureNet | None) -> Bench:
    return open_bench(
        batch=config.batch_size,
        seed=config.seed,
        mesh=mesh,
        features=True,
        preset=config.fid_preset,
        preset_key="config.fid_preset",
        inception_weights=config.fid_weights,
        flag="--config.fid_weights",
        net=net,
        cache=statistics_cache(),
    )


def stage_1(
    config: ConfigDict,
    mesh: Mesh,
    model: VQGAN,
    data: setup.Data,
    variables: Callable[[Any], Any],
    net: FeatureNet | None = None,
) -> Scorer | None:
    """`rfid` of `config.fid_samples` held-out pictures (0: all), for train_vqgan.py; None where it is off.

    Args:
      config: the whole config.
      mesh: of the run.
      model: the VQGAN.
      data: its data.
      variables: state -> variables of the sampled generator.
      net: another feature network than Inception (tests).

    Raises:
      UserError: weights that cannot be had, or a model of something else than pictures.
    """
    if not is_on(config, len(data.train)):
        return None
    if model.config.input_key != "image":
        raise UserError(f"config.fid_every: a model of '{model.config.input_key}' has no FID; set it to 0")
    bench = _bench(config, mesh, net)

    def score(state: Any, step: int) -> Mapping[str, float]:
        found = reconstruction.score(model, variables(state), data, bench, config.fid_samples)
        return {"rfid": found["rfid"]}

    return score


def stage_2(
    config: ConfigDict,
    mesh: Mesh,
    model: ImageTransformer,
    stages: Stages,
    data: setup.Data,
    open_images: Callable[[], setup.Data],
    params: Callable[[Any], Any],
    net: FeatureNet | None = None,
) -> Scorer | None:
    """`fid` and `is` of `config.fid_samples` samples against `config.fid_reference`, for train_transformer.py.

    Args:
      config: the whole config; samples are drawn by `config.sampling`.
      mesh: of the run.
      model: the transformer with its stages.
      stages: the frozen stages.
      data: what the run trains on, perhaps codes.
      open_images: opens the pictures, where the reference is a split of them.
      params: state -> parameters of the sampled transformer.
      net: another feature network than Inception (tests).
    """
    if not is_on(config, len(data.train)):
        return None
    bench = _bench(config, mesh, net)
    setting = {name: value for name, value in config.sampling.items()}
    prepared: list[Generation] = []

    def score(state: Any, step: int) -> Mapping[str, float]:
        host = jax.tree.map(parallel.to_host, params(state))
        if not prepared:  # the reference's pass over the data waits until the first score is due
            images = open_images() if config.fid_reference in SPLITS else None
            reference = bench.reference(config.fid_reference, images, config)
            trained = TrainedTransformer(model, host, stages.frozen, stages, {})
            count = config.fid_samples
            prepared.append(Generation(trained, data, bench, count=count, reference=reference, judged=False, keep=0))
        prepared[0].update(host)
        try:
            found, _ = prepared[0].score(setting)
        finally:
            prepared[0].release()  # training needs the memory
        return {"fid": found["fid"]} | ({"is": found["is_mean"]} if "is_mean" in found else {})

    return score
