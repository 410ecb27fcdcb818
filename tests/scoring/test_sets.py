"""Finished sets of pictures, and mistakes, through the command line's functions and the command itself."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import evaluate
from tests.evals.nets import pictures, small_net
from vqgan_jax.config import UserError
from vqgan_jax.images import save_png

ROOT = Path(__file__).parents[2]
SCORED = dict(batch=8, seed=0)


def asked(**fields) -> evaluate.Asked:
    return evaluate.Asked(net=small_net(), **fields)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sets(tmp_path):
    """Folder `a`, the same pictures in `a.npz`, and other ones in folder `b`."""
    a, b = pictures(20, seed=1), pictures(20, seed=2) // 2
    for name, images in (("a", a), ("b", b)):
        for k, image in enumerate(images):
            save_png(tmp_path / name / f"{k:02d}.png", image)
    np.savez(tmp_path / "a.npz", arr_0=a)
    return tmp_path


def test_folders_and_arrays_of_the_same_pictures_are_nothing_apart(sets, capsys):
    found = evaluate.compare_sets(
        str(sets / "a.npz"), str(sets / "a"), str(sets / "out" / "r.json"), **SCORED, asked=asked(preset="pytorch-fid")
    )
    assert found["fid"] < 1e-6 and found["precision"] == found["recall"] == 1
    out = capsys.readouterr().out
    assert out.count("images/s") == 2 and "[preset pytorch-fid] [20 samples against 20 images]" in out
    assert json.loads((sets / "out" / "r.json").read_text()) == found
    definition = found["definition"]
    assert definition["preset"] == "pytorch-fid" and definition["reference"]["images"] == 20
    assert definition["reference"]["sha256"] == hashlib.sha256((sets / "a.npz").read_bytes()).hexdigest()
    assert definition["samples"]["path"] == str(sets / "a")


def test_other_pictures_are_apart_under_every_preset(sets):
    scores = {
        preset: evaluate.compare_sets(
            str(sets / "a"), str(sets / "b"), str(sets / "r.json"), **SCORED, asked=asked(preset=preset)
        )
        for preset in ("adm", "pytorch-fid", "torch-fidelity", "clean", "")
    }
    assert min(found["fid"] for found in scores.values()) > 0.01 and scores[""]["fid"] == scores["adm"]["fid"]
    # The evaluator of ADM and torch-fidelity resize alike, and split the Inception Score differently.
    assert len({(round(found["fid"], 6), round(found["is_mean"], 9)) for found in scores.values()}) == 4


@pytest.mark.parametrize(
    "reference, samples, fields, message",
    [
        ("{}/none", "{}/a", {}, "--reference=.*none: nothing there"),
        ("{}/a", "{}/none", {}, "--samples=.*none: nothing there"),
        ("train", "{}/a", {}, "--reference=train: is a split of a data set; name it with --workdir or --config"),
        ("{}/a", "{}/b", {"preset": "pytorchfid"}, "--preset: unknown name 'pytorchfid', did you mean 'pytorch-fid'"),
        ("{}/a", "{}/b", {"sweep": "top_k=1"}, "are drawn already"),
    ],
)
def test_mistakes_are_one_line(sets, reference, samples, fields, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.compare_sets(
            reference.format(sets), samples.format(sets), str(sets / "r.json"), **SCORED, asked=asked(**fields)
        )
    assert "\n" not in str(error.value)


def run_script(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "evaluate.py", *argv]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)


def test_without_weights_and_offline_one_line_says_what_to_get(sets):
    offline = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    argv = [f"--reference={sets}/a", f"--samples={sets}/b", f"--out={sets}/r.json"]
    done = run_script(*argv, VQGAN_JAX_CACHE=str(sets / "empty"), **offline)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    for words in ("pt_inception-2015-12-05-6726825d.pth", "6726825d0af5f729", "https://", "--inception_weights=FILE"):
        assert words in line
    done = run_script(f"--out={sets}/r.json")
    assert "--workdir is missing" in done.stderr.strip().splitlines()[-1]


def test_this_machine_gives_the_same_numbers_on_one_device_as_on_eight(sets):
    assert jax.device_count() == 8
    program = (
        "import json, sys, evaluate; from tests.evals.nets import small_net\n"
        "found = evaluate.compare_sets(*sys.argv[1:4], batch=5, seed=0,"
        " asked=evaluate.Asked(preset='adm', net=small_net()))\n"
        "print('RESULT', json.dumps({k: v for k, v in found.items() if isinstance(v, float)}))"
    )
    settings = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", program, f"{sets}/a", f"{sets}/b", f"{sets}/one.json"]
    done = subprocess.run(argv, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    alone = json.loads(line[7:])
    here = evaluate.compare_sets(f"{sets}/a", f"{sets}/b", f"{sets}/eight.json", **SCORED, asked=asked(preset="adm"))
    for name, value in alone.items():
        assert here[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
