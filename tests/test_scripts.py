"""The four stories end to end on tiny models, as a user runs them: train, resume, move, score, sample, and mistakes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

import evaluate
import sample
import train_transformer
import train_vqgan
from configs import common, demo_transformer, demo_vqgan, quantizers
from vqgan_jax import pretrained
from vqgan_jax.config import UserError
from vqgan_jax.exit_codes import USER_ERROR
from vqgan_jax.request.flags import Asked
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.scoring import judges
from vqgan_jax.tools import convert
from vqgan_jax.train import setup
from vqgan_jax.train.checkpoints import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Rendered scenes go to a folder of the tests."""
    os.environ["VQGAN_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["VQGAN_JAX_CACHE"]


def tiny_run(config: ConfigDict, steps: str) -> ConfigDict:
    config.steps, config.batch_size, config.eval_examples, config.images_shown = steps, 8, 16, 8
    config.log_every, config.eval_every, config.save_every, config.images_every = "1", "2", "2", "2"
    config.data.train_examples, config.data.val_examples, config.data.image_size = 32, 16, 16
    return config


def vqgan_config(steps: str = "4") -> ConfigDict:
    config = tiny_run(demo_vqgan.get_config(), steps)
    ae = config.model.autoencoder
    ae.resolution, ae.stem, ae.channels, ae.multipliers = 16, 2, 32, (1, 1)
    ae.z_channels, ae.mid_attention = 32, False
    config.model.quantizer = quantizers.ema(16, 8)
    config.model.discriminator = ConfigDict(common.patchgan().to_dict() | dict(channels=8, layers=2))
    config.loss.adversarial_start = "1"
    config.optimizer.warmup, config.optimizer.hold = "0", "0"
    return config


def transformer_config(vqgan: Path, steps: str = "4") -> ConfigDict:
    config = tiny_run(demo_transformer.get_config(), steps)
    config.vqgan = str(vqgan)
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width, gpt.residual_dropout = 1, 2, 32, 0.1
    config.model.grid = (4, 4)
    config.optimizer.warmup = "0"
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Both stages, trained for four steps."""
    folder = tmp_path_factory.mktemp("runs")
    train_vqgan.train(vqgan_config(), str(folder / "vqgan"))
    train_transformer.train(transformer_config(folder / "vqgan"), str(folder / "gpt"))
    return folder


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_its_users_expect(runs):
    for name, metrics in (
        ("vqgan", {"loss", "l1", "adaptive_weight", "logits_real", "codebook_perplexity", "grad_norm/generator"}),
        ("gpt", {"loss", "nll", "bits", "accuracy", "grad_norm/transformer", "tokens/s"}),
    ):
        workdir = runs / name
        lines = logged(workdir)
        assert metrics | {"learning_rate", "images/s", "data_wait_seconds"} <= set().union(*lines)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert list((workdir / "images").glob("*_00000004.png"))
        assert list((workdir / "tensorboard").iterdir())
        assert json.loads((workdir / "config.json").read_text())["seed"] == 0
        assert "versions" in json.loads((workdir / "run" / "0.json").read_text())


def arrays(workdir: Path) -> dict:
    return load(workdir / "checkpoints")[0]


@pytest.mark.parametrize("stage", ["vqgan", "gpt"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs, tmp_path, stage):
    train = {"vqgan": train_vqgan.train, "gpt": train_transformer.train}[stage]
    workdir = tmp_path / stage
    shutil.copytree(runs / stage, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")  # as if it had been stopped after step 2
    config = vqgan_config() if stage == "vqgan" else transformer_config(runs / "gone")
    train(config, str(workdir))
    jax.tree.map(np.testing.assert_array_equal, arrays(runs / stage), arrays(workdir))
    for before, after in zip(logged(runs / stage), logged(workdir), strict=True):
        speeds = {"time", "images/s", "tokens/s", "step_seconds", "step_seconds_p99"}
        speeds |= {"data_wait_seconds", "data_wait_share"}
        assert {k: v for k, v in before.items() if k not in speeds} == {
            k: v for k, v in after.items() if k not in speeds
        }


@pytest.mark.slow
def test_a_contrasted_run_keeps_its_reference_beside_its_checkpoints(runs, tmp_path):
    shutil.copytree(runs / "gpt", tmp_path / "gpt")

    def tune(steps: str) -> None:
        config = transformer_config(runs / "vqgan", steps)
        config.init_from, config.loss.cca.weight = str(tmp_path / "gpt"), 300.0
        config.checkpoint.keep_best = 0
        train_transformer.train(config, str(tmp_path / "tuned"))

    tune("2")
    plain = arrays(tmp_path / "gpt")
    assert jax.tree.structure(arrays(tmp_path / "tuned")) == jax.tree.structure(plain)
    shutil.rmtree(tmp_path / "gpt")
    tune("4")
    kept = tmp_path / "tuned" / "reference" / "params.safetensors"
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        tune("6")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(runs, tmp_path, caplog):
    workdir = tmp_path / "vqgan"
    shutil.copytree(runs / "vqgan", workdir)
    victim = max((workdir / "checkpoints" / "4" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    train_vqgan.train(vqgan_config(), str(workdir))
    assert any("4" in record.getMessage() and "damaged" in record.getMessage() for record in caplog.records)
    jax.tree.map(np.testing.assert_array_equal, arrays(runs / "vqgan"), arrays(workdir))


def sampled(workdir, out, **changes) -> np.ndarray:
    """The pictures that sample.py makes."""
    named = {name: changes.pop(name) for name in dataclasses.asdict(Asked()) if name in changes}
    settings = dict(batch=16, seed=0, strategy=Strategy(), size="", best=True, dtype="float32")
    settings |= dict(stride=0, decode="exact", memory=0.0, every=0)
    settings["mesh"] = {"data": -1, "fsdp": 1, "tensor": 1}
    sample.sample(str(workdir), str(out), Asked(**named), **settings | changes)
    with np.load(Path(out) / "samples.npz") as arrays:
        return arrays["arr_0"]


def test_samples_are_those_of_their_seed_and_index(runs, tmp_path):
    asked = dict(number=5, seed=7, classes=["3", "noon_lake"])
    together = sampled(runs / "gpt", tmp_path / "a", batch=5, **asked)
    apart = sampled(runs / "gpt", tmp_path / "b", batch=2, **asked)
    np.testing.assert_allclose(together.astype(int), apart, atol=1)  # decoding rounds as its batch size does
    with np.load(tmp_path / "a" / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], together)
        assert file["arr_0"].dtype == np.uint8 and file["label"].tolist()[::2] == [3, 3, 3]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a" / "000004.png")), together[4])
    assert (tmp_path / "a" / "grid.png").exists()


def test_larger_sizes_slide_and_a_moved_workdir_still_samples(runs, tmp_path, capsys):
    shutil.copytree(runs / "gpt", tmp_path / "moved")
    asked = dict(number=2, batch=2, size="18x40")  # of which the model makes 20x40
    made = sampled(tmp_path / "moved", tmp_path / "out", **asked, every=1)
    assert made.shape == (2, 18, 40, 3)
    assert re.search(r"100%\|.*\| 2\.00/2 \[", capsys.readouterr().err)
    for path in (tmp_path / "out" / "growing").iterdir():
        assert np.asarray(Image.open(path)).shape == (18, 40, 3), "growing pictures have the size asked for"
    apart = sampled(tmp_path / "moved", tmp_path / "alone", **asked | {"batch": 1})
    np.testing.assert_allclose(made.astype(int), apart, atol=1)  # one picture's windows over eight devices
    strips = sampled(tmp_path / "moved", tmp_path / "strips", **asked, memory=0.001)
    np.testing.assert_allclose(made.astype(int), strips, atol=1)
    tiles = sampled(tmp_path / "moved", tmp_path / "tiles", **asked, decode="tiles", stride=2)
    assert tiles.shape == made.shape and (tiles != made).any()


def test_a_size_below_the_trained_one_is_a_crop(runs, tmp_path):
    whole = sampled(runs / "gpt", tmp_path / "whole", number=2)
    part = sampled(runs / "gpt", tmp_path / "part", number=2, size="9x16")
    np.testing.assert_array_equal(part, whole[:, 3:12])


def test_evaluate_scores_both_stages(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "CLASSIFIER_STEPS", 5)
    scored = dict(batch=8, examples=0, samples=8, seed=0)
    first = evaluate.evaluate(str(runs / "vqgan"), str(tmp_path / "v.json"), **scored)
    assert {"val_psnr", "val_ssim", "codebook_usage", "codebook_perplexity", "val_psnr_p10"} <= set(first)
    second = evaluate.evaluate(str(runs / "gpt"), str(tmp_path / "g.json"), **scored)
    assert {"val_nll", "table_nll", "histogram_entropy", "class_agreement"} <= set(second)
    assert second["val_psnr"] == pytest.approx(first["val_psnr"], rel=1e-5)
    assert json.loads((tmp_path / "g.json").read_text()) == second
    assert (tmp_path / "reconstructions.png").exists()


def test_an_imported_vqgan_is_scored_on_named_data(tmp_path):
    golden = ROOT / "tests" / "golden" / "vqgan_tiny.ckpt"
    assert convert.main(["--checkpoint", str(golden), "--out", str(tmp_path / "imported")]) == 0
    scored = dict(batch=8, examples=0, samples=0, seed=0)
    with pytest.raises(UserError, match="an imported model names no data"):
        evaluate.evaluate(str(tmp_path / "imported"), str(tmp_path / "a.json"), **scored)
    config = vqgan_config()
    for name in ("imported", golden):
        scores = evaluate.evaluate(str(tmp_path / name), str(tmp_path / "a.json"), **scored, config=config)
        assert scores["val_images"] == 16
    with pytest.raises(UserError, match="a VQGAN alone reconstructs"):
        sampled(tmp_path / "imported", tmp_path / "s", number=1)


def test_init_from_takes_parameters_and_starts_at_step_zero(runs, tmp_path):
    config = vqgan_config("2")
    config.init_from = str(runs / "vqgan")
    config.optimizer.learning_rate = 0.0
    state = train_vqgan.train(config, str(tmp_path / "tuned"))
    assert int(state.step) == 2
    theirs = pretrained.load_trained(runs / "vqgan", key="k", kind="vqgan").ema["generator"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params["generator"]), theirs)


def test_a_step_over_the_budget_of_non_finite_ones_stops_the_run(tmp_path):
    config = vqgan_config("4")
    config.optimizer.learning_rate, config.optimizer.clip_norm = 1e30, 0.0
    with pytest.raises(UserError, match=r"step \d"):
        train_vqgan.train(config, str(tmp_path / "w"))
    assert list((tmp_path / "w" / "nonfinite").glob("*.npz"))


@pytest.mark.slow
def test_a_refused_batch_is_replayed_to_the_operation(tmp_path, capsys):
    config = vqgan_config("2")
    train_vqgan.train(config, str(tmp_path / "w"))
    recorded = (tmp_path / "w" / "config.json").read_bytes()
    batch = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    for name, value, said in (
        (
            "huge",
            1e30,
            r"step 2: invalid value \(nan\) encountered in \w+, first in vqgan_jax/.*py:\d+: .*\(not finite: .*l2",
        ),
        ("nan", np.nan, "the batch itself is not finite: image"),
    ):
        batch[0, 0, 0, 0] = value
        np.savez(tmp_path / f"{name}.npz", image=batch)
        config.replay = str(tmp_path / f"{name}.npz")
        capsys.readouterr()
        train_vqgan.train(config, str(tmp_path / "w"))
        assert re.search(said, capsys.readouterr().out)
    assert (tmp_path / "w" / "config.json").read_bytes() == recorded  # the run may be going on meanwhile
    np.savez(tmp_path / "other.npz", codes=batch)
    for file, said in (("other.npz", "does not fit this model"), ("none.npz", "cannot be read")):
        config.replay = str(tmp_path / file)
        with pytest.raises(UserError, match=f"{file}.*{said}"):
            train_vqgan.train(config, str(tmp_path / "w"))


def test_unconditional_codes_train_score_and_sample(runs, tmp_path, monkeypatch):
    """With a relative workdir, and rows that do not fill the batch."""
    monkeypatch.chdir(tmp_path)
    config = transformer_config(runs / "vqgan", "2")
    config.model.condition = ConfigDict(dict(name="none"))
    train_transformer.train(config, "free")
    assert sampled("free", "out", number=3, batch=16).shape == (3, 16, 16, 3)
    scores = evaluate.evaluate("free", "scores.json", batch=8, examples=0, samples=8, seed=0)
    assert "table_nll" in scores and "class_agreement" not in scores
    with pytest.raises(UserError, match="this model is unconditional"):
        sampled("free", "out", number=1, classes=["1"])


@pytest.mark.slow
def test_gumbel_codes_train(tmp_path):
    """Its temperature falls, and both networks learn."""
    config = vqgan_config("3")
    gumbel = dict(name="gumbel", codebook_size=16, dim=8, input_dim=8, kl_weight=5e-4, straight_through=True)
    config.model.quantizer = ConfigDict(
        gumbel | dict(temperature_start=1.0, temperature_end=0.1, temperature_steps="4 steps")
    )
    state = train_vqgan.train(config, str(tmp_path / "w"))
    lines = [line for line in logged(tmp_path / "w") if "loss" in line]
    temperatures = [line["quantizer/temperature"] for line in lines]
    assert temperatures == sorted(temperatures, reverse=True) and temperatures[-1] < temperatures[0] == 1.0
    assert all(np.isfinite(line["quantizer/kl"]) and line["skipped"] == 0 for line in lines)
    assert int(state.step) == 3


def test_a_folder_of_images_trains(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for k in range(count):
            path = tmp_path / "data" / split / f"class {k % 2}" / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
    (tmp_path / "data" / "train" / "class 0" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    config = vqgan_config("2")
    config.data = common.data("folder")
    config.data.path, config.data.image_size, config.data.max_corrupt_share = str(tmp_path / "data"), 16, 0.5
    state = train_vqgan.train(config, str(tmp_path / "w"))
    assert int(state.step) == 2
    assert any("broken.jpg cannot be read" in record.getMessage() for record in caplog.records)


def broken(change) -> ConfigDict:
    config = vqgan_config("2")
    change(config)
    return config


def put(config: ConfigDict, key: str, value) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        config = config[parent]
    with config.ignore_type():
        config[name] = value


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.source": "folder", "data.path": "/nowhere/at/all"}, "config.data.path"),
        ({"data.source": "folder"}, "config.data.path"),
        ({"data.source": "scene"}, "config.data.source: unknown name 'scene', did you mean 'scenes'"),
        ({"data.image_size": 18}, "config.data.image_size: 18 does not divide"),
        ({"batch_size": 12}, "config.batch_size: 12 examples do not divide over 8 devices"),
        ({"accumulation": 3}, "config.accumulation"),
        ({"mesh.fsdp": 3}, "config.mesh"),
        ({"dtype": "float61"}, "config.dtype: unknown name 'float61'"),
        ({"steps": "soon"}, "config.steps: 'soon' is no duration"),
        ({"model.quantizer.name": "emma"}, "config.model.quantizer.name: unknown name 'emma'"),
        ({"model.quantizer.codebook_siez": 3}, "unknown key 'codebook_siez', did you mean 'codebook_size'"),
        ({"loss.schedule": "both"}, "config.loss.schedule"),
        ({"model.autoencoder.channels": 20}, "multiple of 32"),
        ({"init_from": "/nowhere"}, "config.init_from"),
        ({"profile": "ten"}, "config.profile"),
        ({"batch_size": 0}, "config.batch_size: 0"),
        ({"steps": "0.01 epochs"}, "less than one step"),
        ({"loss.perceptual_weight": 1.0, "lpips.vgg": "/no/vgg.pth"}, "vgg"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(tmp_path, changes, message):
    def change(config):
        for key, value in changes.items():
            put(config, key, value)

    with pytest.raises(UserError, match=message) as error:
        train_vqgan.train(broken(change), str(tmp_path / "w"))
    assert "\n" not in str(error.value)


def test_a_workdir_of_another_model_is_refused(runs, tmp_path):
    shutil.copytree(runs / "vqgan", tmp_path / "w")
    config = vqgan_config("8")
    config.model.quantizer.codebook_size = 32
    with pytest.raises(UserError, match="codebook_size: 32 here, 16 there"):
        train_vqgan.train(config, str(tmp_path / "w"))
    config = vqgan_config("5")  # anything else may change
    config.optimizer.learning_rate, config.optimizer.clip_norm, config.ema_decay = 1e-5, 0.0, 0.0
    state = train_vqgan.train(config, str(tmp_path / "w"))
    assert int(state.step) == 5 and not state.ema
    config.steps, config.ema_decay = "6", 0.5
    state = train_vqgan.train(config, str(tmp_path / "w"))
    assert int(state.step) == 6 and state.ema


def test_mistakes_of_stage_two(runs, tmp_path):
    config = transformer_config(runs / "vqgan", "2")
    config.model.condition.classes = 3
    with pytest.raises(UserError, match="config.model.condition.classes: the model has 3, the data set 8"):
        train_transformer.train(config, str(tmp_path / "a"))
    config = transformer_config(runs / "vqgan", "2")
    config.model.grid = (8, 8)
    with pytest.raises(UserError, match="config.model.grid"):
        train_transformer.train(config, str(tmp_path / "b"))
    for key, value, message in (
        ("heads", 3, "does not divide over 3 heads"),
        ("prefix", 5, "codes must not see later ones"),
    ):
        config = transformer_config(runs / "vqgan", "2")
        config.model.transformer[key] = value
        with pytest.raises(UserError, match=message):
            train_transformer.train(config, str(tmp_path / key))
    with pytest.raises(UserError, match="config.vqgan: name the workdir"):
        config = transformer_config(runs, "2")
        config.vqgan = ""
        train_transformer.train(config, str(tmp_path / "c"))
    with pytest.raises(UserError, match="config.vqgan=.*holds a transformer"):
        train_transformer.train(transformer_config(runs / "gpt", "2"), str(tmp_path / "d"))


@pytest.mark.slow
def test_a_decoder_that_was_trained_on_serves_the_transformers_of_its_codes(runs, tmp_path):
    """Given to the sampler; a run that has begun keeps its own copy, and says so. Other codes are refused."""
    for name, part in (("decoder", "decoder"), ("codes", "encoder")):
        stage = pretrained.load_trained(runs / "vqgan", key="", kind="vqgan")
        params = stage.variables("generator")["params"]
        moved = {**params, part: jax.tree.map(lambda x: x + np.float32(0.1), params[part])}
        changed = dataclasses.replace(stage, params={**stage.params, "generator": moved}, ema={})
        pretrained.write_stage(epath.Path(tmp_path / name), changed, "generator")
    asked = dict(number=1, classes=["3"], batch=1)
    before = sampled(runs / "gpt", tmp_path / "a", **asked)
    same = sampled(runs / "gpt", tmp_path / "b", first_stage=str(runs / "vqgan"), **asked)
    other = sampled(runs / "gpt", tmp_path / "c", first_stage=str(tmp_path / "decoder"), **asked)
    np.testing.assert_array_equal(same, before)
    assert (other != before).any()
    with pytest.raises(UserError, match="--first_stage=.*its codes are not those .*encoder/.* differs"):
        sampled(runs / "gpt", tmp_path / "d", first_stage=str(tmp_path / "codes"), **asked)
    shutil.copytree(runs / "gpt", tmp_path / "gpt")
    with pytest.raises(UserError, match="config.vqgan=.*was trained on another one.*decoder/.* differs"):
        train_transformer.train(transformer_config(tmp_path / "decoder"), str(tmp_path / "gpt"))


def test_a_run_with_another_batch_size_goes_on_where_it_was_in_its_data(runs, tmp_path, monkeypatch):
    """Four steps of 8 examples, then one of 16: the order goes on at position 32, and the checkpoint says 48."""
    shutil.copytree(runs / "gpt", tmp_path / "w")
    starts, opened = [], setup.pipeline
    monkeypatch.setattr(setup, "pipeline", lambda *a, **k: starts.append(k["start"]) or opened(*a, **k))
    config = transformer_config(runs / "vqgan", "5")
    config.batch_size = 16
    train_transformer.train(config, str(tmp_path / "w"))
    assert starts == [32] and load(tmp_path / "w" / "checkpoints")[1]["examples"] == 48


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(size="16y40"), "write HEIGHTxWIDTH"),
        (dict(size="0x40"), "write HEIGHTxWIDTH"),
        (dict(size="16x9000"), "at most 8192"),
        (dict(size="16x40", stride=9), "--stride: 9 codes"),
        (dict(classes=["castle"]), "no class 'castle'"),
    ],
)
def test_mistakes_in_sampling(runs, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        sampled(runs / "gpt", tmp_path, number=1, **arguments)


def test_a_vqgan_alone_cannot_be_sampled(runs, tmp_path):
    with pytest.raises(UserError, match="holds a vqgan, a transformer is needed"):
        sampled(runs / "vqgan", tmp_path, number=1)


def run_script(*argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config=configs/demo_vqgan.py", "--workdir={tmp}", "--config.batch_siez=4"], "batch_size"),
        (["--config=configs/demo_vqgan.py:runlocl", "--workdir={tmp}"], "did you mean 'runlocal'"),
        (["--config=configs/nothing.py", "--workdir={tmp}"], "nothing.py"),
        (["--config=configs/demo_vqgan.py", "--workdir=/proc/none"], "--workdir=/proc/none: cannot be written"),
        (["--config=configs/demo_vqgan.py"], "--workdir is missing"),
        (["--config=configs/demo_vqgan.py", "--workdir={tmp}", "--config.batch_size=many"], "batch_size"),
        (["--config=configs/demo_vqgan.py", "--workdir={tmp}", "--config.optimizer.lr=1"], "--config.optimizer.lr"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, argv, message):
    done = run_script("train_vqgan.py", *(text.format(tmp=tmp_path) for text in argv))
    assert done.returncode == USER_ERROR, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train_vqgan.py", "train_transformer.py", "sample.py", "evaluate.py"])
def test_help_teaches(script):
    done = run_script(script, "--help")
    assert f"python {script} --" in done.stdout and "--workdir" in done.stdout
    assert done.returncode == 0 and "distributed" in done.stdout  # flags that other modules define as well
