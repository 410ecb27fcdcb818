"""LlamaGen's image tokenizers (FoundationVision/LlamaGen, MIT; arXiv 2406.06525) as our stage 1.

They are the reference's architecture under other names, with codes on the unit sphere; so names are brought to the
reference's, and its rules do the rest.
"""

import re
from collections.abc import Iterable
from typing import Any

from vqgan_jax.convert import detect
from vqgan_jax.convert.settings import Settings
from vqgan_jax.torch_files import TensorFile

BUFFERS = {r"quantize\.codebook_used": "the last codes that training used"}  # what a file may hold beyond our arrays
_MIDDLE = ("mid.block_1", "mid.attn_1", "mid.block_2")
_BLOCK = re.compile(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(res|attn|downsample|upsample)\.")
_REFERENCE_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.")


def is_tokenizer(names: Iterable[str]) -> bool:
    """Whether a file's tensors are of this kind."""
    return any(name.startswith("encoder.conv_blocks.0.") for name in names)


def reference_name(name: str, levels: int) -> str:
    """A tensor's name as the reference has it; the decoder's levels are counted from the coarsest there."""
    if match := _BLOCK.match(name):
        side, level, kind = match.groups()
        place = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{levels - 1 - int(level)}"
        return f"{place}.{'block' if kind == 'res' else kind}.{name[match.end() :]}"
    return re.sub(r"(?<=coder\.)mid\.([012])(?=\.)", lambda match: _MIDDLE[int(match[1])], name)


def llamagen_name(name: str, levels: int) -> str:
    """The inverse of `reference_name`."""
    if match := _REFERENCE_BLOCK.match(name):
        side, level, kind = match.groups()
        if side == "decoder.up":
            level = levels - 1 - int(level)
        return f"{side[:7]}.conv_blocks.{level}.{'res' if kind == 'block' else kind}.{name[match.end() :]}"
    return re.sub("|".join(_MIDDLE), lambda match: f"mid.{_MIDDLE.index(match[0])}", name)


def levels_of(names: Iterable[str]) -> int:
    """How many levels a file's encoder has."""
    return len({match[2] for name in names if (match := _BLOCK.match(name)) and match[1] == "encoder"})


def vqgan_model(tensors: TensorFile, settings: Settings) -> dict[str, Any]:
    """The `config.model` of a file, with the quantizer's weights of its training.

    Args:
      tensors: the file.
      settings: the `params` of its YAML, or an empty section.

    Raises:
      UserError: tensors of another model.
    """
    levels = levels_of(tensors)
    model = detect.vqgan_model({reference_name(name, levels): tensors.shape(name) for name in tensors}, settings)
    sphere = {"commitment_weight": 0.25, "codebook_weight": 1.0, "normalize": True}
    return model | {"quantizer": model["quantizer"] | sphere}
