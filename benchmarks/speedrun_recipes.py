"""What the speedrun compares, as data: overrides of its two configs by name. The first of each table is the original's
recipe, the others change pieces of it. The last joins the pieces that held in runs short and long: of stage 1 EMA
codes, averaged weights, no attention and clipping; of stage 2 the Llama block (benchmarks/RESULTS.md says what each
does). `modern+gan` adds the GAN's side of later recipes; `modern_vqgan` and `modern_transformer` are the recipes for
ImageNet at this size."""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from configs import common, modern_transformer, modern_vqgan, quantizers
from vqgan_jax.config import UserError, choose, suggest

# By dotted key of the config: the value, or what makes it of the config so far.
Overrides = Mapping[str, Any | Callable[[ConfigDict], Any]]


@dataclasses.dataclass(frozen=True)
class Form:
    """A size of the whole speedrun, whatever the budget: what measures has to be the same. Steps and models stand in
    the configs, under the form's name.

    Attributes:
      classifier_steps: of the classifier whose features the proxies compare.
      examples: held-out pictures that are reconstructed, at most.
      samples: drawn of a transformer.
    """

    classifier_steps: int
    examples: int
    samples: int


FORMS = {"cpu": Form(900, 1000, 1000), "gpu": Form(6000, 2000, 4000)}
SCENES_SHARE = 1 / 3  # of the classifier's steps: the embedded scenes are told apart at once


@dataclasses.dataclass(frozen=True)
class Piece:
    """A recipe of one stage: a config and what changes in it.

    Attributes:
      overrides: of the config.
      sampler: of stage 2: fields of sampling.Strategy.
      module: of configs/, which takes the argument `form`; None for the speedrun's own.
      arg: the rest of its argument.
    """

    overrides: Overrides = dataclasses.field(default_factory=dict)
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: ModuleType | None = None
    arg: str = ""

    def config(self, default: ModuleType, form: str) -> ConfigDict:
        """The changed config at this size."""
        words = [*filter(None, [self.arg]), f"form={form}"]
        return change((self.module or default).get_config(",".join(words)), self.overrides)


def _blurpool(config: ConfigDict) -> ConfigDict:
    """As wide as the PatchGAN that it takes the place of, or as GroupNorm's 32 groups ask; pictures of 64 take two
    stages."""
    return common.blurpool(max(32, config.model.discriminator.channels), stages=2)


NO_ATTENTION = {"model.autoencoder.attention_resolutions": (), "model.autoencoder.mid_attention": False}
SYMMETRIC = {"model.autoencoder.blocks": 2, "model.autoencoder.decoder_extra_blocks": 0}
VQ8 = {"model.quantizer": quantizers.low_dim_vq(1024, 8)}
BLURPOOL = {"model.discriminator": _blurpool}
LECAM = {"loss.lecam_weight": 0.001}
BETAS = {"optimizer.b1": 0.9, "optimizer.b2": 0.99}
EMA_WEIGHTS = {"ema_decay": 0.99}
COSINE = {"optimizer.schedule": "cosine", "optimizer.warmup": "5%"}
CLIP = {"optimizer.clip_norm": 1.0}
LATENT_NOISE = {"loss.perturbation.share": 1.0}
DIFFAUG = {"loss.augment": "color,translation,cutout"}
FIXED_WEIGHT = {"loss.adaptive": False, "loss.adversarial_weight": 0.1, "loss.adversarial_ramp": "10%"}
SPECTRAL_NORM = {"model.discriminator.spectral_norm": True}
AHEAD = {"loss.discriminator_start": "25%"}  # of a generator that it counts for from 50 %
BLOCKS4 = {"model.autoencoder.blocks": 4}
ONE_PASS = {"loss.schedule": "simultaneous", "loss.idle_discriminator_updates": False}

EMA = {"model.quantizer": quantizers.ema(1024, 16)}
MODERN = NO_ATTENTION | EMA_WEIGHTS | CLIP
GAN = BETAS | COSINE | FIXED_WEIGHT | ONE_PASS

TOKENIZERS = {
    "reference": Piece(),
    "vq8": Piece(VQ8),
    "restart": Piece({"model.quantizer.restart_below": 0.1}),
    "ema": Piece(EMA),
    "gumbel": Piece({"model.quantizer": quantizers.annealed_gumbel(1024, 64)}),
    "fsq": Piece({"model.quantizer": quantizers.fsq((8, 5, 5, 5))}),
    "lfq": Piece({"model.quantizer": quantizers.lfq(10)}),
    "bsq": Piece({"model.quantizer": quantizers.bsq(10)}),
    "simvq": Piece({"model.quantizer": quantizers.simvq(1024, 64)}),
    "ibq": Piece({"model.quantizer": quantizers.ibq(1024, 64)}),
    "no_attention": Piece(NO_ATTENTION),
    "no_attention+symmetric": Piece(NO_ATTENTION | SYMMETRIC),
    "blocks4": Piece(BLOCKS4),
    "spectral_norm": Piece(SPECTRAL_NORM),
    "blurpool": Piece(BLURPOOL),
    "blurpool+lecam": Piece(BLURPOOL | LECAM),
    "betas": Piece(BETAS),
    "ema_weights": Piece(EMA_WEIGHTS),
    "cosine": Piece(COSINE),
    "clip": Piece(CLIP),
    "diffaug": Piece(DIFFAUG),
    "ahead": Piece(AHEAD),
    "fixed_weight": Piece(FIXED_WEIGHT),
    "one_pass": Piece(ONE_PASS),
    "latent_noise": Piece(LATENT_NOISE),
    "no_gan": Piece({"model.discriminator.enabled": False}),
    "modern_vqgan": Piece(module=modern_vqgan, arg="speedrun"),
    "modern+vq8": Piece(MODERN | VQ8),
    "modern+gan": Piece(MODERN | EMA | GAN),
    "modern": Piece(MODERN | EMA),
}

LLAMA = {
    "model.transformer.block": "llama",
    "model.transformer.positions": "rope",
    "model.transformer.qk_norm": True,
}
GUIDANCE = {"model.condition_dropout": 0.1}
RAR = {"model.transformer.target_positions": True, "loss.permute_from": "50%", "loss.permute_until": "75%"}
RAMPED = {"guidance": 3.0, "power": 1.0, "schedule": "power-cosine"}
TRANSFORMERS = {
    "reference": Piece(),
    "cosine": Piece(COSINE | CLIP),
    "llama": Piece(LLAMA),
    "guidance": Piece(GUIDANCE, {"guidance": 1.5}),
    "rar": Piece(RAR),
    "llama+guidance+cosine": Piece(LLAMA | GUIDANCE | COSINE | CLIP, {"guidance": 1.5}),
    "modern_transformer": Piece({}, RAMPED, modern_transformer, "speedrun"),
    "modern": Piece(LLAMA),
}

PIECES = {"tokenizer": TOKENIZERS, "transformer": TRANSFORMERS}


def find(name: str) -> tuple[str, str]:
    """The pieces of both stages of a recipe: "modern" is both of that name, "fsq/llama" a tokenizer and a transformer.

    Raises:
      UserError: no such piece.
    """
    first, slash, second = name.partition("/")
    choose("--recipes", first, TOKENIZERS)
    second = second if slash else (first if first in TRANSFORMERS else next(iter(TRANSFORMERS)))
    choose("--recipes", second, TRANSFORMERS)
    return first, second


def change(config: ConfigDict, overrides: Overrides) -> ConfigDict:
    """The config with these overrides; a whole part (a quantizer) is replaced by another.

    Raises:
      UserError: a key that the config has not.
    """
    for key, value in overrides.items():
        *path, leaf = key.split(".")
        part = config
        for name in path:
            part = part[name]
        if leaf not in part:
            raise UserError(f"config.{key}: unknown key{suggest(leaf, part)}")
        made = value(config) if callable(value) else value
        with part.ignore_type():
            part[leaf] = ConfigDict(made) if isinstance(made, Mapping) else made
    return config
