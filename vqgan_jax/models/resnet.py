"""ResNet-50 and ResNet-101 as torchvision has them (arXiv 1512.03385, with the stride in the 3x3 convolution): the
classifier that rejection sampling asks, and a perceptual distance by its logits. Frozen; float32."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.layers import ConvNorm

SIZE = 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's values in [0, 1]
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_EXPANSION = 4


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Blocks in each of the four stages, width of the first one; tests use a narrow network."""

    depths: tuple[int, ...]
    width: int = 64
    classes: int = 1000


RESNETS = {"resnet50": ResNetConfig((3, 4, 6, 3)), "resnet101": ResNetConfig((3, 4, 23, 3))}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside the input, which a 1x1 convolution adapts in the first block of a stage."""

    width: int
    stride: int
    downsample: bool
    precision: jax.lax.Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = functools.partial(ConvNorm, precision=self.precision)
        y = layer(self.width, name="conv1")(x)
        y = layer(self.width, (3, 3), self.stride, name="conv2")(y)
        y = layer(self.width * _EXPANSION, relu=False, name="conv3")(y)
        if self.downsample:
            x = layer(self.width * _EXPANSION, stride=self.stride, relu=False, name="downsample")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Pictures float32 [b, h, w, 3] in [-1, 1], trained at 224 x 224 -> logits [b, classes], pool [b, 32 width]."""

    config: ResNetConfig
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST  # the same logits on every platform

    @nn.compact
    def __call__(self, x: jax.Array) -> Mapping[str, jax.Array]:
        x = ((x + 1) / 2 - _MEAN) / _DEVIATION
        x = ConvNorm(self.config.width, (7, 7), 2, precision=self.precision, name="conv1")(x)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.config.depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                name = f"layer{stage + 1}_{block}"
                width = self.config.width * 2**stage
                x = Bottleneck(width, stride, not block, self.precision, name=name)(x)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(self.config.classes, precision=self.precision, name="fc")(pool)
        return {"logits": logits, "pool": pool}


def logits_distance(variables: Any, reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Mean squared error of ResNet-50's logits, the perceptual loss of VQGAN+ (MaskBit, arXiv 2409.16211): a scalar.

    Both are brought to 224 x 224 first, bilinear and antialiased, whatever their size, as there.

    Args:
      variables: of the classifier.
      reconstruction, images: float32 [b, h, w, 3] in [-1, 1]; the gradient goes to the first alone.
    """
    net = ResNet(RESNETS["resnet50"], jax.lax.Precision.DEFAULT)

    def logits(x: jax.Array) -> jax.Array:
        x = jax.image.resize(x, (x.shape[0], SIZE, SIZE, x.shape[-1]), "bilinear")
        return net.apply(variables, x)["logits"]

    return jnp.mean((logits(reconstruction) - jax.lax.stop_gradient(logits(images))) ** 2)
