"""What model a reference checkpoint holds: its architecture from names and shapes, the rest from its YAML.

Everything comes out as `config.model` in our terms. Names and layouts: CompVis/taming-transformers.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from vqgan_jax.conditioning import condition_config
from vqgan_jax.config import GPT2, UserError, choose
from vqgan_jax.convert.settings import Settings
from vqgan_jax.object_tokens import FLAGS

Shapes = Mapping[str, tuple[int, ...]]

# The reference's names for the pictures that its data sets give, and our batch keys.
BATCH_KEYS = {
    "image": "image",
    "depth": "depth",
    "segmentation": "segmentation",
    "edge": "edges",
    "edges": "edges",
    "keypoints": "keypoints",
    "pose": "keypoints",
    "lr": "low_res",
    "low_res": "low_res",
}
OBJECT_KEYS = {"objects_bbox": "boxes", "objects_center_points": "centres"}
ORDERS = {
    "Identity": "row_major",
    "Subsample": "subsample",
    "ZCurve": "zcurve",
    "SpiralOut": "spiral_out",
    "SpiralIn": "spiral_in",
    "Random": "random",
    "AlternateParsing": "alternate",
}
# Where attention stands is in the tensors, so without a YAML the nominal size may be any.
NOMINAL_RESOLUTION = 256


def vqgan_model(shapes: Shapes, settings: Settings, input_key: str | None = None) -> dict[str, Any]:
    """The `config.model` of a VQGAN.

    Args:
      shapes: its tensors' shapes by name, without a prefix.
      settings: the `params` of its YAML, or an empty section.
      input_key: the batch key it reconstructs; None takes the YAML's image_key, or what the channels say.

    Raises:
      UserError: tensors of another model, a setting that contradicts them, or one that is missing.
    """
    found = _autoencoder(shapes, settings)
    if input_key is None:
        input_key = _input_key(shapes, settings, found["in_channels"])
    return {
        "input_key": input_key,
        "autoencoder": found,
        "quantizer": _quantizer(shapes, settings),
        "discriminator": _discriminator(shapes, settings.section("lossconfig", "params")),
    }


def _size(shapes: Shapes, name: str, axes: int, settings: Settings) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"{settings.checkpoint}: the file has no tensor '{name}', which every model of this kind has")
    if len(shapes[name]) != axes or 0 in shapes[name]:
        raise UserError(
            f"{settings.checkpoint}: '{name}' has shape {shapes[name]}, {axes} axes, none of them 0, belong"
        )
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers 0, 1, ... without a gap stand where `pattern` has its group."""
    found = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    return next(k for k in range(len(found) + 1) if k not in found)


def _autoencoder(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    dd = settings.section("ddconfig")
    channels, in_channels, *_ = _size(shapes, "encoder.conv_in.weight", 4, settings)
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    if not levels:
        raise UserError(f"{settings.checkpoint}: the file has no tensors 'encoder.down.*'")
    widths = [_size(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4, settings)[0] for i in range(levels)]
    if not channels or any(width % channels for width in widths):
        raise UserError(f"{settings.checkpoint}: level widths {widths} are no multiples of {channels} channels")
    blocks = _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
    with_attention = [i for i in range(levels) if any(name.startswith(f"encoder.down.{i}.attn.") for name in shapes)]
    resolution = dd.need("resolution") if "resolution" in dd.values else NOMINAL_RESOLUTION
    if isinstance(said := dd.get("attn_resolutions"), list):
        levels_said = [i for i in range(levels) if resolution // 2**i in said]
        if levels_said != with_attention:
            raise UserError(
                f"{dd.source}: {dd.path}.attn_resolutions {said} at resolution {resolution} puts attention at levels "
                f"{levels_said}, the tensors of {dd.checkpoint} have it at {with_attention}"
            )
    found = {
        "in_channels": in_channels,
        "out_channels": _size(shapes, "decoder.conv_out.weight", 4, settings)[0],
        "resolution": resolution,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "decoder_extra_blocks": _count(shapes, r"decoder\.up\.0\.block\.(\d+)\.") - blocks,
        "attention_resolutions": [resolution // 2**i for i in with_attention],
        "mid_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "z_channels": _size(shapes, "decoder.conv_in.weight", 4, settings)[1],
        "dropout": dd.number("dropout", 0.0),
        "stem": 1,
    }
    if (encoded := _size(shapes, "encoder.conv_out.weight", 4, settings)[0]) != found["z_channels"]:
        raise UserError(
            f"{settings.checkpoint}: the encoder gives {encoded} channels, the decoder takes {found['z_channels']}; "
            "models with double_z: true are no VQGANs"
        )
    dd.check(
        ch=channels,
        in_channels=in_channels,
        out_ch=found["out_channels"],
        ch_mult=found["multipliers"],
        num_res_blocks=blocks,
        z_channels=found["z_channels"],
        double_z=False,
    )
    return found


def _quantizer(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    if "quantize.embed.weight" in shapes:
        size, dim = _size(shapes, "quantize.embed.weight", 2, settings)
        scheduler = settings.section("temperature_scheduler_config", "params")
        # Without a YAML: the settings of the released Gumbel model.
        found = {
            "name": "gumbel",
            "codebook_size": size,
            "dim": dim,
            "input_dim": _size(shapes, "quantize.proj.weight", 4, settings)[1],
            "kl_weight": settings.number("kl_weight", 1e-8),
            "straight_through": True,
            "temperature_start": scheduler.number("lr_max", 0.9),
            "temperature_end": scheduler.number("lr_min", 1e-6),
            "temperature_steps": str(int(scheduler.number("max_decay_steps", 1_000_001))),
        }
    else:
        size, dim = _size(shapes, "quantize.embedding.weight", 2, settings)
        # The reference's loss has its beta of 0.25 on the codebook's side.
        found = {
            "name": "vq",
            "codebook_size": size,
            "dim": dim,
            "commitment_weight": 1.0,
            "codebook_weight": 0.25,
            "restart_below": 0.0,
            "usage_decay": 0.99,
            "normalize": False,
            "start": "uniform",
        }
    settings.check(n_embed=size, embed_dim=dim)
    return found


def _input_key(shapes: Shapes, settings: Settings, channels: int) -> str:
    if "image_key" in settings.values:
        return choose(f"{settings.source}: {settings.path}.image_key", settings.need("image_key", str), BATCH_KEYS)
    if "colorize" in shapes:  # the reference's segmentation model keeps the colours of its pictures
        return "segmentation"
    if channels == 3:
        return "image"
    return settings.need("image_key", str)


def _discriminator(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    prefix = "loss.discriminator.main."
    numbers = [int(match[1]) for name in shapes if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))]
    if not numbers:
        return {"enabled": False}
    layers, rest = divmod(max(numbers) - 2, 3)
    if rest or not 1 <= layers <= 8:
        raise UserError(f"{settings.checkpoint}: '{prefix}{max(numbers)}' is not the last layer of a PatchGAN")
    found = {
        "enabled": True,
        "name": "patchgan",
        "spectral_norm": False,
        "channels": _size(shapes, f"{prefix}0.weight", 4, settings)[0],
        "layers": layers,
        "norm": "actnorm" if f"{prefix}3.loc" in shapes else "batch",
    }
    settings.check(
        disc_num_layers=layers,
        disc_ndf=found["channels"],
        disc_in_channels=shapes[f"{prefix}0.weight"][1],
        use_actnorm=found["norm"] == "actnorm",
        disc_conditional=False,
    )
    return found


def condition(settings: Settings, data: Settings, encoder_inside: bool) -> dict[str, Any]:
    """The `config.model.condition` of a transformer.

    Args:
      settings: the model's `params`.
      data: the training data set's `params`, where the reference says what objects look like as tokens.
      encoder_inside: whether the file holds tensors of a condition stage.

    Raises:
      UserError: a kind of condition that is unknown, or a setting that is missing.
    """
    stage = settings.section("cond_stage_config")
    named = settings.get("cond_stage_config")
    kind = named if isinstance(named, str) else stage.target
    if settings.get("downsample_cond_size", -1) not in (-1, None):
        raise UserError(f"{settings.source}: {settings.path}.downsample_cond_size: shrunk conditions are not supported")
    if encoder_inside or kind == "__is_first_stage__":
        where = f"{settings.source}: {settings.path}.cond_stage_key"
        return {"name": "image", "input_key": choose(where, settings.need("cond_stage_key", str), BATCH_KEYS)}
    if settings.get("unconditional") is True or kind in ("__is_unconditional__", "SOSProvider"):
        if token := stage.section("params").get("sos_token", settings.get("sos_token", 0)):
            raise UserError(f"{settings.source}: {settings.path}.sos_token is {token}; only 0 is supported")
        return {"name": "none"}
    if kind == "Labelator":
        return {"name": "class", "classes": stage.section("params").need("n_classes")}
    if kind == "CoordStage":
        params = stage.section("params")
        fields = {"codes": params.need("n_embed"), "factor": params.need("down_factor")}
        return {"name": "coordinates", "scheme": "raster", **fields}
    if settings.text("cond_stage_key", "") in OBJECT_KEYS:
        return {
            "name": "objects",
            "kind": OBJECT_KEYS[settings.need("cond_stage_key", str)],
            "max_objects": data.need("max_objects_per_image"),
            "vocab": data.need("no_tokens"),
            "classes": data.need("no_object_classes"),
            "crop": bool(data.get("encode_crop", False)),
            "flags": [
                *FLAGS[:1] * bool(data.get("use_group_parameter", False)),
                *FLAGS[1:] * bool(data.get("use_additional_parameters", False)),
            ],
            "trim": False,
        }
    if not kind:
        settings.need("cond_stage_config", dict)
    raise UserError(
        f"{settings.source}: {settings.path}.cond_stage_config: '{kind}' is no kind of condition known here"
    )


def transformer_model(
    shapes: Shapes, settings: Settings, condition: Mapping[str, Any], first_stage: Mapping[str, Any], prefix: int | None
) -> dict[str, Any]:
    """The `config.model` of a transformer.

    Args:
      shapes: its tensors' shapes by name, without "transformer.", and those of "permuter.*" with it.
      settings: the model's `params`.
      condition: what `condition` found.
      first_stage: the `config.model` of its first stage.
      prefix: how many first tokens the file's attention mask lets see each other; None where it holds no mask.

    Raises:
      UserError: tensors of another model, a setting that contradicts them, or one that is missing.
    """
    gpt = settings.section("transformer_config", "params")
    vocab, width = _size(shapes, "tok_emb.weight", 2, settings)
    _, block_size, _ = _size(shapes, "pos_emb", 3, settings)
    layers = _count(shapes, r"blocks\.(\d+)\.")
    if not layers:
        raise UserError(f"{settings.checkpoint}: the file has no tensors 'transformer.blocks.*'")
    gpt.check(vocab_size=vocab, block_size=block_size, n_layer=layers, n_embd=width)
    if prefix is None:
        prefix = gpt.need("n_unmasked") if "n_unmasked" in gpt.values else 0
    elif max(gpt.get("n_unmasked", prefix), 1) != max(prefix, 1):  # a prefix of one token is causal
        gpt.check(n_unmasked=prefix)
    heads = gpt.need("n_head")
    if heads < 1 or width % heads:
        raise UserError(f"{gpt.source}: {gpt.path}.n_head is {heads}, by which a width of {width} does not divide")
    grid = _grid(shapes, settings, block_size, condition, first_stage["autoencoder"])
    return {
        "transformer": {
            "layers": layers,
            "heads": heads,
            "width": width,
            "block_size": block_size,
            "prefix": prefix,
            "embed_dropout": gpt.number("embd_pdrop", 0.0),
            "residual_dropout": gpt.number("resid_pdrop", 0.0),
            "attention_dropout": gpt.number("attn_pdrop", 0.0),
            **GPT2,
        },
        "condition": dict(condition),
        "grid": list(grid),
        "order": _order(settings),
        "shared_vocabulary": True,
        "condition_dropout": 0.0,
    }


def _order(settings: Settings) -> str:
    permuter = settings.section("permuter_config")
    return choose(f"{permuter.source}: {permuter.path}.target", permuter.target or "Identity", ORDERS)


def _grid(
    shapes: Shapes, settings: Settings, block_size: int, condition: Mapping[str, Any], first: Mapping[str, Any]
) -> tuple[int, int]:
    """The grid of codes that the transformer was trained on: what fills its positions, else the nominal size's."""
    permuter = settings.section("permuter_config", "params")
    spatial = condition["name"] in ("image", "coordinates")
    length = condition_config(condition, settings.path).length if condition["name"] == "objects" else 1

    def fits(tokens: int) -> bool:
        return (2 * tokens if spatial else length + tokens) - 1 <= block_size

    if {"H", "W"} <= set(permuter.values):
        h, w = permuter.need("H"), permuter.need("W")
        if min(h, w) < 1 or not fits(h * w):
            raise UserError(
                f"{permuter.source}: {permuter.path}: a grid of {h} x {w} does not fit {block_size} positions"
            )
        return h, w
    # Trained on n x n: block_size is as many tokens as there are, or one less, for the last is never an input.
    most = (block_size + 1) // 2 if spatial else block_size + 1 - length
    for tokens in (most, most - 1):
        side = math.isqrt(max(tokens, 0))
        if side and side**2 == tokens:
            return side, side
    side = first["resolution"] // 2 ** (len(first["multipliers"]) - 1)
    if side and fits(side**2):
        return side, side
    raise UserError(
        f"{settings.checkpoint}: {block_size} positions fit no square grid of codes; write the grid to "
        f"{settings.path}.permuter_config.params.H and .W of the YAML"
    )
