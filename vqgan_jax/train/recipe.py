"""From a config to the functions that a run is made of: what the scripts train with, and `tools.aot` compiles."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vqgan_jax.config import to_dataclass
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.train import transformer_step, vqgan_step
from vqgan_jax.train.optimizers import make_optimizer, make_schedule
from vqgan_jax.train.setup import Durations
from vqgan_jax.train.state import Metrics, TrainState, Tree
from vqgan_jax.transformer import ImageTransformer

_DURATIONS = ("adversarial_start", "adversarial_ramp")  # among the fields of a VQGAN's config.loss


class Recipe(NamedTuple):
    """`init(key) -> state` (boxed), `step(state, batch, frozen) -> (state, metrics)`, `learning_rate(step)`."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Mapping[str, jax.Array], Tree], tuple[TrainState, Metrics]]
    learning_rate: Callable[[jax.Array], jax.Array]


def vqgan_recipe(config: ConfigDict, model: VQGAN, durations: Durations) -> Recipe:
    """Stage 1. Raises UserError that names the config key."""
    loss = durations.replace(config.loss, "config.loss", _DURATIONS)
    objective = to_dataclass(vqgan_step.VQGANObjective, loss, key="config.loss")
    learning_rate, optimizer = _optimizer(config, durations)
    tx = {"generator": optimizer, "discriminator": optimizer}
    repeats = dict(ema_decay=config.ema_decay, accumulation=config.accumulation)
    step = vqgan_step.make_step(model, objective, LPIPS(), tx, **repeats)
    return Recipe(vqgan_step.make_init(model, tx, ema=config.ema_decay > 0), step, learning_rate)


def transformer_recipe(config: ConfigDict, model: ImageTransformer, durations: Durations) -> Recipe:
    """Stage 2. Raises UserError that names the config key."""
    objective = to_dataclass(transformer_step.TransformerObjective, config.loss, key="config.loss")
    learning_rate, tx = _optimizer(config, durations)
    repeats = dict(ema_decay=config.ema_decay, accumulation=config.accumulation)
    step = transformer_step.make_step(model, objective, tx, **repeats)
    return Recipe(transformer_step.make_init(model, tx, ema=config.ema_decay > 0), step, learning_rate)


def uses_lpips(config: ConfigDict) -> bool:
    """Whether a VQGAN's objective needs the frozen LPIPS network."""
    return bool(config.loss.perceptual_weight) and config.loss.reconstruction != "bce"


def _optimizer(config: ConfigDict, durations: Durations) -> tuple[Any, Any]:
    settings = durations.optimizer(config)
    learning_rate = make_schedule(settings, durations.total, config.batch_size)
    return learning_rate, make_optimizer(settings, learning_rate)
