"""Two tiny runs, trained once for all tests of this folder."""

import os
from pathlib import Path

import pytest

import train_transformer
import train_vqgan
from tests.test_scripts import transformer_config, vqgan_config
from vqgan_jax.scoring import judges


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Workdirs `vqgan` and `gpt` after four steps, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("scored")
    before = os.environ.get("VQGAN_JAX_CACHE")
    os.environ["VQGAN_JAX_CACHE"] = str(folder / "cache")
    train_vqgan.train(vqgan_config(), str(folder / "vqgan"))
    train_transformer.train(transformer_config(folder / "vqgan"), str(folder / "gpt"))
    yield folder
    if before is None:
        os.environ.pop("VQGAN_JAX_CACHE", None)
    else:
        os.environ["VQGAN_JAX_CACHE"] = before


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Classifiers that need not be good."""
    monkeypatch.setattr(judges, "CLASSIFIER_STEPS", 5)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What scores trained models compiles for minutes; `make test` scores both stages in test_scripts.py."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "runs" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
