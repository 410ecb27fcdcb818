"""Stage 2: the maximum-likelihood step (arXiv 2012.09841, equation 10) as a pure function of (state, batch, frozen)."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from vqgan_jax import losses
from vqgan_jax.train.state import Metrics, TrainState, Tree, accumulate, guard, update_ema
from vqgan_jax.transformer import ImageTransformer


@dataclasses.dataclass(frozen=True)
class TransformerObjective:
    """What the step minimises."""

    keep: float  # share of input codes kept; the rest is replaced by random ones (the reference's pkeep)
    label_smoothing: float


def make_init(
    model: ImageTransformer, tx: optax.GradientTransformation, ema: bool
) -> Callable[[jax.Array], TrainState]:
    """Returns `init(key) -> TrainState` (boxed), to be run by `parallel.init_sharded`."""

    def init(key: jax.Array) -> TrainState:
        key_params, root = jax.random.split(key)
        params = {"transformer": model.init(key_params)}
        opt_state = {"transformer": tx.init(params["transformer"])}
        return TrainState.create(root, params, {}, opt_state, params if ema else {})

    return init


def make_step(
    model: ImageTransformer,
    objective: TransformerObjective,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulation: int = 1,
) -> Callable[[TrainState, Mapping[str, jax.Array], Tree], tuple[TrainState, Metrics]]:
    """Returns the step. Metrics: `loss` and `nll` in nats a token, `bits`, `accuracy`, gradient norm, `skipped`."""

    def loss_of(params: Tree, condition: jax.Array, codes: jax.Array, inputs: jax.Array, dropout: jax.Array):
        logits = model.logits(params, condition, inputs, train=True, rngs={"dropout": dropout})
        nll = losses.token_nll(logits, codes).mean()
        loss = losses.token_nll(logits, codes, objective.label_smoothing).mean()
        accuracy = jnp.mean(logits.argmax(-1) == codes)
        return loss, {"loss": loss, "nll": nll, "bits": nll / math.log(2), "accuracy": accuracy}

    def step(state: TrainState, batch: Mapping[str, jax.Array], frozen: Tree) -> tuple[TrainState, Metrics]:
        params = state.params["transformer"]

        def micro(carry, batch, index):
            codes = inputs = model.codes(frozen, batch)
            condition = model.condition.tokens(frozen, batch)
            condition = model.drop_condition(jax.random.fold_in(state.stream("condition"), index), condition)
            key_mask, key_codes = jax.random.split(jax.random.fold_in(state.stream("corruption"), index))
            if objective.keep < 1:
                kept = jax.random.bernoulli(key_mask, objective.keep, codes.shape)
                inputs = jnp.where(kept, codes, jax.random.randint(key_codes, codes.shape, 0, model.layout.head_size))
            dropout = jax.random.fold_in(state.stream("dropout"), index)
            grads, metrics = jax.grad(loss_of, has_aux=True)(params, condition, codes, inputs, dropout)
            return carry, (grads, metrics)

        _, (grads, metrics) = accumulate(micro, (), batch, accumulation)
        optimizer = optax.with_extra_args_support(tx)
        updates, opt_state = optimizer.update(grads, state.opt_state["transformer"], params, step=state.step)
        new_params = {"transformer": optax.apply_updates(params, updates)}
        metrics["grad_norm/transformer"] = optax.tree.norm(grads)
        ema = update_ema(state.ema, new_params, ema_decay, state.step) if ema_decay else state.ema
        new = state.replace(params=new_params, opt_state={"transformer": opt_state}, ema=ema)
        return guard(state, new, metrics)

    return step
