"""Frozen networks of others from their published files: LPIPS, the FID's Inception, torchvision's ResNets, DINO."""

import os
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vqgan_jax import storage
from vqgan_jax.config import UserError, choose
from vqgan_jax.convert import names
from vqgan_jax.evals.features import FeatureNet
from vqgan_jax.models import inception, resnet
from vqgan_jax.models.dino import DINO, DINOS
from vqgan_jax.models.inception import Inception
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.resnet import RESNETS, ResNet
from vqgan_jax.torch_files import open_tensors

Tree = Any


def load_lpips(vgg: str | os.PathLike, heads: str | os.PathLike) -> Tree:
    """LPIPS's variables from torchvision's VGG16 and the `lpips` package's linear heads.

    Raises:
      UserError: a file that is not what its name says.
    """
    params: dict[str, Any] = {}
    with open_tensors(vgg) as trunk, open_tensors(heads) as linear:
        for stage, (depth, layers) in enumerate(zip(LPIPS().config.depths, names.VGG_LAYERS, strict=True)):
            for k, layer in zip(range(depth), layers, strict=True):
                weight, bias = (_tensor(trunk, f"features.{layer}.{leaf}", vgg) for leaf in ("weight", "bias"))
                params[f"stage_{stage}_conv_{k}"] = {"kernel": names.to_ours(weight, "conv"), "bias": bias}
            params[f"linear_{stage}"] = names.to_ours(_tensor(linear, f"lin{stage}.model.1.weight", heads), "channel")
    return {"params": params}


def load_inception(path: str | os.PathLike) -> FeatureNet:
    """The FID's Inception network from pytorch-fid's file (.pth of either format, .safetensors).

    Raises:
      UserError: a tensor is missing, has another shape, or is not one of this network's.
    """
    # The last layer's bias is part of the file and of no score.
    return _load_frozen("inception", Inception(), inception.SIZE, names.inception_key, path, unused=("fc.bias",))


def load_resnet(name: str, path: str | os.PathLike) -> FeatureNet:
    """torchvision's "resnet50" or "resnet101": pictures float32 [b, 224, 224, 3] in [-1, 1] -> logits [b, 1000].

    Raises:
      UserError: another name, or as `load_inception`.
    """
    return _load_frozen(name, ResNet(choose("classifier", name, RESNETS)), resnet.SIZE, names.resnet_key, path)


def load_dino(name: str, path: str | os.PathLike) -> Tree:
    """The variables of "dino_vits8" or "dino_vits16" from the official file of the backbone.

    Raises:
      UserError: another name, or as `load_inception`.
    """
    config = choose("DINO", name, DINOS)
    # The last norm is part of the file and of no feature map.
    unused = ("norm.weight", "norm.bias")
    return _load_frozen(name, DINO(config, (config.depth,)), config.size, names.dino_key, path, unused).variables


def _load_frozen(
    name: str,
    module: nn.Module,
    size: int,
    key: Callable[[str], names.Key],
    path: str | os.PathLike,
    unused: Collection[str] = (),
) -> FeatureNet:
    abstract = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract["params"], sep="/").items()}
    known = {*names.names_of(shapes, key), *unused}
    with open_tensors(path) as tensors:
        params = names.read_tree(tensors, shapes, key, f"{path}: {name}")
        strange = sorted(x for x in tensors if x not in known and not x.endswith(".num_batches_tracked"))
    if strange:
        raise UserError(f"{path}: '{strange[0]}' is no tensor of {name} ({len(strange)} such)")
    return FeatureNet(name, module.apply, {"params": params}, storage.sha256(path), size)


def _tensor(tensors: Any, name: str, path: str | os.PathLike) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path}: has no tensor '{name}'")
    return tensors.read(name)
