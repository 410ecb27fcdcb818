"""Workdirs as earlier versions wrote them, one of each format: every later version reads them, draws the same pictures
from them and goes on training them."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

import train_transformer
import train_vqgan
from configs import quantizers
from tests.test_scripts import transformer_config, vqgan_config
from vqgan_jax import pretrained
from vqgan_jax.config import FORMAT_VERSION
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.train.checkpoints import load

GOLDEN = Path(__file__).parents[1] / "golden"


def original_configs(vqgan: Path, steps: str) -> tuple[None, ConfigDict]:
    """What the workdir of format 2 was made with; of its first stage there is the frozen copy alone."""
    config = transformer_config(vqgan, steps)
    config.model.transformer.width = 16
    return None, config


def modern_configs(vqgan: Path, steps: str) -> tuple[ConfigDict, ConfigDict]:
    """What the workdir of format 3 was made with: a tokenizer, of which the discriminator alone learns, so that it
    packs small, and a transformer."""
    first = vqgan_config(steps)
    ae = first.model.autoencoder
    ae.stem, ae.multipliers, ae.z_channels, ae.decoder_extra_blocks = 4, (1,), 32, 0
    first.model.quantizer = quantizers.low_dim_vq(16, 4)
    discriminator = dict(name="blurpool", channels=32, max_channels=32, stages=1, spectral_norm=True)
    first.model.discriminator = ConfigDict(dict(enabled=True) | discriminator)
    first.loss.lecam_weight, first.ema_decay = 0.001, 0.0
    first.train_only, first.init_exclude = ("discriminator",), ("discriminator",)
    second = transformer_config(vqgan, steps)
    gpt = second.model.transformer
    second.ema_decay = 0.0
    gpt.width, gpt.block, gpt.positions, gpt.qk_norm, gpt.adaln = 8, "llama", "rope", True, True
    gpt.target_positions = True
    second.model.condition_dropout = 0.1
    second.loss.permute_from, second.loss.permute_until = "50%", "75%"
    return first, second


FORMATS = {2: original_configs, 3: modern_configs}


@pytest.fixture(params=FORMATS, ids="format_{}".format)
def kept(request, tmp_path) -> tuple[int, Path]:
    """A format and the workdir of it."""
    with zipfile.ZipFile(GOLDEN / f"workdir_format_{request.param}.zip") as archive:
        archive.extractall(tmp_path)
    return request.param, tmp_path


def test_each_format_is_kept():
    assert max(FORMATS) == FORMAT_VERSION


def test_a_kept_workdir_samples_as_it_did(kept):
    version, workdir = kept
    assert load(workdir / "checkpoints")[1]["format_version"] == version
    trained = pretrained.open_transformer(str(workdir), key="--workdir")
    labels = np.arange(4, dtype=np.int32)
    pictures = np.concatenate(list(trained.samples(labels, (4, 4), seed=0, batch=4, strategy=Strategy(greedy=True))))
    then = np.load(workdir / "pictures.npz")["pictures"]
    assert then.std() > 1 and np.abs(pictures.astype(int) - then).max() <= 1  # a compiler rounds as it likes


@pytest.mark.slow
def test_a_kept_workdir_goes_on_training(kept, monkeypatch):
    version, workdir = kept
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(workdir / "cache"))
    first, second = FORMATS[version](workdir / "vqgan", "4")
    second.vqgan = ""
    train_transformer.train(second, str(workdir))
    went_on(workdir, "nll")
    if first:
        train_vqgan.train(first, str(workdir / "vqgan"))
        went_on(workdir / "vqgan", "loss")


def went_on(workdir: Path, metric: str) -> None:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if metric in line] == [1, 2, 3, 4]
    assert load(workdir / "checkpoints")[1]["step"] == 4
