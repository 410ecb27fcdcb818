"""Discriminators by name, each one config and one module: what tells pictures from reconstructions.

Each maps (x, train) to float32 logits [b, ...], higher where it takes x for real, and keeps what it remembers between
passes in "batch_stats". Of "dino", x is the feature maps of a frozen network; of the others it is images [b, h, w, c].
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vqgan_jax.models.dino import DINOS
from vqgan_jax.models.discriminators.blurpool import BlurPool, BlurPoolConfig, blur_downsample
from vqgan_jax.models.discriminators.feature_heads import FeatureHeads, FeatureHeadsConfig
from vqgan_jax.models.discriminators.patchgan import ActNorm, BatchNorm, PatchGAN, PatchGANConfig
from vqgan_jax.models.discriminators.spectral import SpectralConv

DiscriminatorConfig = PatchGANConfig | BlurPoolConfig | FeatureHeadsConfig
CONFIGS = {"patchgan": PatchGANConfig, "blurpool": BlurPoolConfig, "dino": FeatureHeadsConfig}
_MODULES = {PatchGANConfig: PatchGAN, BlurPoolConfig: BlurPool, FeatureHeadsConfig: FeatureHeads}

__all__ = [
    "CONFIGS",
    "ActNorm",
    "BatchNorm",
    "BlurPool",
    "BlurPoolConfig",
    "DiscriminatorConfig",
    "FeatureHeads",
    "FeatureHeadsConfig",
    "PatchGAN",
    "PatchGANConfig",
    "SpectralConv",
    "blur_downsample",
    "example_input",
    "make_discriminator",
]


def make_discriminator(config: DiscriminatorConfig, dtype: Dtype = jnp.float32) -> nn.Module:
    """The discriminator that `config` describes."""
    return _MODULES[type(config)](config, dtype)


def example_input(config: DiscriminatorConfig, size: int, channels: int) -> jax.Array | list[jax.Array]:
    """Zeros of the form that the discriminator of pictures [b, size, size, channels] takes, to make its variables."""
    if isinstance(config, FeatureHeadsConfig):
        return [jnp.zeros((1, 1, 1, DINOS[config.network].width))] * len(config.layers)
    return jnp.zeros((1, size, size, channels))
