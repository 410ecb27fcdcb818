"""The command line of tools.encode; what it writes is tested in tests/train/test_code_cache.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqgan_jax.data import records
from vqgan_jax.exit_codes import USER_ERROR
from vqgan_jax.tools.convert import import_checkpoint

ROOT = Path(__file__).parents[2]


def run(*flags: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vqgan_jax.tools.encode", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_of_the_readme(tmp_path):
    import_checkpoint(str(ROOT / "tests" / "golden" / "class_transformer_tiny.ckpt"), None, str(tmp_path / "class"))
    flags = [
        "--config=configs/demo_transformer.py",
        f"--config.vqgan={tmp_path / 'class' / 'first_stage'}",
        "--config.data.image_size=32",
        "--config.data.train_examples=9",
        "--config.data.val_examples=3",
        f"--out={tmp_path / 'codes'}",
    ]
    done = run(*flags, "--views=2", "--batch=4", VQGAN_JAX_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert f"codes of train 9, val 3 examples (2); train with --config.codes={tmp_path / 'codes'}" in done.stdout
    assert "image/s" in done.stderr and "12/12" in done.stderr  # the bar
    assert records.Records(tmp_path / "codes", "train", kind=records.CODES)[8]["codes/image"].shape == (2, 8, 8)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=configs/demo_transformer.py", "--out={tmp}"], "config.vqgan: name the workdir of a trained VQGAN"),
        (["--config=configs/demo_transformer.py"], "--out is missing"),
        (["--config=configs/demo_transformer.py", "--out={tmp}", "--batch=0"], "batch"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    done = run(*(flag.format(tmp=tmp_path) for flag in flags))
    assert done.returncode == USER_ERROR, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches():
    done = run("--help")
    assert "python -m vqgan_jax.tools.encode --config=" in done.stdout and "--views" in done.stdout
