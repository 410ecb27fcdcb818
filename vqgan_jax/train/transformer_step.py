"""Stage 2: the maximum-likelihood step (arXiv 2012.09841, equation 10) as a pure function of (state, batch, frozen).

In random orders that anneal to the model's own (RAR, arXiv 2411.00776), or against a frozen copy of where it began, for
samples that need no guidance (CCA, arXiv 2410.09347).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vqgan_jax import losses
from vqgan_jax.train.partial import keep_frozen, stop_frozen
from vqgan_jax.train.state import Metrics, TrainState, Tree, accumulate, guard, update_ema
from vqgan_jax.transformer import ImageTransformer

DURATIONS = ("permute_from", "permute_until")  # among the fields of config.loss
REFERENCE = "reference"  # among the frozen networks: the model that CCA starts from


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Condition contrastive alignment, see `losses.condition_contrast`."""

    weight: float  # lambda, 300 to 1000 as published; 0 = off
    beta: float


@dataclasses.dataclass(frozen=True)
class TransformerObjective:
    """What the step minimises. Durations are optimizer steps."""

    keep: float  # share of input codes kept; the rest is replaced by random ones (the reference's pkeep)
    label_smoothing: float
    z_weight: float  # of losses.z_loss
    permute_from: int  # until here every row has a random order of its own,
    permute_until: int  # from here on none has; between them their share falls along a line. 0 = never
    cca: Contrast

    def __post_init__(self) -> None:
        if self.permute_from > self.permute_until:
            raise ValueError(f"permute_from: {self.permute_from} steps, after permute_until ({self.permute_until})")
        if self.cca.weight and self.label_smoothing:
            raise ValueError("label_smoothing: has no place beside cca; set it to 0")

    def permuted_share(self, step: jax.Array) -> jax.Array:
        """The share of rows in random orders, in [0, 1]."""
        left = (self.permute_until - step) / max(self.permute_until - self.permute_from, 1)
        return jnp.clip(left, 0, 1)


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


def random_orders(key: jax.Array, share: jax.Array, rows: int, length: int) -> jax.Array:
    """Orders of `length` codes, int32 [rows, length]: a random one for each of about `share` of the rows, else the
    model's own."""
    key_rows, key_orders = jax.random.split(key)
    own = jnp.arange(length)
    permuted = jax.random.bernoulli(key_rows, share, (rows, 1))
    return jnp.where(permuted, jnp.argsort(jax.random.uniform(key_orders, (rows, length)), axis=-1), own)


class Rows(NamedTuple):
    """What a micro-batch is scored on: local condition ids [b, c], those of other rows where CCA is on; codes [b, t] in
    the order in which they are predicted, the same as inputs, and which ones they are (None: the model's order)."""

    condition: jax.Array
    wrong: jax.Array | None
    codes: jax.Array
    inputs: jax.Array
    permutation: jax.Array | None


def make_step(
    model: ImageTransformer,
    objective: TransformerObjective,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulation: int = 1,
    train_only: Sequence[str] = (),
) -> Callable[[TrainState, Mapping[str, jax.Array], Tree], tuple[TrainState, Metrics]]:
    """Returns the step; `train_only` is as in train/partial.py.

    Metrics: `loss` and `nll` in nats a token, `bits`, `accuracy`, gradient norm, `skipped`; where they are on `z_loss`,
    `permuted` (share of rows), and of CCA `cca/margin` (nats by which a picture gained more under its condition than
    under another's) and `cca/accuracy` (share of the pictures that did).
    """

    def loss_of(params: Tree, frozen: Tree, rows: Rows, dropout: jax.Array) -> tuple[jax.Array, Metrics]:
        params = stop_frozen({"transformer": params}, train_only)["transformer"]
        targets = model.targets(rows.codes)

        def logits_of(params: Tree, condition: jax.Array) -> jax.Array:
            return model.logits(
                params,
                condition,
                rows.inputs,
                permutation_bt=rows.permutation,
                grouped=True,
                train=True,
                rngs={"dropout": dropout},
            )

        def gain(condition: jax.Array, logits: jax.Array) -> jax.Array:
            # The same dropout in both: before the first update nothing is gained.
            before = losses.token_nll(logits_of(frozen[REFERENCE], condition), targets)
            return (before - losses.token_nll(logits, targets)).sum(-1)

        logits = logits_of(params, rows.condition)
        nll = losses.token_nll(logits, targets).mean()
        accuracy = jnp.mean(losses.over_groups(logits.argmax(-1) == targets, jnp.all))
        metrics = {"nll": nll, "bits": nll / math.log(2), "accuracy": accuracy}
        if rows.wrong is None:
            loss = losses.token_nll(logits, targets, objective.label_smoothing).mean()
        else:
            right, wrong = gain(rows.condition, logits), gain(rows.wrong, logits_of(params, rows.wrong))
            same = (rows.wrong == rows.condition).all(-1)
            loss = losses.condition_contrast(right, wrong, same, objective.cca.weight, objective.cca.beta)
            others = jnp.maximum((~same).sum(), 1)
            metrics["cca/margin"] = jnp.where(same, 0, right - wrong).sum() / others
            metrics["cca/accuracy"] = (~same & (right > wrong)).sum() / others
        if objective.z_weight:
            metrics["z_loss"] = losses.z_loss(logits).mean()
            loss += objective.z_weight * metrics["z_loss"]
        return loss, {"loss": loss} | metrics

    def rows_of(state: TrainState, batch: Mapping[str, jax.Array], frozen: Tree, index: jax.Array) -> Rows:
        stream = lambda name: jax.random.fold_in(state.stream(name), index)  # noqa: E731
        codes = inputs = model.codes(frozen, batch)
        condition, wrong, permutation = model.condition.tokens(frozen, batch), None, None
        if objective.cca.weight:
            # The same rows drop both; rolled, as a shuffle would leave some rows their own.
            wrong = model.drop_condition(stream("condition"), jnp.roll(condition, -1, axis=0))
        condition = model.drop_condition(stream("condition"), condition)
        if objective.keep < 1:
            key_mask, key_codes = jax.random.split(stream("corruption"))
            kept = jax.random.bernoulli(key_mask, objective.keep, codes.shape)
            inputs = jnp.where(kept, codes, jax.random.randint(key_codes, codes.shape, 0, model.layout.head_size))
        if objective.permute_until:
            permutation = random_orders(stream("permutation"), objective.permuted_share(state.step), *codes.shape)
            codes, inputs = (jnp.take_along_axis(x, permutation, axis=1) for x in (codes, inputs))
        return Rows(condition, wrong, codes, inputs, permutation)

    def step(state: TrainState, batch: Mapping[str, jax.Array], frozen: Tree) -> tuple[TrainState, Metrics]:
        params = state.params["transformer"]

        def micro(carry, batch, index):
            rows = rows_of(state, batch, frozen, index)
            dropout = jax.random.fold_in(state.stream("dropout"), index)
            grads, metrics = jax.grad(loss_of, has_aux=True)(params, frozen, rows, dropout)
            return carry, (grads, metrics)

        _, (grads, metrics) = accumulate(micro, (), batch, accumulation)
        optimizer = optax.with_extra_args_support(tx)
        updates, opt_state = optimizer.update(grads, state.opt_state["transformer"], params, step=state.step)
        new_params = {"transformer": optax.apply_updates(params, updates)}
        metrics["grad_norm/transformer"] = optax.tree.norm(grads)
        if objective.permute_until:
            metrics["permuted"] = objective.permuted_share(state.step)
        ema = update_ema(state.ema, new_params, ema_decay, state.step) if ema_decay else state.ema
        new = state.replace(params=new_params, opt_state={"transformer": opt_state}, ema=ema)
        return guard(state, keep_frozen(state, new, train_only), metrics)

    return step
