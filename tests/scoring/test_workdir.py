"""What evaluate.py says of a workdir: every score, what defines it, sweeps that go on, rejection, following a run."""

import json
import shutil

import jax
import numpy as np
import pytest

import evaluate
from tests.evals.nets import small_net
from tests.test_scripts import transformer_config
from vqgan_jax.config import UserError
from vqgan_jax.evals.moments import Gaussian
from vqgan_jax.evals.references import Statistics
from vqgan_jax.models.lpips import LPIPS, LPIPSConfig
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.scoring import bench, generation, sweeps

SCORED = dict(batch=8, examples=0, samples=24, seed=0)


def asked(**fields) -> evaluate.Asked:
    return evaluate.Asked(preset="torch-fidelity", net=small_net(), **fields)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Every score of the transformer, and where it lies."""
    folder = tmp_path_factory.mktemp("whole")
    found = evaluate.evaluate(str(runs / "gpt"), str(folder / "all.json"), **SCORED, asked=asked(memorisation=8))
    return found, folder


def test_every_score_and_what_defines_it(whole, runs):
    found, folder = whole
    names = {"fid", "sfid", "is_mean", "precision", "recall", "kid_mean", "rfid", "rsfid", "val_psnr", "val_nll"}
    names |= {"val_bits_per_dim", "table_nll", "class_agreement", "memorisation_closer", "memorisation_copies"}
    assert names <= set(found)
    assert found["samples"] == 24 and found["reference_samples"] == 32 and found["memorisation_samples"] == 8
    assert json.loads((folder / "all.json").read_text()) == found
    assert (folder / "nearest.png").exists() and (folder / "reconstructions.png").exists()
    definition = found["definition"]
    assert definition["preset"] == "torch-fidelity" and definition["network"]["sha256"] == "0" * 64
    assert definition["checkpoint"]["step"] == 4 and len(definition["checkpoint"]["parameters_sha256"]) == 64
    assert definition["reference"]["split"] == "train" and definition["reference"]["images"] == 32
    stage = json.loads((runs / "gpt" / "first_stage" / "stage.json").read_text())
    assert definition["stages"] == {"first_stage": stage["sha256"]}
    assert definition["seed"] == 0 and definition["config"]["model"]["grid"] == [4, 4]
    assert {"jax", "flax", "vqgan_jax"} <= set(definition["versions"])
    nats = found["val_nll"] * 16  # tokens of a 4x4 grid, over 16x16 pixels
    assert found["val_bits_per_dim"] == pytest.approx(nats / (np.log(2) * 16 * 16 * 3))


def test_the_same_command_gives_the_same_numbers_whatever_the_batch(whole, runs, tmp_path):
    found, _ = whole
    again = evaluate.evaluate(str(runs / "gpt"), str(tmp_path / "a.json"), **SCORED | {"batch": 16}, asked=asked())
    for name in ("fid", "is_mean", "kid_mean", "rfid", "val_nll"):
        assert again[name] == pytest.approx(found[name], rel=1e-3), name  # decoding rounds as its batch size does


def test_a_vqgan_has_rfid_of_its_held_out_images(runs, tmp_path):
    found = evaluate.evaluate(str(runs / "vqgan"), str(tmp_path / "a.json"), **SCORED, asked=asked(reference="train"))
    assert found["rfid"] > 0 and found["rfid_images"] == 16 and "fid" not in found
    assert found["rfid_reference"] not in (0, found["rfid"]) and found["definition"]["reference"]["split"] == "train"
    with pytest.raises(UserError, match="holds a vqgan, which has no sampler"):
        evaluate.evaluate(str(runs / "vqgan"), str(tmp_path / "a.json"), **SCORED, asked=asked(sweep="top_k=1"))


@pytest.mark.slow
def test_a_sweep_marks_its_best_row_and_goes_on_where_it_was(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep.json"
    grid = "temperature=0.5,1.0;top_k=2,3"
    found = evaluate.evaluate(str(runs / "gpt"), str(out), **SCORED, asked=asked(sweep=grid))
    assert [row["setting"] for row in found["rows"]] == sweeps.parse(grid)
    best = min(found["rows"], key=lambda row: row["scores"]["fid"])["name"]
    assert found["best"] == best and f"*  {best}" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 1000
    lines = out.with_suffix(".csv").read_text().splitlines()
    assert lines[0].startswith("temperature,top_k,") and len(lines) == 5
    assert [line.endswith(",1") for line in lines[1:]] == [row["name"] == best for row in found["rows"]]

    calls = []
    score = generation.Generation.score
    monkeypatch.setattr(
        generation.Generation, "score", lambda self, setting, **_: calls.append(setting) or score(self, setting)
    )
    more = evaluate.evaluate(
        str(runs / "gpt"), str(out), **SCORED, asked=asked(sweep="temperature=0.5,1.0,2.0;top_k=2")
    )
    assert calls == [{"temperature": 2.0, "top_k": 2}]
    assert more["rows"][0] == found["rows"][0] and len(more["rows"]) == 3
    evaluate.evaluate(str(runs / "gpt"), str(out), **SCORED | {"seed": 1}, asked=asked(sweep="temperature=0.5;top_k=2"))
    assert len(calls) == 2  # another seed is another row


@pytest.mark.slow
def test_settings_change_samples_and_rejection_keeps_the_classes(runs, tmp_path):
    def fid(**fields):
        found = evaluate.evaluate(str(runs / "gpt"), str(tmp_path / "a.json"), **SCORED, asked=asked(**fields))
        return found["fid"], found

    plain, _ = fid()
    greedy, _ = fid(strategy=Strategy(greedy=True))
    rejected, found = fid(acceptance=0.5, classifier="small")
    assert len({plain, greedy, rejected}) == 3
    assert (
        found["definition"]["sampler"] == {"acceptance": 0.5} and found["definition"]["classifier"]["name"] == "small"
    )
    assert found["class_samples"] == found["samples"] == 24


@pytest.mark.parametrize(
    "text, message",
    [
        ("temprature=1", "'temprature' is no setting of the sampler, did you mean 'temperature'"),
        ("top_k=many", "top_k is a whole number"),
        ("top_k=1;top_k=2", "given twice"),
        ("temperature=0", "temperature is a number above 0"),
        ("acceptance=1.5", "acceptance is a share"),
        ("top_k=", "has no values"),
        (";", "no settings"),
        ("schedule=steep", "schedule is one of"),
    ],
)
def test_mistakes_in_a_sweep(text, message):
    with pytest.raises(UserError, match=message) as error:
        sweeps.parse(text)
    assert "\n" not in str(error.value) and str(error.value).startswith("--sweep")


def test_a_grid_is_the_product_in_order():
    found = sweeps.parse("temperature=0.9,1;top_k=0,100;greedy=true")
    assert found[1] == {"temperature": 0.9, "top_k": 100, "greedy": True}
    assert [row["temperature"] for row in found] == [0.9, 0.9, 1.0, 1.0]
    strategy, rate = sweeps.split(found[1] | {"acceptance": 0.25})
    assert strategy.greedy and strategy.top_k == 100 and rate == 0.25


def test_following_a_finished_run_keeps_its_best_checkpoint(runs, tmp_path):
    workdir = tmp_path / "gpt"
    shutil.copytree(runs / "gpt", workdir)
    shutil.copytree(workdir / "checkpoints" / "2", tmp_path / "late")
    shutil.rmtree(workdir / "checkpoints" / "2")
    found = evaluate.evaluate(str(workdir), str(tmp_path / "f.json"), **SCORED, asked=asked(follow=True))
    assert [row["step"] for row in found["rows"]] == [4]
    best = json.loads((workdir / "best.json").read_text())
    assert best["step"] == 4 and best["fid"] == found["rows"][0]["scores"]["fid"]
    kept = evaluate.evaluate(
        str(workdir / "best_fid"),
        str(tmp_path / "b.json"),
        **SCORED,
        config=transformer_config(runs / "vqgan"),
        asked=asked(),
    )
    assert kept["fid"] == pytest.approx(best["fid"], rel=1e-9)
    assert (
        kept["definition"]["checkpoint"]["parameters_sha256"]
        == found["rows"][0]["scores"]["definition"]["checkpoint"]["parameters_sha256"]
    )


def test_imported_statistics_of_other_networks_are_refused(runs, tmp_path):
    reference = tmp_path / "reference.npz"
    mean, covariance = np.zeros(6), np.eye(6)
    np.savez(reference, mu=mean, sigma=covariance)
    found = evaluate.evaluate(
        str(runs / "gpt"), str(tmp_path / "a.json"), **SCORED, asked=asked(reference=str(reference))
    )
    assert found["reference_unverified"] is True and "precision" not in found
    other = Statistics("torch-fidelity", "1" * 64, {}, 10, Gaussian(mean, covariance))
    other.save(reference)
    with pytest.raises(UserError, match="other weights"):
        evaluate.evaluate(str(runs / "gpt"), str(tmp_path / "a.json"), **SCORED, asked=asked(reference=str(reference)))


def test_lpips_joins_where_its_weights_are_at_hand(runs, tmp_path, monkeypatch):
    network = LPIPS(LPIPSConfig(widths=(4,) * 5, depths=(1,) * 5))
    x = jax.numpy.zeros((1, 16, 16, 3))
    perceptual = network, network.init(jax.random.key(0), x, x)
    monkeypatch.setattr(bench, "_open_lpips", lambda files: (perceptual, {"vgg": "1" * 64}))
    found = evaluate.evaluate(
        str(runs / "gpt"), str(tmp_path / "a.json"), **SCORED | {"samples": 8}, asked=asked(memorisation=4)
    )
    assert found["definition"]["lpips_sha256"] == {"vgg": "1" * 64}
    assert found["val_lpips"] > 0 and found["val_lpips_stderr"] > 0
    assert 0 <= found["memorisation_closer_lpips"] <= 1 and found["memorisation_samples"] == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(strategy=Strategy(guidance=2.0)), "guidance: this model was trained without"),
        (dict(sweep="top_k=1", samples=0), "--samples=0: --sweep and --follow score samples"),
        (dict(follow=True, sweep="top_k=1"), "--follow: .* leave out --sweep"),
        (dict(follow=True, memorisation=4), "--memorisation=4: is of at most --samples=24, not with a sweep"),
        (dict(memorisation=25), "--memorisation=25: is of at most --samples=24"),
        (dict(acceptance=0.0), "acceptance: 0: is a share above 0"),
        (dict(sweep="guidance=1,3"), "guidance: this model was trained without"),
        (dict(acceptance=0.5, classifier="resnet101"), "knows ImageNet's 1000 classes, the model has 8; use small"),
        (dict(acceptance=0.5, classifier="resnet"), "--classifier=resnet: there are resnet101, resnet50, small"),
    ],
)
def test_what_the_model_cannot_do_is_said_before_anything_slow(runs, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(bench.Bench, "reference", lambda *_: pytest.fail("the reference was read first"))
    scored = SCORED | {name: fields.pop(name) for name in ("samples",) if name in fields}
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(str(runs / "gpt"), str(tmp_path / "a.json"), **scored, asked=asked(**fields))
