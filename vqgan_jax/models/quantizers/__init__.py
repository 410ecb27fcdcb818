"""Quantizers under one contract: `(z, *, train, step) -> (z_q, ids, aux)`, `codes(ids)`, `codebook_size`, `dim`.

What a quantizer remembers lives in the collection "codebook", its randomness in the stream "quantizer". Distances,
softmaxes and statistics are float32. One file a kind, with its paper.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from vqgan_jax.models.quantizers.contract import (
    Aux,
    Quantizer,
    apply_restart,
    count_codes,
    nearest,
    perplexity,
)
from vqgan_jax.models.quantizers.ema import EMAConfig, EMAVectorQuantizer
from vqgan_jax.models.quantizers.fsq import FiniteScalarQuantizer, FSQConfig
from vqgan_jax.models.quantizers.gumbel import GumbelConfig, GumbelQuantizer
from vqgan_jax.models.quantizers.ibq import IBQConfig, IndexBackpropagationQuantizer
from vqgan_jax.models.quantizers.lookup_free import BinarySphericalQuantizer, BSQConfig, LFQConfig, LookupFreeQuantizer
from vqgan_jax.models.quantizers.simvq import SimVQConfig, SimVQQuantizer
from vqgan_jax.models.quantizers.vq import VectorQuantizer, VQConfig

QuantizerConfig = VQConfig | EMAConfig | GumbelConfig | FSQConfig | LFQConfig | BSQConfig | SimVQConfig | IBQConfig
CONFIGS: dict[str, type[Any]] = {
    "vq": VQConfig,
    "ema": EMAConfig,
    "gumbel": GumbelConfig,
    "fsq": FSQConfig,
    "lfq": LFQConfig,
    "bsq": BSQConfig,
    "simvq": SimVQConfig,
    "ibq": IBQConfig,
}
MODULES = {
    VQConfig: VectorQuantizer,
    EMAConfig: EMAVectorQuantizer,
    GumbelConfig: GumbelQuantizer,
    FSQConfig: FiniteScalarQuantizer,
    LFQConfig: LookupFreeQuantizer,
    BSQConfig: BinarySphericalQuantizer,
    SimVQConfig: SimVQQuantizer,
    IBQConfig: IndexBackpropagationQuantizer,
}

__all__ = [
    "CONFIGS",
    "MODULES",
    "Aux",
    "BSQConfig",
    "BinarySphericalQuantizer",
    "EMAConfig",
    "EMAVectorQuantizer",
    "FSQConfig",
    "FiniteScalarQuantizer",
    "GumbelConfig",
    "GumbelQuantizer",
    "IBQConfig",
    "IndexBackpropagationQuantizer",
    "LFQConfig",
    "LookupFreeQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "SimVQConfig",
    "SimVQQuantizer",
    "VQConfig",
    "VectorQuantizer",
    "apply_restart",
    "count_codes",
    "make_quantizer",
    "nearest",
    "perplexity",
    "with_steps",
]


def with_steps(config: QuantizerConfig, steps: Callable[[str, str], int], parts: int = 1) -> QuantizerConfig:
    """The hyper-parameters as training needs them.

    Args:
      config: as written.
      steps: (a duration, its name) -> the number of steps.
      parts: micro-batches of a step, each of which moves running means: together as far as one batch would.
    """
    names = [field.name for field in dataclasses.fields(config)]
    durations = {name: str(steps(getattr(config, name), name)) for name in names if name.endswith("_steps")}
    decays = {name: getattr(config, name) ** (1 / parts) for name in names if name in ("decay", "usage_decay")}
    return dataclasses.replace(config, **durations, **decays)


def make_quantizer(config: QuantizerConfig, name: str) -> Quantizer:
    """The module of a quantizer's hyper-parameters, under the given parameter name."""
    return MODULES[type(config)](config, name=name)
