"""What is computed again in the backward pass rather than kept, by name: `config.remat`."""

from typing import Any

import flax.linen as nn
import jax

# "": nothing. "block": all of a block but its input. "attention": inside attention alone. "dots": all of a block but
# its products with weights and convolutions.
NAMES = ("", "block", "attention", "dots")


def remat(module: type[nn.Module], part: str, name: str, **options: Any) -> type[nn.Module]:
    """The module's class, a `part` of the model ("block" or "attention"), under the rule `name`.

    Args:
      module: the class.
      part: what it is.
      name: one of NAMES.
      options: of `flax.linen.remat`.

    Raises:
      ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"remat '{name}': known are {', '.join(map(repr, NAMES))}")
    if name == part:
        return nn.remat(module, **options)
    if name == "dots" and part == "block":
        return nn.remat(module, policy=_keep_products, **options)
    return module


def _keep_products(primitive: Any, *args: Any, **params: Any) -> bool:
    return primitive.name == "conv_general_dilated" or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *args, **params
    )
