"""What every layer needs of configs: one-line user errors, config arguments, durations, dataclasses from configs."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")

FORMAT_VERSION = 3
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:e\d+)?)\s*(?P<unit>steps?|epochs?|examples?|%)?")


class UserError(Exception):
    """A mistake a user can mend. One line that names the key or file and the mend; scripts print it and exit with 2."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Returns ", did you mean 'x'?" for a near miss of `name` among `options`, else a list of the options."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1)
    return f", did you mean '{near[0]}'?" if near else f"; there are: {', '.join(options) or 'none'}"


def choose(what: str, name: str, options: Mapping[str, T]) -> T:
    """Returns `options[name]`. Raises UserError that names the config key or flag `what` and a near option."""
    if name not in options:
        raise UserError(f"{what}: unknown name '{name}'{suggest(name, options)}")
    return options[name]


def parse_arg(arg: str | None, **spec: Any) -> ml_collections.ConfigDict:
    """Parses a config argument such as "runlocal,res=64" (the text after the colon of --config=file.py:...).

    Args:
      arg: comma-separated words; `word` alone sets a flag, `key=value` a value. None or "" sets nothing. One bare word
        that is no key of `spec` is the value of the key `name`, where `spec` has one.
      **spec: every known key with its default; the default's type is the type of the value.

    Raises:
      UserError: an unknown key or a value of another type.
    """
    values = dict(spec)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if not equals and key not in spec and "name" in spec:
            key, equals, text = "name", "=", key
        if key not in spec:
            raise UserError(f"config argument '{item}': unknown key '{key}'{suggest(key, spec)}")
        kind = type(spec[key])
        if kind is bool:
            if text.lower() not in ("", "1", "0", "true", "false"):
                raise UserError(f"config argument '{item}': '{key}' is a switch, write '{key}' or '{key}=false'")
            values[key] = text.lower() in ("", "1", "true")
            continue
        try:
            values[key] = kind(text)
        except ValueError:
            raise UserError(f"config argument '{item}': '{key}' takes a value of type {kind.__name__}") from None
    return ml_collections.ConfigDict(values)


def resolve_steps(duration: int | float | str, *, key: str, batch_size: int, examples: int, total: int = 0) -> int:
    """Turns a duration in any unit into steps, rounding to nearest.

    Args:
      duration: a number of steps, or a text such as "300 steps", "2 epochs", "1e6 examples", "10%" (of `total`).
      key: the config key, for the error's text.
      batch_size: examples a step.
      examples: examples an epoch.
      total: steps of the whole run, for percentages.
    """
    match = _DURATION.fullmatch(str(duration).strip())
    if match is None:
        raise UserError(f"{key}: '{duration}' is no duration; write 300, '2 epochs', '1e6 examples' or '10%'")
    number, unit = float(match["number"]), (match["unit"] or "steps").rstrip("s")
    scale = {"step": 1.0, "epoch": examples / batch_size, "example": 1 / batch_size, "%": total / 100}[unit]
    return round(number * scale)


def to_dataclass(cls: type[T], config: Mapping[str, Any], *, key: str) -> T:
    """Builds the frozen dataclass `cls` from a config: every field must be there and nothing else.

    Lists become tuples; nested dataclass fields are built from nested configs.

    Args:
      cls: the dataclass.
      config: a ConfigDict or mapping.
      key: where the config stands, for the error's text ("config.model.autoencoder").

    Raises:
      UserError: an unknown or missing key, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in config:
        if name not in names:
            raise UserError(f"{key}: unknown key '{name}'{suggest(name, names)}")
    values = {}
    for name in names:
        if name not in config:
            raise UserError(f"{key}.{name}: missing")
        values[name] = _convert(hints[name], config[name], f"{key}.{name}")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return to_dataclass(hint, value, key=key)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return None if value is None else _convert(arms[0], value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{key}: takes a tuple such as '(1, 2)', got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in value)
    if origin is typing.Literal:
        choose(key, value, dict.fromkeys(typing.get_args(hint)))
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any:
        return value
    if isinstance(hint, type) and not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{key}: takes a value of type {hint.__name__}, got {value!r}")
    return value


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain nested dicts and lists that JSON holds: what a checkpoint and a workdir record."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: convert(value[k]) for k in value}
        return [convert(v) for v in value] if isinstance(value, (list, tuple)) else value

    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    return convert(config)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names each leaf on which two plain configs differ: ["codebook_size: 256 here, 1024 there", ...]."""
    found = []
    for name in sorted(set(ours) | set(theirs)):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a!r} here, {b!r} there")
    return found


def upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """Brings the plain config of an older checkpoint (`format_version` beside `config`) up to this version.

    Raises:
      UserError: the record was written by a newer version of the project.
    """
    version = record["format_version"]
    if version > FORMAT_VERSION:
        raise UserError(
            f"the checkpoint has format {version}, this vqgan_jax knows {FORMAT_VERSION}: install a newer one"
        )
    if "step" in record and "examples" not in record:  # before runs could change their batch size
        record = record | {"examples": record["step"] * record["config"]["batch_size"]}
    if "config" in record:
        record = record | {"config": upgrade_config(record["config"])}
    return record | {"format_version": FORMAT_VERSION}


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The plain config of any version as this one has it, as far as its model and its data go."""
    newer = {"model": upgrade_model(config["model"]), "train_only": config.get("train_only", [])}  # older: everything
    if "data" in config:  # what version 2 added, as if it had been said
        folders = {"name": "", "images": "images", "masks": "", "depths": "", "segments": 0, "classes": ""}
        later = {"min_objects": 1, "min_box_area": 0.0, "resize_to": 0, "low_res_factor": 8}
        newer["data"] = folders | later | config["data"]
    return dict(config) | newer


GPT2: dict[str, Any] = {  # what version 3 added to transformers, as the reference has it and every config begins
    "block": "gpt2",  # or "llama": RMSNorm, SwiGLU, no biases
    "kv_heads": 0,  # heads of keys and values, each shared by several of queries: a smaller cache; 0: as many as heads
    "mlp_width": 0,  # 0: 4d, of a llama two thirds of that rounded up to a multiple of 256
    "positions": "learned",  # or "rope": rotary ones over the grid; "rope_llamagen": with LlamaGen's condition token
    "qk_norm": False,  # RMSNorm of each head's queries and keys
    "adaln": False,  # each block scaled, shifted and gated by the mean of the condition's embeddings
    "drop_path": 0.0,  # share of rows that leave the last layer out in training, from 0 at the first
    "target_positions": False,  # each token knows the place of the one that it predicts: for random orders
    "head_bits": 0,  # k > 0: codes of 2^n, read as groups of k bits with an output a value of each group
}


def upgrade_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """A plain `config.model` of any version as this one has it; what was not there yet, as if it had been said."""
    newer = dict(model)
    if "transformer" in newer:
        newer = {"condition_dropout": 0.0} | newer
        newer["transformer"] = GPT2 | newer["transformer"]
    if "quantizer" in newer:  # its durations were numbers of steps
        fields = newer["quantizer"].items()
        quantizer = {name: str(value) if name.endswith("_steps") else value for name, value in fields}
        later = {"normalize": False, "start": "uniform"} if quantizer.get("name") == "vq" else {}
        newer["quantizer"] = later | quantizer
    if "discriminator" in newer:
        newer["discriminator"] = {"name": "patchgan", "spectral_norm": False} | newer["discriminator"]
    return newer
