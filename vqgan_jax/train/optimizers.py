"""Learning-rate schedules and optimizers from `config.optimizer`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with optional decoupled decay, clipping and a schedule. Durations are steps."""

    learning_rate: float
    scale_by_batch: bool  # the reference's rule: learning_rate is for one example and is multiplied by the global batch
    b1: float
    b2: float
    epsilon: float
    weight_decay: float  # on kernels only
    clip_norm: float  # of the whole gradient; 0 = off
    schedule: Literal["constant", "cosine", "linear"]
    warmup: int  # steps from 0 to the peak
    hold: int  # steps at the peak before the decay starts
    final_share: float  # of the peak, where the decay ends


def make_schedule(config: OptimizerConfig, total: int, batch_size: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, hold, then constant, half a cosine or a line down to the final share."""
    peak = config.learning_rate * (batch_size if config.scale_by_batch else 1)
    decay = max(total - config.warmup - config.hold, 1)
    tail = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay, config.final_share),
        "linear": optax.linear_schedule(peak, peak * config.final_share, decay),
    }[config.schedule]
    parts, borders = [tail], []
    if config.hold:
        parts, borders = [optax.constant_schedule(peak), *parts], [config.hold]
    if config.warmup:
        ramp = lambda step: peak * (step + 1) / config.warmup  # noqa: E731
        parts, borders = [ramp, *parts], [config.warmup, *(border + config.warmup for border in borders)]
    return optax.join_schedules(parts, borders)


def kernels_only(params: Any) -> Any:
    """True for weights that decay: kernels and the head, by name (stacked biases and scales are 2-D too)."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").rsplit("/", 1)[-1]
        return name.endswith("kernel") or name == "head"

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, mask: Callable[[Any], Any] = kernels_only
) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay on what `mask` says, learning rate. Equals torch's Adam and AdamW.

    `update` takes the run's `step`: an optimizer that waits (the discriminator's) or skips a step keeps to the run's
    schedule. The state has one shape whatever is on, so that a run can change clipping and decay when it resumes.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask) if config.weight_decay else optax.identity(),
        _scale_by_schedule(schedule),
    )


def _scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Minus the learning rate of the `step` handed to `update`, where optax counts its own updates."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None, *, step: jax.Array, **_: Any):
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
