"""How a condition becomes tokens, and tokens a condition: the token layout, the contract, and the kinds by name."""

from vqgan_jax.conditioning.contract import Batch, Condition, Frozen, Grid, Names, Spatial, Whole, names_of
from vqgan_jax.conditioning.joint import Joint, JointConfig
from vqgan_jax.conditioning.kinds import (
    ClassLabel,
    ClassLabelConfig,
    Coordinates,
    CoordinatesConfig,
    EncodedImage,
    EncodedImageConfig,
    Objects,
    Unconditional,
    UnconditionalConfig,
)
from vqgan_jax.conditioning.layout import TokenLayout
from vqgan_jax.conditioning.registry import (
    KINDS,
    ConditionConfig,
    Kind,
    batch_keys,
    condition_config,
    encoded_keys,
    make_condition,
    parts_of,
)

__all__ = [
    "KINDS",
    "Batch",
    "ClassLabel",
    "ClassLabelConfig",
    "Condition",
    "ConditionConfig",
    "Coordinates",
    "CoordinatesConfig",
    "EncodedImage",
    "EncodedImageConfig",
    "Frozen",
    "Grid",
    "Joint",
    "JointConfig",
    "Kind",
    "Names",
    "Objects",
    "Spatial",
    "TokenLayout",
    "Unconditional",
    "UnconditionalConfig",
    "Whole",
    "batch_keys",
    "condition_config",
    "encoded_keys",
    "make_condition",
    "names_of",
    "parts_of",
]
