"""Scores on a schedule inside both trainers, and the judges of conditions."""

import json

import numpy as np
import pytest

import train_transformer
import train_vqgan
from tests.evals.nets import small_net
from tests.test_scripts import transformer_config, vqgan_config
from vqgan_jax import weights
from vqgan_jax.config import UserError
from vqgan_jax.convert import networks
from vqgan_jax.scoring import judges
from vqgan_jax.train import setup


@pytest.fixture
def small_inception(monkeypatch):
    """The small network in place of Inception, and no weights to be had."""
    monkeypatch.setattr(weights, "fetch", lambda name, *_, **__: name)
    monkeypatch.setattr(networks, "load_inception", lambda path: small_net())


def logged(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_the_trainers_score_themselves(runs, tmp_path, small_inception):
    config = vqgan_config("4")
    config.fid_every, config.fid_preset = "2", "torch-fidelity"
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val/rfid", "min"
    train_vqgan.train(config, str(tmp_path / "vqgan"))
    scores = logged(tmp_path / "vqgan", "val/rfid")
    assert list(scores) == [2, 4] and scores[2] != scores[4] and logged(tmp_path / "vqgan", "val/psnr").keys() == {2, 4}
    manifest = json.loads((tmp_path / "vqgan" / "checkpoints" / "4" / "manifest.json").read_text())
    assert manifest["metrics"]["val/rfid"] == pytest.approx(scores[4])

    config = transformer_config(runs / "vqgan", "3")
    config.fid_every, config.fid_samples, config.fid_preset = "2", 16, "torch-fidelity"
    train_transformer.train(config, str(tmp_path / "gpt"))
    scores = logged(tmp_path / "gpt", "val/fid")
    assert list(scores) == [2, 3] and scores[2] != scores[3] and logged(tmp_path / "gpt", "val/is").keys() == {2, 3}


def test_the_best_by_fid_needs_a_fid_at_every_evaluation(tmp_path, small_inception):
    config = vqgan_config("2")
    config.checkpoint.best_metric = "val/rfid"
    with pytest.raises(UserError, match="config.fid_every: '0', but the best checkpoint is told by val/rfid"):
        train_vqgan.train(config, str(tmp_path / "a"))


def test_judges_of_conditions_know_what_is_attainable(runs):
    config = vqgan_config()
    data = setup.open_data(config, ("image", "segmentation"), factor=1)
    read = lambda source, k: source[int(k)]  # noqa: E731
    rows = [data.val_transform(read(data.val, k), np.random.default_rng(0)) for k in range(16)]
    asked = lambda indices: {"segmentation": np.stack([rows[int(k)]["segmentation"] for k in indices])}  # noqa: E731
    (judge,) = judges.condition_judges(("segmentation", "coords"), data, asked, 16)
    real = judges.read_examples(data.val, data.val_transform, 16)["image"]
    judge.add(real[:5], np.arange(5))
    judge.add(real[5:], np.arange(5, 16))
    right = judge.result()
    assert right["segmentation_agreement"] == pytest.approx(right["segmentation_agreement_real"])
    assert right["segmentation_agreement_shuffled"] < right["segmentation_agreement"] - 0.05
    (judge,) = judges.condition_judges(("segmentation",), data, asked, 16)
    judge.add(real[::-1], np.arange(16))
    assert judge.result()["segmentation_agreement"] < right["segmentation_agreement"] - 0.05
