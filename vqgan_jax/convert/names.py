"""The reference's name and layout for each array of ours: one rule a kind, read in both directions.

A rule maps one of our paths ("encoder/level_0_block_1/conv1/kernel") to a `Key`. Import looks each of our arrays up in
the file; what the file holds beyond that must be on a list of known buffers, or the import fails.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqgan_jax.config import UserError

Layout = Literal["same", "conv", "linear", "channel", "row"]


@dataclasses.dataclass(frozen=True)
class Key:
    """A tensor of the reference, and how its axes stand: "conv" OIHW, "linear" [out, in], "channel" [1, c, 1, 1],
    "row" [1, ...]; "same" as ours.

    Of some only the rows from..to of `total` are meant; and where `turned` is a head's width, pairs of neighbours among
    its rows are pairs of halves among our columns.
    """

    name: str
    layout: Layout = "same"
    rows: tuple[int, int] | None = None
    total: int = 0
    turned: int = 0

    def take(self, array: np.ndarray) -> np.ndarray:
        """Brings the tensor into our layout. Raises ValueError for a wrong rank or number of rows."""
        if self.rows:
            if array.shape[:1] != (self.total,):
                raise ValueError(f"{array.shape[0] if array.ndim else 0} rows where {self.total} belong")
            array = array[slice(*self.rows)]
        array = to_ours(array, self.layout)
        if not self.turned:
            return array
        pairs = array.reshape(array.shape[0], -1, self.turned // 2, 2)
        return pairs.swapaxes(2, 3).reshape(array.shape)


def to_ours(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Brings a tensor of the reference into our layout. Raises ValueError for a wrong rank."""
    ranks = {"conv": 4, "linear": 2, "channel": 4}
    if array.ndim != ranks.get(layout, array.ndim):
        raise ValueError(f"{array.ndim} axes where {ranks[layout]} belong")
    match layout:
        case "conv":
            return array.transpose(2, 3, 1, 0)
        case "linear":
            return array.T
        case "channel":
            return array.reshape(-1)
        case "row":
            return array[0]
    return array


def to_reference(array: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `to_ours`."""
    match layout:
        case "conv":
            return array.transpose(3, 2, 0, 1)
        case "linear":
            return array.T
        case "channel":
            return array.reshape(1, -1, 1, 1)
        case "row":
            return array[None]
    return array


_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_AUTOENCODER = [
    (r"level_(\d+)_block_(\d+)", r"{side}.\1.block.\2"),
    (r"level_(\d+)_attention_(\d+)", r"{side}.\1.attn.\2"),
    (r"level_(\d+)_downsample", r"{side}.\1.downsample.conv"),
    (r"level_(\d+)_upsample", r"{side}.\1.upsample.conv"),
    (r"middle/attention", "mid.attn_1"),
    (r"middle/block", "mid.block"),
    (r"/shortcut", ".nin_shortcut"),
    (r"/query$", ".q"),
    (r"/key$", ".k"),
    (r"/value$", ".v"),
    (r"/out$", ".proj_out"),
]
_QUANTIZER = {
    "vq": {"codebook": Key("quantize.embedding.weight")},
    "gumbel": {
        "codebook": Key("quantize.embed.weight"),
        "logits/kernel": Key("quantize.proj.weight", "conv"),
        "logits/bias": Key("quantize.proj.bias"),
    },
}


def generator_key(path: str, quantizer: str = "vq") -> Key:
    """One of the VQGAN generator's parameters; `quantizer` is "vq" or "gumbel"."""
    module, _, rest = path.partition("/")
    if module == "quantizer":
        return _QUANTIZER[quantizer][rest]
    rest, leaf = path.rsplit("/", 1)
    if module in ("encoder", "decoder"):
        side = {"encoder": "down", "decoder": "up"}[module]
        for pattern, replacement in _AUTOENCODER:
            rest = re.sub(pattern, replacement.format(side=side), rest)
    else:
        rest = {"pre_quant": "quant_conv", "post_quant": "post_quant_conv"}[rest]
    return Key(f"{rest.replace('/', '.')}.{_LEAF[leaf]}", "conv" if leaf == "kernel" else "same")


def discriminator_key(path: str, layers: int, prefix: str = "loss.discriminator.main.") -> Key:
    """One of the PatchGAN's parameters or running statistics."""
    module, leaf = path.split("/")
    kind, _, k = module.partition("_")
    number = {"in": 0, "out": 3 * layers + 2}.get(k)
    if number is None:
        number = 3 * int(k) - (kind == "conv")
    if kind == "conv":
        return Key(f"{prefix}{number}.{_LEAF[leaf]}", "conv" if leaf == "kernel" else "same")
    if leaf == "location":
        return Key(f"{prefix}{number}.loc", "channel")
    return Key(f"{prefix}{number}.{({'mean': 'running_mean', 'variance': 'running_var'} | _LEAF)[leaf]}")


VGG_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's `features` indices


def lpips_key(path: str, prefix: str = "") -> Key:
    """One of LPIPS's parameters, by the reference's names ("net.slice1.0.weight", "lin0.model.1.weight")."""
    if match := re.fullmatch(r"linear_(\d)", path):
        return Key(f"{prefix}lin{match[1]}.model.1.weight", "channel")
    stage, k, leaf = re.fullmatch(r"stage_(\d)_conv_(\d)/(\w+)", path).groups()
    layer = VGG_LAYERS[int(stage)][int(k)]
    return Key(f"{prefix}net.slice{int(stage) + 1}.{layer}.{_LEAF[leaf]}", "conv" if leaf == "kernel" else "same")


_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def inception_key(path: str) -> Key:
    """One of the FID Inception's arrays, by the names of pytorch-fid's file ("Mixed_5b.branch1x1.conv.weight")."""
    if path == "fc":
        return Key("fc.weight", "linear")
    module, leaf = path.replace("/", ".").rsplit(".", 1)
    return Key(f"{module}.conv.weight", "conv") if leaf == "kernel" else Key(f"{module}.bn.{_NORM[leaf]}")


def resnet_key(path: str) -> Key:
    """One of a ResNet's arrays, by torchvision's names ("layer1.0.conv1.weight", "layer1.0.bn1.running_mean")."""
    module, leaf = path.rsplit("/", 1)
    if module == "fc":
        return Key(f"fc.{_LEAF[leaf]}", "linear" if leaf == "kernel" else "same")
    module = re.sub(r"^(layer\d)_(\d+)/", r"\1.\2.", module)
    conv, norm = (
        (f"{module}.0", f"{module}.1") if module.endswith("downsample") else (module, module.replace("conv", "bn"))
    )
    return Key(f"{conv}.weight", "conv") if leaf == "kernel" else Key(f"{norm}.{_NORM[leaf]}")


_DINO = {"out": "attn.proj", "qkv": "attn.qkv", "mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2"}


def dino_key(path: str) -> Key:
    """One of a DINO ViT's arrays, by the official file's names ("blocks.0.attn.qkv.weight")."""
    if "/" not in path:
        return Key({"class_token": "cls_token", "position_embedding": "pos_embed"}[path], "row")
    module, leaf = path.rsplit("/", 1)
    if module == "patch_embedding":
        return Key(f"patch_embed.proj.{_LEAF[leaf]}", "conv" if leaf == "kernel" else "same")
    block, layer = re.fullmatch(r"block_(\d+)/(\w+)", module).groups()
    return Key(f"blocks.{block}.{_DINO.get(layer, layer)}.{_LEAF[leaf]}", "linear" if leaf == "kernel" else "same")


def gpt_key(path: str, layer: int | None = None, prefix: str = "") -> Key:
    """One of the transformer's parameters; those under "blocks/" are stacked, one tensor of the reference a layer."""
    top = {
        "token_embedding": Key(f"{prefix}tok_emb.weight"),
        "position_embedding": Key(f"{prefix}pos_emb", "row"),
        "norm_out/scale": Key(f"{prefix}ln_f.weight"),
        "norm_out/bias": Key(f"{prefix}ln_f.bias"),
        "head": Key(f"{prefix}head.weight", "linear"),
    }
    if path in top:
        return top[path]
    rest = path.removeprefix("blocks/")
    if match := re.fullmatch(r"(norm[12])/(scale|bias)", rest):
        return Key(f"{prefix}blocks.{layer}.{match[1].replace('norm', 'ln')}.{_LEAF[match[2]]}")
    name, leaf = rest.rsplit("_", 1)
    name = {
        "attention/query": "attn.query",
        "attention/key": "attn.key",
        "attention/value": "attn.value",
        "attention/out": "attn.proj",
        "mlp_up": "mlp.0",
        "mlp_down": "mlp.2",
    }[name]
    return Key(f"{prefix}blocks.{layer}.{name}.{_LEAF[leaf]}", "linear" if leaf == "kernel" else "same")


def read_tree(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], key: Callable[[str], Key], what: str
) -> dict[str, Any]:
    """Reads one of our trees out of a file of the reference.

    Args:
      tensors: name -> array; each is read once, one at a time.
      shapes: our flat paths and their shapes. Paths under "blocks/" are stacked over their first axis.
      key: a rule above; for stacked paths it takes `layer=`.
      what: what is being read, for the error's text.

    Raises:
      UserError: a tensor that is missing or has another shape.
    """
    flat = {}
    for path, shape in shapes.items():
        if path.startswith("blocks/"):
            stacked = np.empty(shape, np.float32)
            for layer in range(shape[0]):
                stacked[layer] = _read(tensors, key(path, layer=layer), shape[1:], what)
            flat[path] = stacked
        else:
            flat[path] = _read(tensors, key(path), shape, what)
    return unflatten_dict(flat, sep="/")


def _read(tensors: Mapping[str, np.ndarray], key: Key, shape: tuple[int, ...], what: str) -> np.ndarray:
    if key.name not in tensors:
        raise UserError(f"{what}: the file has no tensor '{key.name}'")
    array = tensors[key.name]
    try:
        ours = to_ours(array, key.layout)
    except ValueError as error:
        raise UserError(f"{what}: '{key.name}' has {error}") from None
    if ours.shape != tuple(shape):
        raise UserError(
            f"{what}: '{key.name}' has shape {array.shape}, which gives {ours.shape}; {tuple(shape)} belongs"
        )
    return np.ascontiguousarray(ours, np.float32)


def write_tree(tree: Mapping[str, Any], key: Callable[[str], Key]) -> dict[str, np.ndarray]:
    """The inverse of `read_tree`: our arrays under the reference's names and in its layout."""
    tensors = {}
    for path, value in flatten_dict(tree, sep="/").items():
        value = np.asarray(value)
        if path.startswith("blocks/"):
            for layer in range(value.shape[0]):
                at = key(path, layer=layer)
                tensors[at.name] = np.ascontiguousarray(to_reference(value[layer], at.layout))
        else:
            at = key(path)
            tensors[at.name] = np.ascontiguousarray(to_reference(value, at.layout))
    return tensors


def names_of(shapes: Mapping[str, tuple[int, ...]], key: Callable[[str], Key]) -> Iterable[str]:
    """Every name of the reference that `read_tree` would read."""
    for path, shape in shapes.items():
        if path.startswith("blocks/"):
            yield from (key(path, layer=layer).name for layer in range(shape[0]))
        else:
            yield key(path).name
