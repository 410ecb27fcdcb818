"""What a bench opens and remembers: statistics of the very pictures, mistakes that name their key, memory it frees."""

import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import common
from configs import demo_vqgan as demo
from tests.evals.nets import pictures, small_net
from vqgan_jax import parallel, weights
from vqgan_jax.config import UserError
from vqgan_jax.evals import references
from vqgan_jax.evals.runner import reconstruction_step
from vqgan_jax.images import save_png
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.scoring import bench as benches
from vqgan_jax.scoring import scheduled, workdir
from vqgan_jax.scoring.fingerprint import fingerprint
from vqgan_jax.scoring.generation import Generation
from vqgan_jax.train import setup
from vqgan_jax.trained_transformer import TrainedTransformer


def write(folder, images):
    for k, image in enumerate(images):
        save_png(folder / f"{k:02d}.png", image)


def test_other_pictures_under_the_same_path_are_not_taken_for_those_in_the_cache(tmp_path, monkeypatch):
    config = demo.get_config()
    config.data = common.data("folder")
    config.data.image_size = 8
    runs, collect = [], references.collect
    monkeypatch.setattr(benches, "collect", lambda *a, **k: runs.append(1) or collect(*a, **k))
    bench = benches.open_bench(batch=8, seed=0, features=True, net=small_net(), cache=tmp_path / "cache")
    for name in ("one", "two"):
        write(tmp_path / name / "photos" / "val", pictures(3, seed=9))
        write(tmp_path / name / "photos" / "train", pictures(6, seed=len(name)))

    def mean(path):
        config.data.path = path
        return bench.of_split(setup.open_data(config, ("image",), factor=1), config, "train").pool.mean

    monkeypatch.chdir(tmp_path / "one")
    first = mean("photos")
    np.testing.assert_array_equal(mean(str(tmp_path / "one" / "photos")), first)
    assert len(runs) == 1  # the same pictures under another name of their folder
    monkeypatch.chdir(tmp_path / "two")
    mean("photos")
    assert len(runs) == 2  # the same name in another place
    write(tmp_path / "one" / "photos" / "train", pictures(6, seed=4))
    assert np.abs(mean(str(tmp_path / "one" / "photos")) - first).max() > 1e-3 and len(runs) == 3


def test_lists_archives_and_scenes_have_fingerprints(tmp_path):
    write(tmp_path / "elsewhere", pictures(4))
    for name, rows in (("train", (0, 1)), ("val", (2, 3))):
        (tmp_path / f"{name}.txt").write_text("".join(f"{tmp_path}/elsewhere/{k:02d}.png\n" for k in rows))
    data = common.data("list")
    data.path = str(tmp_path)
    of = lambda: fingerprint(benches.setup.open_source(data, "train"), data)  # noqa: E731
    before = of()
    assert of() == before
    save_png(tmp_path / "elsewhere" / "00.png", pictures(1, seed=5)[0])
    assert of() != before
    assert len(fingerprint(None, common.data("scenes"))) == 64


def test_mistakes_name_the_key_that_the_caller_has(tmp_path):
    named = dict(batch=8, seed=0, features=True, preset_key="config.fid_preset", flag="--config.fid_weights")
    with pytest.raises(UserError, match="^config.fid_preset: unknown name 'admm'"):
        benches.open_bench(preset="admm", net=small_net(), **named)
    with pytest.raises(UserError, match="^--config.fid_weights: no such file"):
        benches.open_bench(inception_weights=str(tmp_path / "none"), **named)


def test_lpips_is_told_by_the_digests_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(benches.networks, "load_lpips", lambda vgg, heads: {})
    for name in ("vgg", "heads"):
        (tmp_path / name).write_bytes(name.encode())
    files = {name: str(tmp_path / name) for name in ("vgg", "heads")}
    found = benches.open_bench(batch=8, seed=0, lpips=files)
    assert isinstance(found.perceptual[0], LPIPS)
    assert found.perceptual_sha256 == {name: benches.storage.sha256(tmp_path / name) for name in files}
    monkeypatch.setattr(weights, "cache_folder", lambda: tmp_path / "empty")
    assert benches.open_bench(batch=8, seed=0, lpips={"vgg": "", "heads": ""}).perceptual is None


@pytest.mark.parametrize("every, on", [("0", False), ("0 epochs", False), ("0%", False), ("0.0001 epochs", True)])
def test_whether_a_run_scores_itself(every, on):
    config = demo.get_config()
    config.steps, config.fid_every = "100", every
    assert scheduled.is_on(config, 1000) is on


def test_the_best_by_fid_takes_the_same_time_in_other_words():
    config = demo.get_config()
    config.steps, config.batch_size, config.eval_every, config.fid_every = "100", 10, "50%", "500 examples"
    config.checkpoint.best_metric = "val/rfid"
    assert scheduled.is_on(config, 1000)
    config.fid_every = "500"
    with pytest.raises(UserError, match="config.fid_every: '500', but the best checkpoint"):
        scheduled.is_on(config, 1000)


def test_the_step_of_a_model_is_compiled_once():
    model, again = (VQGAN(VQGANConfig.from_config(demo.get_config().model, key="config.model")) for _ in range(2))
    assert reconstruction_step(model) is reconstruction_step(again)


def test_scores_inside_a_training_free_the_devices():
    class Model:
        def split(self, params, mesh):
            return jax.device_put(params)

    trained = TrainedTransformer(Model(), np.ones(3), {}, None, {})
    trained.__dict__.update(_programs=(), _large_sampler=None)
    generation = object.__new__(Generation)
    generation._trained = trained
    placed, _ = trained._placed(parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}))
    held = weakref.ref(placed)
    del placed, trained
    generation.release()
    assert held() is None


def opened_transformer(folder):
    scored = object.__new__(workdir.ScoredTransformer)
    scored.path, scored.record, scored.dtype = folder, {}, "float32"
    scored.trained = SimpleNamespace(params={}, stages=SimpleNamespace(digest={"first_stage": "2" * 64}))
    return scored


def test_a_copy_has_its_stages_before_the_record_that_says_it_is_whole(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(workdir.pretrained, "load_trained", lambda *_, **__: None)
    for module in (workdir.pretrained, workdir.portable):
        monkeypatch.setattr(module, "write_stage", lambda folder, *_: order.append(folder.name))
    for folder in ("run", "copy"):  # a folder that is merely there was not written to its end
        (tmp_path / folder / "first_stage").mkdir(parents=True)
    opened_transformer(tmp_path / "run").save(tmp_path / "copy")
    assert order == ["first_stage", "copy"]


def test_a_row_of_a_sweep_is_defined_by_its_own_classifier_and_by_the_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "_define", lambda scored, params, **parts: parts)
    monkeypatch.setattr(workdir.sweeps, "run", lambda settings, score, out, define: [define(s) for s in settings])
    generation = SimpleNamespace(define=lambda setting: {"classifier": "small"} if setting else {})
    plain, rejected = opened_transformer(tmp_path).sweep(generation, [{}, {"acceptance": 0.5}], tmp_path / "a.json")
    assert "classifier" not in plain and rejected["classifier"] == "small"
    assert plain["stages"] == rejected["stages"] == {"first_stage": "2" * 64}


def test_features_of_segmentations_are_refused_at_once(tmp_path, monkeypatch):
    tokenizer = SimpleNamespace(model=None, config=SimpleNamespace(input_key="segmentation"), factor=1)
    opened = tokenizer, {}, SimpleNamespace(record={})
    monkeypatch.setattr(workdir.pretrained, "load_tokenizer", lambda *_, **__: opened)
    bench = benches.open_bench(batch=8, seed=0, features=True, net=small_net())
    with pytest.raises(UserError, match="a model of 'segmentation' has no FID"):
        workdir.ScoredVQGAN(tmp_path, demo.get_config(), bench)
