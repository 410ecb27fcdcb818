"""From a config to the functions that a run is made of: what the scripts train with, and `tools.aot` compiles."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqgan_jax.config import UserError, parse_arg, to_dataclass
from vqgan_jax.models.dino import DINO, DINOS
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.quantizers import with_steps
from vqgan_jax.models.resnet import RESNETS, ResNet
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.train import transformer_step, vqgan_step
from vqgan_jax.train.objective import ANNEALING, DURATIONS, VQGANObjective
from vqgan_jax.train.optimizers import make_optimizer, make_schedule
from vqgan_jax.train.partial import optimize_only
from vqgan_jax.train.setup import Durations
from vqgan_jax.train.state import Metrics, TrainState, Tree
from vqgan_jax.transformer import ImageTransformer


class Recipe(NamedTuple):
    """`init(key) -> state` (boxed), `step(state, batch, frozen) -> (state, metrics)`, `learning_rate(step)`."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Mapping[str, jax.Array], Tree], tuple[TrainState, Metrics]]
    learning_rate: Callable[[jax.Array], jax.Array]


def vqgan_recipe(config: ConfigDict, model: VQGAN, durations: Durations) -> Recipe:
    """Stage 1. Raises UserError that names the config key."""
    loss = durations.replace(config.loss, "config.loss", DURATIONS)
    loss["perturbation"] = durations.replace(config.loss.perturbation, "config.loss.perturbation", ANNEALING)
    objective = to_dataclass(VQGANObjective, loss, key="config.loss")
    steps = lambda x, name: durations.steps(x, f"config.model.quantizer.{name}")  # noqa: E731
    resolved = with_steps(model.config.quantizer, steps, config.accumulation)
    model = model.clone(config=dataclasses.replace(model.config, quantizer=resolved))
    learning_rate, optimizer = _optimizer(config, durations)
    changed = ConfigDict(dict(optimizer=discriminator_optimizer(config), batch_size=config.batch_size))
    tx = {"generator": optimizer, "discriminator": _optimizer(changed, durations)[1]}
    tx = {name: optimize_only(tx[name], config.train_only, name) for name in tx}
    repeats = dict(ema_decay=config.ema_decay, accumulation=config.accumulation, train_only=config.train_only)
    step = vqgan_step.make_step(model, objective, LPIPS(), tx, **repeats)
    init = vqgan_step.make_init(model, tx, ema=config.ema_decay > 0)
    return Recipe(init, step, learning_rate)


def transformer_recipe(config: ConfigDict, model: ImageTransformer, durations: Durations) -> Recipe:
    """Stage 2. Raises UserError that names the config key."""
    loss = durations.replace(config.loss, "config.loss", transformer_step.DURATIONS)
    objective = to_dataclass(transformer_step.TransformerObjective, loss, key="config.loss")
    _check_objective(objective, config, model)
    learning_rate, tx = _optimizer(config, durations)
    tx = optimize_only(tx, config.train_only, "transformer")
    repeats = dict(ema_decay=config.ema_decay, accumulation=config.accumulation, train_only=config.train_only)
    step = transformer_step.make_step(model, objective, tx, **repeats)
    return Recipe(transformer_step.make_init(model, tx, ema=config.ema_decay > 0), step, learning_rate)


def _check_objective(
    objective: transformer_step.TransformerObjective, config: ConfigDict, model: ImageTransformer
) -> None:
    """Raises UserError for an objective that the model or the rest of the config does not serve."""
    if objective.permute_until and not model.config.transformer.target_positions:
        raise UserError(
            "config.model.transformer.target_positions: set it to True, or no token knows which one it predicts in the "
            f"random orders of config.loss.permute_until={config.loss.permute_until}"
        )
    if not objective.cca.weight:
        return
    if not config.init_from:
        raise UserError("config.init_from: config.loss.cca contrasts with a trained transformer; name its workdir")
    if config.model.condition.name == "none":
        raise UserError("config.loss.cca.weight: an unconditional model has no condition to contrast; set it to 0")
    if config.checkpoint.keep_best and config.checkpoint.best_metric == "val/nll":
        raise UserError(
            "config.checkpoint.keep_best: config.loss.cca moves away from the best val/nll, so the best checkpoint "
            "would be the first; set it to 0"
        )
    if config.batch_size == config.accumulation:
        raise UserError(
            "config.accumulation: with config.loss.cca the wrong conditions are those of other rows; leave 2 rows or "
            "more to a micro-batch"
        )


def frozen_networks(config: ConfigDict) -> dict[str, Callable[[jax.Array], Tree]]:
    """The frozen networks that a VQGAN's objective needs, by name: of each `key -> variables`, random but for their
    shapes."""
    images, judge = jnp.zeros((1, 64, 64, 3)), config.model.discriminator
    found: dict[str, Callable[[jax.Array], Tree]] = {}
    if uses_lpips(config):
        found["lpips"] = lambda key: LPIPS().init(key, images, images)
    if config.loss.logits_weight and config.loss.reconstruction != "bce":
        found["resnet50"] = lambda key: ResNet(RESNETS["resnet50"]).init(key, images)
    if judge.enabled and judge.name == "dino":
        found["dino"] = lambda key: DINO(DINOS[judge.network], (0,)).init(key, images)
    return found


def uses_lpips(config: ConfigDict) -> bool:
    """Whether a VQGAN's objective needs the frozen LPIPS network."""
    return bool(config.loss.perceptual_weight) and config.loss.reconstruction != "bce"


def discriminator_optimizer(config: ConfigDict) -> ConfigDict:
    """`config.optimizer` with what `config.discriminator_optimizer` changes. Raises UserError for an unknown field."""
    try:
        return parse_arg(config.discriminator_optimizer, **config.optimizer)
    except UserError as error:
        raise UserError(f"config.discriminator_optimizer: {error}") from None


def _optimizer(config: ConfigDict, durations: Durations) -> tuple[Any, Any]:
    settings = durations.optimizer(config)
    learning_rate = make_schedule(settings, durations.total, config.batch_size)
    return learning_rate, make_optimizer(settings, learning_rate)
