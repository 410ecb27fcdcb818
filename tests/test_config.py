"""Config arguments, durations, dataclasses from configs, and that every leaf of every config can be overridden."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Literal

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import common
from vqgan_jax.config import (
    FORMAT_VERSION,
    GPT2,
    UserError,
    differences,
    parse_arg,
    plain,
    resolve_steps,
    to_dataclass,
    upgrade,
)

ROOT = Path(__file__).parent.parent
SHARED = ("common", "quantizers")  # no configs, but what they are made of
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in SHARED)
# Not finetune, which needs a model (test_finetune.py), nor demo_sweep, which has a chain of others' (test_trials.py).
WALKED = [path for path in CONFIGS if path.stem not in ("finetune", "demo_sweep")]


def load(path: Path, arg: str | None = None) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def leaves(config: ConfigDict, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def overridden(value):
    """Another value of the leaf's type, and how it is written on the command line."""
    match value:
        case bool():
            return not value, str(not value)
        case int():
            return value + 1, str(value + 1)
        case float():
            return value + 0.5, str(value + 0.5)
        case str():
            return "other", "other"
        case tuple():
            return (7, 8), "(7, 8)"
    raise AssertionError(f"a leaf of type {type(value).__name__} cannot be overridden")


@pytest.mark.parametrize("path", WALKED, ids=lambda p: p.stem)
@pytest.mark.parametrize("arg", [None, "runlocal"])
def test_every_leaf_can_be_overridden_from_the_command_line(path, arg, monkeypatch):
    config = load(path, arg)
    argv, expected = ["prog", f"--config={path}" + (f":{arg}" if arg else "")], {}
    for name, value in leaves(config):
        expected[name], text = overridden(value)
        argv.append(f"--config.{name}={text}")
    monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    values(argv)
    found = dict(leaves(values.config))
    assert len(found) > 40
    assert found == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configs_docstring_is_its_launch_command(path):
    assert f"--config=configs/{path.name}" in path.read_text().split('"""')[1]


REFERENCE = {
    "ema_decay": 0.0,
    "data.resize": "bilinear_no_antialias",
    "data.flip": False,
    "optimizer.learning_rate": 4.5e-6,
    "optimizer.scale_by_batch": True,
    "optimizer.schedule": "constant",
    "optimizer.warmup": "0",
    "optimizer.hold": "0",
    "optimizer.clip_norm": 0.0,
}
REFERENCE_VQGAN = REFERENCE | {
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.9,
    "optimizer.weight_decay": 0.0,
    "loss.adaptive_epsilon": 1e-4,
    "loss.schedule": "alternating",
    "loss.adversarial_ramp": "0",
    "loss.idle_discriminator_updates": True,
    "model.quantizer.name": "vq",
    "model.quantizer.codebook_size": 256,
    "model.quantizer.commitment_weight": 1.0,
    "model.quantizer.codebook_weight": 0.25,
}
REFERENCE_TRANSFORMER = REFERENCE | {
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.weight_decay": 0.01,
    "loss.label_smoothing": 0.0,
    "model.shared_vocabulary": True,
}


@pytest.mark.parametrize(
    "name, arg, expected",
    [
        ("demo_vqgan", "reference", REFERENCE_VQGAN),
        ("demo_vqgan", "reference,quantizer=vq", REFERENCE_VQGAN),
        ("demo_transformer", "reference,runlocal", REFERENCE_TRANSFORMER | {"steps": "2"}),
    ],
)
def test_reference_sets_every_oddity(name, arg, expected):
    found = dict(leaves(load(ROOT / "configs" / f"{name}.py", arg)))
    assert {key: found[key] for key in expected} == expected
    assert "model.quantizer.decay" not in found


def test_reference_takes_the_gan_back_to_the_published_one():
    config = common.vqgan()
    plain = common.reference(common.vqgan()).to_dict()
    config.model.discriminator, config.discriminator_optimizer = common.blurpool(), "b1=0.0"
    config.loss.discriminator_start, config.loss.lecam_weight, config.loss.augment = "10%", 1e-3, "cutout"
    assert common.reference(config).to_dict() == plain
    config.model.discriminator = common.dino_heads()
    config.model.discriminator.enabled = False
    assert common.reference(config).model.discriminator.to_dict() == common.patchgan().to_dict() | {"enabled": False}


def test_reference_reaches_conditions_and_leaves_a_gumbel_quantizer():
    config = common.transformer()
    config.model.condition = ConfigDict(dict(name="coordinates", codes=64, factor=16, scheme="joint"))
    assert common.reference(config).model.condition.scheme == "raster"
    config.model.condition = ConfigDict(dict(name="objects", trim=True))
    assert not common.reference(config).model.condition.trim
    config = common.vqgan()
    config.model.quantizer = ConfigDict(dict(name="gumbel", kl_weight=5e-4))
    assert common.reference(config).model.quantizer.to_dict() == dict(name="gumbel", kl_weight=5e-4)


def test_parse_arg():
    spec = dict(runlocal=False, res=64, name="a")
    assert parse_arg("runlocal,res=32", **spec).to_dict() == dict(runlocal=True, res=32, name="a")
    assert parse_arg("b", **spec).name == "b"
    assert not parse_arg(None, **spec).runlocal
    with pytest.raises(UserError, match="did you mean 'runlocal'"):
        parse_arg("runlocl=1", **spec)
    with pytest.raises(UserError, match="takes a value of type int"):
        parse_arg("res=x", **spec)
    with pytest.raises(UserError, match="is a switch"):
        parse_arg("runlocal=maybe", **spec)


@pytest.mark.parametrize(
    "duration, steps",
    [(300, 300), ("300", 300), ("300 steps", 300), ("2 epochs", 250), ("1e3 examples", 125), ("10%", 100), ("0", 0)],
)
def test_durations(duration, steps):
    assert resolve_steps(duration, key="k", batch_size=8, examples=1000, total=1000) == steps


def test_a_bad_duration_names_its_key():
    with pytest.raises(UserError, match="config.steps: '3 weeks' is no duration"):
        resolve_steps("3 weeks", key="config.steps", batch_size=8, examples=1000)


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["a", "b"]


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    widths: tuple[int, ...]
    rate: float


def test_dataclasses_from_configs():
    good = dict(inner=dict(size=3, kind="a"), widths=[1, 2], rate=1)
    assert to_dataclass(Outer, ConfigDict(good), key="c") == Outer(Inner(3, "a"), (1, 2), 1.0)
    for change, message in (
        (dict(inner=dict(sise=3, kind="a")), "c.inner: unknown key 'sise', did you mean 'size'"),
        (dict(inner=dict(size=3)), "c.inner.kind: missing"),
        (dict(inner=dict(size="3", kind="a")), "c.inner.size: takes a value of type int"),
        (dict(inner=dict(size=True, kind="a")), "c.inner.size: takes a value of type int"),
        (dict(inner=dict(size=3, kind="z")), "c.inner.kind: unknown name 'z'"),
        (dict(widths=3), "c.widths: takes a tuple"),
        (dict(rate="fast"), "c.rate: takes a value of type float"),
    ):
        with pytest.raises(UserError, match=message):
            to_dataclass(Outer, good | change, key="c")


def test_differences_name_the_leaves():
    a, b = dict(x=1, y=dict(z=2, w=3)), dict(x=1, y=dict(z=5, w=3))
    assert differences(a, b) == ["y.z: 2 here, 5 there"]
    assert differences(a, a) == []


def test_plain_and_upgrade():
    assert plain(ConfigDict(dict(a=(1, 2), b=dict(c="x")))) == {"a": [1, 2], "b": {"c": "x"}}
    assert upgrade({"format_version": FORMAT_VERSION}) == {"format_version": FORMAT_VERSION}
    old = {"format_version": 1, "config": {"model": {"transformer": {"layers": 2}, "grid": [4, 4]}, "batch_size": 3}}
    new = upgrade(old)
    added = {"condition_dropout": 0.0, "transformer": {**GPT2, "layers": 2}}
    assert new["config"]["model"] == {**old["config"]["model"], **added}
    assert new["format_version"] == FORMAT_VERSION and old["format_version"] == 1 and upgrade(new) == new
    assert new["config"]["train_only"] == []
    assert (
        "condition_dropout"
        not in upgrade({"format_version": 1, "config": {"model": {"quantizer": {}}}})["config"]["model"]
    )
    quantizer = {"name": "vq", "codebook_size": 8}
    newer = upgrade({"format_version": 2, "config": {"model": {"quantizer": quantizer}}})["config"]["model"]
    assert newer["quantizer"] == quantizer | {"normalize": False, "start": "uniform"}
    quantizer = {"name": "bsq", "bits": 8, "entropy_steps": 2000}
    newer = upgrade({"format_version": 3, "config": {"model": {"quantizer": quantizer}}})["config"]["model"]
    assert newer["quantizer"] == quantizer | {"entropy_steps": "2000"}
    old = {"format_version": FORMAT_VERSION, "step": 6, "config": {"batch_size": 4, "model": {}, "train_only": ["x"]}}
    assert upgrade(old) == old | {"examples": 24}
    assert upgrade(old | {"examples": 20})["examples"] == 20
    old = {"format_version": 1, "config": {"model": {}, "data": {"source": "folder", "crop": "center"}}}
    data = upgrade(old)["config"]["data"]
    assert data.keys() >= {"source", "crop", "resize_to", "classes"} and data["crop"] == "center"
    assert data.items() <= (plain(common.data()) | old["config"]["data"]).items()
    with pytest.raises(UserError, match="install a newer one"):
        upgrade({"format_version": FORMAT_VERSION + 1})
