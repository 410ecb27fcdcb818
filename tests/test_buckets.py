"""A whole story in a bucket: train, resume, sample and score with every path on gs://, equal to the same run on a disk.

The bucket is that of tests/bucket.py; gcsfs, tensorstore and Orbax speak to it as to a real one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import train_transformer
import train_vqgan
from configs import finetune, quantizers
from tests.reference import GOLDEN
from tests.test_scripts import transformer_config, vqgan_config
from vqgan_jax import pretrained, storage, weights
from vqgan_jax.config import UserError
from vqgan_jax.tools import convert
from vqgan_jax.torch_files import open_tensors
from vqgan_jax.train.checkpoints import Checkpoints, load

ROOT = Path(__file__).parent.parent
SPEEDS = {"time", "images/s", "tokens/s", "step_seconds", "step_seconds_p99", "data_wait_seconds", "data_wait_share"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Rendered scenes go to a folder of the tests."""
    os.environ["VQGAN_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["VQGAN_JAX_CACHE"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The first stage on a disk, trained to step 4 in one go."""
    workdir = storage.path(tmp_path_factory.mktemp("runs") / "vqgan")
    train_vqgan.train(vqgan_config(), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def remote(service):
    """Both stages in the bucket: the first stopped after step 2 as a kill would, and resumed to step 4."""
    root = storage.path("gs://bucket/runs")
    train_vqgan.train(vqgan_config(), str(root / "vqgan"))
    (root / "vqgan" / "checkpoints" / "4").rmtree()
    train_vqgan.train(vqgan_config(), str(root / "vqgan"))
    train_transformer.train(transformer_config(root / "vqgan"), str(root / "gpt"))
    return root


def logged(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (storage.path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]


@pytest.mark.slow
def test_a_resumed_run_in_a_bucket_equals_one_on_a_disk(remote, local):
    here, there = (load(folder / "checkpoints") for folder in (local, remote / "vqgan"))
    jax.tree.map(np.testing.assert_array_equal, here[0], there[0])
    assert here[1] == there[1]
    assert logged(local) == logged(remote / "vqgan")  # no gap and no double


@pytest.mark.slow
def test_a_run_leaves_in_the_bucket_what_it_leaves_on_a_disk(remote, local):
    workdir = remote / "vqgan"
    assert {path.name for path in workdir.iterdir()} == {path.name for path in local.iterdir()}
    names = [file.name for file in storage.files(workdir / "tensorboard")]
    assert names == ["events.out.tfevents.000001", "events.out.tfevents.000002"]  # one a start
    picture = (workdir / "images" / "reconstructions_00000004.png").read_bytes()
    assert picture == (local / "images" / "reconstructions_00000004.png").read_bytes()
    starts = [file.name for file in storage.files(workdir / "run") if file.suffix == ".json"]
    assert starts == ["0.json", "1.json"]
    assert json.loads((workdir / "config.json").read_text()) == json.loads((local / "config.json").read_text())


@pytest.mark.slow
def test_a_workdir_in_a_bucket_is_read_as_one_on_a_disk(remote, local):
    here, there = (pretrained.load_trained(path, key="x", kind="vqgan") for path in (local, str(remote / "vqgan")))
    jax.tree.map(np.testing.assert_array_equal, [here.params, here.ema], [there.params, there.ema])
    assert pretrained.kind_of(str(remote / "gpt"), key="x") == "transformer"
    configs = [finetune.get_config(str(path)) for path in (remote / "vqgan", local)]
    assert configs[0].init_from == "gs://bucket/runs/vqgan" and configs[0].model == configs[1].model
    assert finetune.get_config(str(remote / "gpt")).vqgan == "gs://bucket/runs/gpt/first_stage"
    with pytest.raises(UserError, match="x=gs://bucket/none: no workdir there"):
        pretrained.load_trained("gs://bucket/none", key="x", kind="vqgan")
    other = vqgan_config()
    other.model.quantizer = quantizers.ema(32, 8)
    with pytest.raises(UserError, match="--workdir=gs://bucket/runs/vqgan: holds another model"):
        train_vqgan.train(other, str(remote / "vqgan"))


def run_script(name: str, *args: str) -> None:
    command = [sys.executable, str(ROOT / name), *args]
    done = subprocess.run(command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_samples_and_scores_in_a_bucket_equal_those_on_a_disk(remote, bucket, tmp_path):
    outs = storage.path(bucket), storage.path(tmp_path)
    for out in outs:
        run_script("sample.py", f"--workdir={remote / 'gpt'}", f"--out={out / 'samples'}", "--number=3", "--batch=2")
        scores = f"--out={out / 'e' / 'scores.json'}", "--batch=8", "--examples=16", "--samples=0"
        run_script("evaluate.py", f"--workdir={remote / 'vqgan'}", *scores)
    there, here = ({file.name: file.read_bytes() for file in storage.files(out)} for out in outs)
    assert set(there) == set(here) > {"000000.png", "000002.png", "grid.png", "samples.npz", "scores.json"}
    assert all(there[name] == here[name] for name in here if name.endswith(".png"))
    arrays = (storage.load_npz(out / "samples" / "samples.npz") for out in outs)
    jax.tree.map(np.testing.assert_array_equal, *arrays)
    assert json.loads(there["scores.json"])["val_psnr"] == json.loads(here["scores.json"])["val_psnr"]


def test_an_import_from_a_bucket_into_one_equals_one_on_a_disk(bucket, tmp_path, capsys):
    for suffix in (".ckpt", ".yaml"):
        storage.write_bytes(f"{bucket}/vqgan{suffix}", (GOLDEN / f"vqgan_tiny{suffix}").read_bytes())
        storage.write_bytes(tmp_path / f"vqgan{suffix}", (GOLDEN / f"vqgan_tiny{suffix}").read_bytes())
    found = []
    for root in (bucket, str(tmp_path)):
        assert convert.main([f"--checkpoint={root}/vqgan.ckpt", f"--out={root}/run"]) == 0
        assert convert.main([f"--checkpoint={root}/run", f"--out={root}/back.safetensors", "--to=torch"]) == 0
        names = ("run/params.safetensors", "run/stage.json", "back.safetensors", "back.yaml")
        found.append([(storage.path(root) / name).read_bytes() for name in names])
    assert found[0] == found[1]
    assert f"wrote {bucket}/back.safetensors and {bucket}/back.yaml" in capsys.readouterr().out


def test_weights_of_ones_own_may_lie_in_a_bucket(bucket):
    storage.write_bytes(f"{bucket}/vqgan.ckpt", (GOLDEN / "vqgan_tiny.ckpt").read_bytes())
    path = weights.fetch("vgg16", f"{bucket}/vqgan.ckpt", flag="--x")
    with open_tensors(path) as there, open_tensors(GOLDEN / "vqgan_tiny.ckpt") as here:
        assert list(there) == list(here)
        jax.tree.map(np.testing.assert_array_equal, dict(there), dict(here))
    with pytest.raises(UserError, match=f"--x: no such file: {bucket}/none"):
        weights.fetch("vgg16", f"{bucket}/none", flag="--x")


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(1000)


def save_steps(folder: str, *steps: int) -> None:
    with Checkpoints(folder, keep_last=3, keep_best=0) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"w": values(step)}, {"step": step}, None)


def damage(service, name: str) -> None:
    (victim,) = (key for key, (data, _) in service.objects.items() if name in key and "/d/" in key and len(data) > 900)
    data = bytearray(service.objects[victim][0])
    data[len(data) // 2] ^= 1
    service.put(victim, bytes(data))


def test_a_damaged_checkpoint_in_a_bucket_is_moved_aside_and_the_one_before_it_used(bucket, service):
    save_steps(bucket, 1, 2)
    damage(service, f"{bucket.removeprefix('gs://bucket/')}/2/")
    with Checkpoints(bucket, keep_last=3, keep_best=0) as checkpoints:
        state, record = checkpoints.restore({"w": jax.ShapeDtypeStruct((1000,), np.float64)})
        assert record == {"step": 1} and state["w"][0] == values(1)[0]
        assert sorted(path.name for path in storage.path(bucket).iterdir()) == ["1", "2.damaged"]
        checkpoints.save(2, {"w": values(2)}, {"step": 2}, None)
    np.testing.assert_array_equal(load(bucket)[0]["w"], values(2))


def test_a_save_cut_short_in_a_bucket_is_no_checkpoint(bucket):
    save_steps(bucket, 1, 2)
    (storage.path(bucket) / "2" / "manifest.json").unlink()
    with Checkpoints(bucket, keep_last=3, keep_best=0) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.restore({"w": jax.ShapeDtypeStruct((1000,), np.float64)})[1] == {"step": 1}


def test_a_bucket_that_does_not_answer_is_no_damage(bucket, monkeypatch):
    save_steps(bucket, 1, 2)
    sha256 = storage.sha256

    def refuse(source):
        if "/2/" in str(source):
            raise OSError("Forbidden")
        return sha256(source)

    with Checkpoints(bucket, keep_last=3, keep_best=0) as checkpoints:
        monkeypatch.setattr(storage, "sha256", refuse)
        with pytest.raises(UserError, match="/2/.* cannot be read .Forbidden"):
            checkpoints.restore({"w": jax.ShapeDtypeStruct((1000,), np.float64)})
    assert [path.name for path in storage.path(bucket).iterdir()] == ["1", "2"]
