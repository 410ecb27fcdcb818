"""The demo's driver: the commands it runs are the ones it records, and it stops where one fails."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqgan_jax.exit_codes import PREEMPTED
from vqgan_jax.images import save_png
from vqgan_jax.tools import demo, steps


class FakeRunner:
    """Writes what each script would; the script number `fail` (from 1) ends with `code` instead."""

    def __init__(self, fail=0, code=3, leave_out=""):
        self.calls, self.fail, self.code, self.leave_out = [], fail, code, leave_out

    def __call__(self, argv, environment):
        self.calls.append((list(argv), dict(environment)))
        if len(self.calls) == self.fail:
            return self.code
        flags = dict(arg.removeprefix("--").partition("=")[::2] for arg in argv[2:])
        place = Path(steps.ROOT, flags.get("out") or flags["workdir"])
        if argv[1].startswith("train"):
            name = "nll" if "transformer" in argv[1] else "quantizer_loss"
            place.mkdir(parents=True, exist_ok=True)
            rows = [{"step": s, "time": 1.0, name: 1 / s, "val/psnr": "nan"} for s in (1, 2)]
            (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif argv[1] == "evaluate.py":
            place.write_text(json.dumps({"val_psnr": 26.5, "table_nll": 3.0, "workdir": "x"}))
            self._picture(place.parent / "reconstructions.png", 10)
        else:
            self._picture(place / "grid.png", 20 if place.name == "samples" else 30)
        return 0

    def _picture(self, path, level):
        if f"{path.parent.name}/{path.name}" != self.leave_out:
            save_png(path, np.full((4, 4, 3), level, np.uint8))


def test_everything_is_written(tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo.main([f"--out={out}"], run=FakeRunner()) == 0
    assert (out / "samples.png").read_bytes() == (out / "samples" / "grid.png").read_bytes()
    assert (out / "panorama.png").read_bytes() == (out / "panorama" / "grid.png").read_bytes()
    assert (out / "samples.png").read_bytes() != (out / "panorama.png").read_bytes()
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == {"val_psnr", "table_nll", "seconds"} and summary["val_psnr"] == 26.5
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, "time": 1.0, "vqgan/quantizer_loss": 1.0, "vqgan/val/psnr": "nan"}
    assert [row["transformer/nll"] for row in rows[2:]] == [1.0, 0.5]
    page = (out / "index.html").read_text()
    assert all(f'alt="{title}"' in page for title in ("Reconstructions", "Samples", "Panoramas"))
    headlines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split()[0] for line in headlines] == [f"[{k}/6]" for k in range(1, 7)]


def test_the_recorded_commands_are_the_ones_that_ran(tmp_path):
    run = FakeRunner()
    demo.run_demo(tmp_path, run=run)
    log = json.loads((tmp_path / "commands.json").read_text())
    assert len(log) == len(run.calls) == len(demo.STEPS)
    for entry, (argv, environment) in zip(log, run.calls, strict=True):
        words = shlex.split(entry["command"])
        variables = dict(word.split("=") for word in words[: words.index("python")])
        assert variables.items() <= environment.items() and variables.keys() == steps.ENVIRONMENT.keys()
        assert [sys.executable, *words[words.index("python") + 1 :]] == argv


def test_the_environment_of_the_user_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    run = FakeRunner()
    demo.run_demo(tmp_path, run=run)
    assert all(e["JAX_PLATFORMS"] == "cuda" for _, e in run.calls)
    assert all(environment["PATH"] == os.environ["PATH"] for _, environment in run.calls)


def test_a_folder_inside_the_repository_is_named_from_its_root(monkeypatch, tmp_path):
    (tmp_path / "train_vqgan.py").touch()
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = FakeRunner()
    demo.run_demo("../runs/demo", run=run)
    assert run.calls[0][0][-1] == "--workdir=runs/demo/vqgan" and (tmp_path / "runs/demo/index.html").exists()


@pytest.mark.parametrize("fail", [1, 3, 5])
def test_a_failing_command_ends_the_demo_with_its_code_and_its_name(tmp_path, capsys, fail):
    run = FakeRunner(fail=fail, code=3)
    assert demo.main([f"--out={tmp_path}"], run=run) == 3
    error = capsys.readouterr().err
    assert len(run.calls) == fail and error.count("\n") == 1
    assert error.endswith(f"{shlex.join(['python', *run.calls[-1][0][1:]])}\n") and "exit code 3" in error
    assert not (tmp_path / "index.html").exists()


def test_stopped_and_started_again(tmp_path, capsys):
    """The time of both starts counts; the command that was stopped stands on the page once."""
    ticks = iter(range(0, 10_000, 7))
    with pytest.raises(steps.ChildFailed, match=f"to go on: .* --out={tmp_path}") as stopped:
        demo.run_demo(tmp_path, run=FakeRunner(fail=2, code=PREEMPTED), clock=lambda: float(next(ticks)))
    assert stopped.value.code == PREEMPTED
    summary = demo.run_demo(tmp_path, run=FakeRunner(), clock=lambda: float(next(ticks)))
    log = json.loads((tmp_path / "commands.json").read_text())
    assert len(log) == 7 and summary["seconds"] == sum(entry["seconds"] for entry in log) > 0
    assert (tmp_path / "index.html").read_text().count("<code>") == len(demo.STEPS)


@pytest.mark.parametrize("missing", ["samples/grid.png", "panorama/grid.png"])
def test_a_picture_that_did_not_come_is_one_line(tmp_path, capsys, missing):
    assert demo.main([f"--out={tmp_path}"], run=FakeRunner(leave_out=missing)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and missing in error and "sample.py" in error


def test_no_checkout_and_no_folder_are_one_line(tmp_path, capsys, monkeypatch):
    assert demo.main(["--out=/proc/none"], run=FakeRunner()) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    assert demo.main([f"--out={tmp_path / 'x'}"], run=FakeRunner()) == 2
    assert "needs a clone" in capsys.readouterr().err


def test_the_scripts_and_their_flags_exist():
    """Each script knows the flags that the demo gives it; config overrides aside, which need the config."""
    for step in demo.STEPS:
        files = (step.args[0], "vqgan_jax/cli.py", "vqgan_jax/sampling/strategy_flags.py")
        files += ("vqgan_jax/request/flags.py",)
        text = "".join((steps.ROOT / file).read_text() for file in files)
        for arg in step.args[1:]:
            name, _, value = arg.removeprefix("--").partition("=")
            if name == "config":
                assert (steps.ROOT / value).exists()
            elif not name.startswith("config."):
                assert f'("{name}"' in text or f'\n        "{name}"' in text, f"{step.args[0]} has no --{name}"


def test_help_teaches():
    command = [sys.executable, "-m", "vqgan_jax.tools.demo", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=steps.ROOT, check=True)
    assert "--out DIR" in result.stdout and "runs/demo" in result.stdout
