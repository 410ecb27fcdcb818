"""Every kind of condition by its name in configs: its config, and how it is built. A new kind is one more row."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vqgan_jax.conditioning import kinds
from vqgan_jax.conditioning.contract import Condition, Grid
from vqgan_jax.conditioning.joint import Joint, JointConfig
from vqgan_jax.config import UserError, choose, to_dataclass
from vqgan_jax.object_tokens import ObjectTokens
from vqgan_jax.tokenizer import Tokenizer

Stages = Mapping[str, Tokenizer]  # VQGANs of conditions by their input_key
ConditionConfig = Any  # of one of the classes in KINDS


class Kind(NamedTuple):
    """A row.

    Attributes:
      config: the frozen dataclass of `config.model.condition`, without `name`.
      build: `(config, grid, stages) -> Condition`; a condition that needs no more than its config may be its own.
    """

    config: type[Any]
    build: Callable[[Any, Grid, Stages], Condition] = lambda config, grid, stages: config


def _encoded_image(config: kinds.EncodedImageConfig, grid: Grid, stages: Stages) -> Condition:
    key = config.input_key
    if key not in stages:
        there = f"; there is one of {', '.join(sorted(stages))}" if stages else ""
        raise UserError(f"config.cond_vqgan: a '{key}' condition needs the workdir of its VQGAN{there}")
    return kinds.EncodedImage(stages[key], grid)


def _joint(config: JointConfig, grid: Grid, stages: Stages) -> Condition:
    return Joint(tuple(make_condition(part, grid, stages) for part in config.parts))


KINDS: dict[str, Kind] = {
    "none": Kind(kinds.UnconditionalConfig, lambda config, grid, stages: kinds.Unconditional()),
    "class": Kind(kinds.ClassLabelConfig, lambda config, grid, stages: kinds.ClassLabel(config.classes)),
    "image": Kind(kinds.EncodedImageConfig, _encoded_image),
    "coordinates": Kind(kinds.CoordinatesConfig, lambda config, grid, stages: kinds.Coordinates(config, grid)),
    "objects": Kind(ObjectTokens, lambda config, grid, stages: kinds.Objects(config)),
    "joint": Kind(JointConfig, _joint),
}


def condition_config(config: Mapping[str, Any], key: str) -> ConditionConfig:
    """Reads `config.model.condition`: the field `name`, and those of that kind's config.

    A joint condition has a field for each part, a condition itself; their tokens stand in the order of the fields'
    names, which no copy of a config loses.

    Raises:
      UserError: that names the key.
    """
    fields = dict(config)
    name = fields.pop("name")
    kind = choose(f"{key}.name", name, KINDS).config
    if kind is not JointConfig:
        return to_dataclass(kind, fields, key=key)
    single = {name: row for name, row in KINDS.items() if name not in ("none", "joint")}
    for part, own in sorted(fields.items()):
        if not isinstance(own, Mapping | ConfigDict) or "name" not in own:
            raise UserError(f"{key}.{part}: a part of a joint condition is a condition itself, with a field 'name'")
        choose(f"{key}.{part}.name", own["name"], single)
    if len(fields) < 2:
        raise UserError(f"{key}: a joint condition has two parts or more, each a field with a name of its own")
    parts = {part: condition_config(own, f"{key}.{part}") for part, own in sorted(fields.items())}
    read: dict[str, str] = {}
    for part, own in parts.items():
        for batch_key in batch_keys(own):
            if batch_key in read:
                raise UserError(f"{key}: '{read[batch_key]}' and '{part}' both read '{batch_key}'; leave one out")
            read[batch_key] = part
    return JointConfig(tuple(parts.values()))


def make_condition(config: ConditionConfig, grid: Grid, stages: Stages) -> Condition:
    """The condition of a config.

    Args:
      config: from `condition_config`.
      grid: of codes that the transformer is trained on.
      stages: the VQGANs of encoded pictures by their input_key.

    Raises:
      UserError: an encoded picture without its VQGAN.
    """
    kind = next(kind for kind in KINDS.values() if kind.config is type(config))
    return kind.build(config, grid, stages)


def parts_of(config: ConditionConfig) -> tuple[ConditionConfig, ...]:
    """The configs of a condition's parts: itself, unless it is several at once."""
    return config.parts if isinstance(config, JointConfig) else (config,)


def encoded_keys(config: ConditionConfig) -> tuple[str, ...]:
    """The batch keys of the pictures that a condition encodes, each with a VQGAN of its own."""
    return tuple(part.input_key for part in parts_of(config) if isinstance(part, kinds.EncodedImageConfig))


def batch_keys(config: ConditionConfig) -> tuple[str, ...]:
    """What a condition needs of a batch, told from its config alone."""
    found: list[str] = []
    for part in parts_of(config):
        encoded = encoded_keys(part)
        found += encoded or make_condition(part, (1, 1), {}).keys
    return tuple(found)
