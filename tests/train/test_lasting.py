"""A workdir that the first release wrote, kept as it was: every later version reads it, draws the same pictures from it
and goes on training it."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import train_transformer
from vqgan_jax import pretrained
from vqgan_jax.config import FORMAT_VERSION
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.train.checkpoints import load

KEPT = Path(__file__).parents[1] / "golden" / "workdir_format_2.zip"


@pytest.fixture
def workdir(tmp_path) -> Path:
    with zipfile.ZipFile(KEPT) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_a_workdir_of_format_2_samples_as_it_did(workdir):
    record = load(workdir / "checkpoints")[1]
    assert record["format_version"] == 2 <= FORMAT_VERSION
    trained = pretrained.open_transformer(str(workdir), key="--workdir")
    labels = np.arange(4, dtype=np.int32)
    pictures = np.concatenate(list(trained.samples(labels, (4, 4), seed=0, batch=4, strategy=Strategy(greedy=True))))
    then = np.load(workdir / "pictures.npz")["pictures"]
    assert np.abs(pictures.astype(int) - then).max() <= 1  # a compiler rounds as it likes


@pytest.mark.slow
def test_a_workdir_of_format_2_goes_on_training(workdir, tmp_path, monkeypatch):
    from tests.test_scripts import transformer_config

    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    config = transformer_config(workdir, steps="4")
    config.vqgan, config.model.transformer.width = "", 16
    train_transformer.train(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "nll" in line] == [1, 2, 3, 4]
    assert load(workdir / "checkpoints")[1]["step"] == 4
