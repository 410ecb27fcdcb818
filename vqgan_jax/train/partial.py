"""Training some of the parameters, `config.train_only`: all others stay as they are, with statistics and averages.

A leaf's name is its path, network first: "generator/decoder/conv_out/kernel". A prefix covers the leaves below it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vqgan_jax.config import UserError, suggest
from vqgan_jax.train.state import TrainState, Tree

Path = tuple[Any, ...]


def leaf_name(path: Path, kind: Literal["params", "collections"] = "params") -> str:
    """A leaf's name. That of a statistic leaves its collection out, so that a module's name covers its parameters and
    its statistics."""
    return jax.tree_util.keystr(path if kind == "params" else path[:1] + path[2:], simple=True, separator="/")


def under(name: str, prefix: str) -> bool:
    """Whether a prefix covers a name."""
    return name == prefix or name.startswith(f"{prefix}/")


def unknown_part(prefix: str, names: Iterable[str]) -> tuple[str, str] | None:
    """The first part of `prefix` that no name has, and a suggestion, for an error; None if it covers a name."""
    parts, split = prefix.split("/"), [name.split("/") for name in names]
    for depth in range(1, len(parts) + 1):
        known = {"/".join(name[:depth]) for name in split if name[: depth - 1] == parts[: depth - 1]}
        if (part := "/".join(parts[:depth])) not in known:
            return part, suggest(part, known)
    return None


def trains(name: str, train_only: Sequence[str]) -> bool:
    """Whether a leaf trains; without prefixes all do."""
    return not train_only or any(under(name, prefix) for prefix in train_only)


def fixed_codes(train_only: Sequence[str]) -> bool:
    """Whether nothing trains that a VQGAN's codes depend on."""
    makers = [f"generator/{part}" for part in ("encoder", "pre_quant", "quantizer")]
    return bool(train_only) and not any(under(a, b) or under(b, a) for a in train_only for b in makers)


def check_train_only(train_only: Sequence[str], state: TrainState) -> None:
    """Raises UserError for a prefix that covers no parameter of the state, which may be abstract."""
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    for prefix in train_only:
        if unknown := unknown_part(prefix, names):
            raise UserError(f"config.train_only: '{unknown[0]}' is no part of this model{unknown[1]}")


def stop_frozen(params: Tree, train_only: Sequence[str]) -> Tree:
    """Parameters by network, those that stay without gradients: what is behind them alone is not differentiated."""
    if not train_only:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if trains(leaf_name(path), train_only) else jax.lax.stop_gradient(x), params
    )


def keep_frozen(old: TrainState, new: TrainState, train_only: Sequence[str]) -> TrainState:
    """The new state with what stays as it was in the old one: parameters, statistics, averages."""
    if not train_only:
        return new

    def keep(kind: Literal["params", "collections"], old: Tree, new: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, a, b: b if trains(leaf_name(path, kind), train_only) else a, old, new
        )

    return new.replace(
        params=keep("params", old.params, new.params),
        collections=keep("collections", old.collections, new.collections),
        ema=keep("params", old.ema, new.ema),
    )


def optimize_only(
    tx: optax.GradientTransformation, train_only: Sequence[str], network: str
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of one network's parameters that knows those which train alone, and has state for them alone."""
    tx = optax.with_extra_args_support(tx)
    if not train_only:
        return tx

    def pick(tree: Tree) -> dict[str, Any]:
        flat = flatten_dict(tree, sep="/")
        return {name: x for name, x in flat.items() if trains(f"{network}/{name}", train_only)}

    def update(grads: Tree, state: Any, params: Tree, **extra: Any) -> tuple[Tree, Any]:
        updates, state = tx.update(pick(grads), state, pick(params), **extra)
        still = jax.tree.map(jnp.zeros_like, flatten_dict(grads, sep="/"))
        return unflatten_dict(still | updates, sep="/"), state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(pick(params)), update)
