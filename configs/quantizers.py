"""`config.model.quantizer` of every kind, with its defaults (vqgan_jax/models/quantizers)."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from vqgan_jax.config import choose


def vq(codebook_size: int, dim: int) -> ConfigDict:
    """Nearest code by gradient, as published."""
    return ConfigDict(
        dict(
            name="vq",
            codebook_size=codebook_size,
            dim=dim,
            commitment_weight=0.25,
            codebook_weight=1.0,
            restart_below=0.0,
            usage_decay=0.99,
            normalize=False,
            start="uniform",
        )
    )


def ema(codebook_size: int, dim: int) -> ConfigDict:
    """Nearest code by running means, dead codes restarted."""
    return ConfigDict(
        dict(name="ema", codebook_size=codebook_size, dim=dim, commitment_weight=0.25, decay=0.97, restart_below=0.1)
    )


def gumbel(codebook_size: int, dim: int) -> ConfigDict:
    """Gumbel-softmax codes, with the weight and temperatures of the released f8 model."""
    return ConfigDict(
        dict(
            name="gumbel",
            codebook_size=codebook_size,
            dim=dim,
            input_dim=dim,
            kl_weight=1e-8,
            straight_through=True,
            temperature_start=0.9,
            temperature_end=1e-6,
            temperature_steps="1000001",
        )
    )


def annealed_gumbel(codebook_size: int, dim: int) -> ConfigDict:
    """The same with a temperature that falls over the run, as far as DALL-E's (arXiv 2102.12092, appendix A.2)."""
    config = gumbel(codebook_size, dim)
    config.temperature_start, config.temperature_end, config.temperature_steps = 1.0, 1 / 16, "100%"
    return config


def low_dim_vq(codebook_size: int, dim: int = 8) -> ConfigDict:
    """Nearest code on the unit sphere, codes of few numbers (8 to 12) that start all over it."""
    config = vq(codebook_size, dim)
    config.normalize, config.start = True, "sphere"
    return config


def fsq(levels: Sequence[int]) -> ConfigDict:
    """Rounded numbers: (8, 5, 5, 5) are 1000 codes, (7, 5, 5, 5, 5) 4375, (8, 8, 8, 6, 5) 15360."""
    return ConfigDict(dict(name="fsq", levels=tuple(levels)))


def lfq(bits: int) -> ConfigDict:
    """Signs, with an entropy term that weighs more at first (how much, and how long, is ours)."""
    return ConfigDict(
        dict(
            name="lfq",
            bits=bits,
            commitment_weight=0.25,
            entropy_start=0.3,
            entropy_end=0.1,
            entropy_steps="2%",
            diversity_weight=1.0,
            temperature=0.01,
            group_bits=bits,
        )
    )


def bsq(bits: int) -> ConfigDict:
    """Signs on the unit sphere."""
    config = lfq(bits)
    config.name = "bsq"
    return config


def simvq(codebook_size: int, dim: int) -> ConfigDict:
    """Random codes under one learned linear layer."""
    return ConfigDict(
        dict(name="simvq", codebook_size=codebook_size, dim=dim, commitment_weight=0.25, codebook_weight=1.0)
    )


def ibq(codebook_size: int, dim: int) -> ConfigDict:
    """Codes that all learn, through the index."""
    return ConfigDict(
        dict(
            name="ibq",
            codebook_size=codebook_size,
            dim=dim,
            commitment_weight=1.0,
            codebook_weight=0.25,
            index_weight=1.0,
            entropy_weight=0.05,
            entropy_temperature=0.01,
        )
    )


FSQ_LEVELS = {256: (8, 6, 5), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5), 16384: (8, 8, 8, 6, 5)}  # arXiv 2309.15505


def of_size(name: str, codebook_size: int, dim: int) -> ConfigDict:
    """The kind `name` with so many codes of `dim` numbers where it has them: `low_dim` has 8, `lfq` and `bsq` a power
    of 2 of codes, `fsq` the levels of its paper that come nearest. Raises UserError for an unknown one."""
    bits = round(math.log2(codebook_size))
    kinds = {
        "vq": lambda: vq(codebook_size, dim),
        "low_dim": lambda: low_dim_vq(codebook_size),
        "ema": lambda: ema(codebook_size, dim),
        "gumbel": lambda: gumbel(codebook_size, dim),
        "fsq": lambda: fsq(FSQ_LEVELS[min(FSQ_LEVELS, key=lambda size: abs(math.log2(size) - bits))]),
        "lfq": lambda: lfq(bits),
        "bsq": lambda: bsq(bits),
        "simvq": lambda: simvq(codebook_size, dim),
        "ibq": lambda: ibq(codebook_size, dim),
    }
    return choose("quantizer", name, kinds)()
