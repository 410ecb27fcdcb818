"""LlamaGen's class-conditional transformers (FoundationVision/LlamaGen, MIT; arXiv 2406.06525) as our stage 2.

Their files hold no number of heads and no grid: the published widths and file names say them, else a YAML. Pairs of a
rotary position are neighbours there and halves here (models/rope.py), and the condition's token has no key.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vqgan_jax.config import GPT2, UserError
from vqgan_jax.convert.names import Key
from vqgan_jax.convert.settings import Settings
from vqgan_jax.convert.slots import Slot
from vqgan_jax.models.gpt import GPT, GPTConfig
from vqgan_jax.torch_files import TensorFile

CODES, CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
BUFFERS = {r"freqs_cis": "rotary positions"}  # what a file may hold beyond our arrays
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2560: 40, 3200: 32}  # by width, as published
_FACTOR = 16  # pixels a code, of the tokenizer that all class-conditional models were trained on
_LAYER = {
    "norm1/scale": ("attention_norm", "same"),
    "norm2/scale": ("ffn_norm", "same"),
    "attention/out_kernel": ("attention.wo", "linear"),
    "mlp_gate_kernel": ("feed_forward.w1", "linear"),
    "mlp_up_kernel": ("feed_forward.w3", "linear"),
    "mlp_down_kernel": ("feed_forward.w2", "linear"),
}


def is_transformer(tensors: TensorFile) -> bool:
    """Whether a file is of this kind."""
    return CODES in tensors and "layers.0.attention.wqkv.weight" in tensors


def transformer_model(tensors: TensorFile, settings: Settings) -> dict[str, Any]:
    """The `config.model` of a file; dropouts are those of its training.

    Args:
      tensors: the file.
      settings: the `params` of its YAML, or an empty section; `n_head` and `block_size` where nothing else says them.

    Raises:
      UserError: tensors of another model, or a number that is missing.
    """
    (_, width), (classes, _) = (_shape(tensors, name, 2) for name in (CODES, CLASSES))
    hidden, _ = _shape(tensors, "layers.0.feed_forward.w1.weight", 2)
    layers = len({match[1] for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))})
    heads, tokens = _heads(tensors, settings, width), _tokens(tensors, settings)
    side = math.isqrt(tokens)
    if heads < 1 or width % (4 * heads) or side**2 != tokens or classes < 2:
        raise UserError(
            f"{tensors.path}: {heads} heads, {tokens} tokens and {classes} classes do not fit a width of {width}; "
            "mend model.params.n_head and block_size of the YAML"
        )
    kv_heads = (_shape(tensors, "layers.0.attention.wqkv.weight", 2)[0] - width) * heads // (2 * width)
    llama = {
        "block": "llama",
        "positions": "rope_llamagen",
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "mlp_width": hidden,
    }
    sizes = {"layers": layers, "heads": heads, "width": width, "block_size": 0, "prefix": 0}
    dropouts = {"embed_dropout": 0.1, "residual_dropout": 0.1, "attention_dropout": 0.0}
    return {
        "transformer": sizes | dropouts | GPT2 | llama,
        "condition": {"name": "class", "classes": classes - 1},  # the last one is the null class
        "grid": [side, side],
        "order": "row_major",
        "shared_vocabulary": False,
        "condition_dropout": 0.1,
    }


def _shape(tensors: TensorFile, name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"{tensors.path}: the file has no tensor '{name}', which every model of this kind has")
    shape = tensors.shape(name)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"{tensors.path}: '{name}' has shape {shape}, {axes} axes, none of them 0, belong")
    return shape


def _heads(tensors: TensorFile, settings: Settings, width: int) -> int:
    if "freqs_cis" in tensors:  # [1 + tokens, half a head's width, 2]
        return width // (2 * _shape(tensors, "freqs_cis", 3)[1])
    if "n_head" not in settings.values and width in _HEADS:
        return _HEADS[width]
    return settings.need("n_head")


def _tokens(tensors: TensorFile, settings: Settings) -> int:
    if "freqs_cis" in tensors:
        return _shape(tensors, "freqs_cis", 3)[0] - 1
    if "block_size" not in settings.values and (match := re.search(r"_(256|384|512)\.\w+$", tensors.path.name)):
        return (int(match[1]) // _FACTOR) ** 2
    return settings.need("block_size")


def transformer_slots(model: Mapping[str, Any], codes: int) -> tuple[Slot, ...]:
    """The arrays of a transformer in LlamaGen's terms; the tables of codes and of classes are one table of ours.

    Args:
      model: what `transformer_model` found.
      codes: of its tokenizer.
    """
    t, classes = model["transformer"], model["condition"]["classes"] + 1
    sizes = {name: t[name] for name in ("layers", "heads", "width", "prefix", *GPT2) if name != "positions"}
    dropouts = dict.fromkeys(("embed_dropout", "residual_dropout", "attention_dropout"), 0.0)
    config = GPTConfig(codes + classes, codes, 1, coordinates=(None, (0, 0)), condition=1, **sizes | dropouts)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), ids, positions_bt=ids)))["params"]
    slots = []
    for path, leaf in flatten_dict(params, sep="/").items():
        name, stacked, joined = f"params/transformer/{path}", path.startswith("blocks/"), ()
        if path == "token_embedding":
            keys, joined = (Key(CODES), Key(CLASSES)), (codes, classes)
        elif stacked:
            keys = tuple(_layer_key(config, path.removeprefix("blocks/"), layer) for layer in range(config.layers))
        else:
            keys = ({"norm_out/scale": Key("norm.weight"), "head": Key("output.weight", "linear")}[path],)
        slots.append(Slot(name, leaf.shape, keys, stacked=stacked, joined=joined))
    return tuple(slots)


def _layer_key(config: GPTConfig, path: str, layer: int) -> Key:
    if path in _LAYER:
        name, layout = _LAYER[path]
        return Key(f"layers.{layer}.{name}.weight", layout)
    d, kv = config.width, config.kv_width
    rows = {"query": (0, d), "key": (d, d + kv), "value": (d + kv, d + 2 * kv)}
    part = path.removeprefix("attention/").removesuffix("_kernel")
    turned = config.head_width if part != "value" else 0
    return Key(f"layers.{layer}.attention.wqkv.weight", "linear", rows[part], d + 2 * kv, turned)
