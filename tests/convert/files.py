"""Checkpoints to import: the golden ones, and copies of them with other tensors or another YAML."""

import numpy as np
import yaml
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from tests import reference as ref
from vqgan_jax.tools import convert
from vqgan_jax.train.portable import read_stage

GOOD = {  # stages by folder, and the tensors of the file
    "vqgan_tiny": ([""], 171),
    "vqseg_tiny": ([""], 152),
    "vqseg_tiny_legacy_format": ([""], 152),
    "gumbel_tiny": ([""], 153),
    "class_transformer_tiny": (["", "first_stage"], 218),
    "depth_transformer_tiny": (["", "first_stage", "cond_stage"], 397),
}


def run(*args):
    return convert.main([f"--{name}" for name in args])


def flat(tree):
    return flatten_dict(tree, sep="/")


def assert_equal(a, b):
    a, b = flat(a), flat(b)
    assert set(a) == set(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def assert_same_import(a, b):
    """Two working directories hold the same stages bit for bit, and the same models."""
    stages = sorted(path.parent.relative_to(a) for path in a.rglob("stage.json"))
    assert stages == sorted(path.parent.relative_to(b) for path in b.rglob("stage.json"))
    for stage in stages:
        (tree, record), (other, other_record) = read_stage(a / stage), read_stage(b / stage)
        assert_equal(tree, other)
        assert record["config"] == other_record["config"]


def mutate(tmp_path, name, change=None, settings=None):
    """A copy of a golden checkpoint as .safetensors with other tensors or another YAML."""
    with ref.checkpoint(f"{name}.ckpt") as opened:
        tensors = {key: opened[key] for key in opened}
    described = yaml.safe_load((ref.GOLDEN / f"{name}.yaml").read_text())
    if change:
        change(tensors)
    if settings:
        settings(described["model"]["params"])
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(described))
    return tmp_path / "x.safetensors"


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def section(*path, **values):
    def change(params):
        for name in path:
            params = params[name]
        params.update(values)

    return change


def without(*path):
    def change(params):
        for name in path[:-1]:
            params = params[name]
        del params[path[-1]]

    return change
