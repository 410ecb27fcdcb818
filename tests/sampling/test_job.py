"""A job of samples that is killed goes on, and equals one that was not; other settings do not mix in."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import reference as ref
from vqgan_jax import parallel, pretrained, storage
from vqgan_jax.config import UserError
from vqgan_jax.sampling import job
from vqgan_jax.sampling.job import SampleFolder, host_share
from vqgan_jax.sampling.large import LargeOptions
from vqgan_jax.sampling.strategies import Strategy

ROOT = Path(__file__).parent.parent.parent
MODEL = ref.GOLDEN / "class_transformer_tiny.ckpt"
NUMBER = 24


def command(out: Path, *more: str) -> list[str]:
    fixed = [f"--workdir={MODEL}", f"--out={out}", f"--number={NUMBER}", "--batch=2", "--top_k=20", "--seed=3"]
    return [sys.executable, "sample.py", *fixed, *more]


def run(out: Path, *more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command(out, *more), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.png"))


@pytest.mark.slow
def test_a_killed_job_goes_on_and_equals_an_uninterrupted_one(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(command(killed), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(pictures(killed)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in pictures(killed)}
    assert 3 <= len(there) < NUMBER and not (killed / job.ARRAYS).exists()

    again = run(killed)
    assert again.returncode == 0, again.stderr
    assert f"({len(there)} of this host's were there)" in again.stdout
    assert {path.name: path.stat().st_mtime_ns for path in pictures(killed) if path.name in there} == there
    assert run(whole).returncode == 0
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in killed.iterdir()} and len(names) == NUMBER + 3
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name

    other = run(killed, "--temperature=0.5")
    assert other.returncode == 2
    assert "temperature: 0.5 here, 1.0 there" in other.stderr.splitlines()[-1]
    guided = run(tmp_path / "guided", "--guidance=2")
    assert guided.returncode == 2 and "condition_dropout" in guided.stderr.splitlines()[-1]
    assert not pictures(tmp_path / "guided")


@pytest.fixture(scope="module")
def trained():
    return pretrained.open_transformer(MODEL, key="path")


def test_a_picture_depends_on_its_index_alone(trained):
    """Whatever the batch, the order and the devices, here eight."""
    labels = np.arange(11, dtype=np.int32) % 10
    settings = dict(seed=4, strategy=Strategy(top_k=9))
    whole = list(trained.samples(labels, (8, 8), batch=8, **settings))
    assert [len(part) for part in whole] == [8, 3]
    whole = np.concatenate(whole)
    indices = np.array([10, 2, 7])
    some = np.concatenate(list(trained.samples(labels, (8, 8), batch=16, indices=indices, **settings)))
    np.testing.assert_allclose(some.astype(int), whole[indices], atol=1)  # decoding rounds as its batch size does
    rows = np.concatenate(
        list(trained.samples(lambda i: {"label": labels[i]}, (8, 8), batch=8, indices=np.arange(11), **settings))
    )
    np.testing.assert_array_equal(rows, whole)
    assert list(trained.samples(labels, (8, 8), batch=8, indices=np.array([], int), **settings)) == []


def test_a_batch_is_drawn_while_the_one_before_is_handed_over(trained, monkeypatch):
    events = []
    programs = trained._programs
    drawn = lambda *args: events.append("draw") or programs[1](*args)  # noqa: E731
    vars(trained)["_programs"] = (programs[0], drawn, programs[2])
    try:
        for _ in trained.samples(np.zeros(24, np.int32), (8, 8), batch=8, seed=0, strategy=Strategy()):
            events.append("got")
    finally:
        del vars(trained)["_programs"]
    assert events == ["draw", "draw", "got", "draw", "got", "got"]


def fill(path: Path, settings=None, number=5) -> SampleFolder:
    path.mkdir(exist_ok=True)
    with SampleFolder(storage.path(path), settings or {"seed": 1}) as folder:
        for index in set(range(number)) - folder.done:
            folder.write(index, np.full((4, 6, 3), index, np.uint8))
    return folder


def test_settings_that_made_no_picture_do_not_lock_the_folder(tmp_path):
    fill(tmp_path, {"stride": 99}, number=0)
    (tmp_path / ".7.tmp.000000.png").write_bytes(b"half")  # of a process that was killed
    fill(tmp_path, {"stride": 2}, number=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png", "sampling.json"]
    with pytest.raises(UserError, match="other settings: stride: 3 here, 2 there"):
        fill(tmp_path, {"stride": 3})


def test_arrays_are_the_pictures_in_order(tmp_path):
    folder = fill(tmp_path)
    folder.write_arrays(4, label=np.arange(4))
    with np.load(tmp_path / job.ARRAYS) as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (4, 4, 6, 3)
        np.testing.assert_array_equal(arrays["arr_0"][:, 0, 0, 0], range(4))
        np.testing.assert_array_equal(arrays["label"], range(4))
    Image.new("RGB", (3, 3)).save(tmp_path / "000002.png")
    with pytest.raises(UserError, match="000002.png: is of another size"):
        folder.write_arrays(4)
    (tmp_path / "000002.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="000002.png: cannot be read"):
        folder.write_arrays(4)


def test_what_is_there_counts_only_under_the_same_settings(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "a" / "000001.png")  # of somebody else: no record
    assert fill(tmp_path / "a").done == set()
    assert np.asarray(Image.open(tmp_path / "a" / "000001.png")).max() == 1
    (tmp_path / "a" / ".77.tmp.000009.png").write_bytes(b"half")
    assert fill(tmp_path / "a", number=7).done == set(range(5))
    with pytest.raises(UserError, match="seed: 2 here, 1 there") as error:
        fill(tmp_path / "a", {"seed": 2})
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "a" / job.RECORD).read_text()) == {"seed": 1}


def test_few_pictures_wait_in_memory_and_errors_come_out(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_WAITING", 4)
    gate, started = threading.Event(), []

    def slow(path, picture):
        started.append(path)
        gate.wait(30)

    monkeypatch.setattr(job.images, "save_png", slow)
    with SampleFolder(storage.path(tmp_path), {}) as folder:
        threading.Timer(0.5, gate.set).start()
        for index in range(20):
            folder.write(index, np.zeros((2, 2, 3), np.uint8))
            assert len(folder._writing) <= 4
    assert len(started) == 20

    def full(path, picture):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.images, "save_png", full)
    with pytest.raises(OSError, match="No space"), SampleFolder(storage.path(tmp_path), {}) as folder:
        folder.write(0, np.zeros((2, 2, 3), np.uint8))


class Stopped(Exception):
    pass


def draw_large(trained, path: Path, stop: float = 2.0, **more) -> tuple[list[float], SampleFolder]:
    """Two pictures beyond the trained size into a folder, until so much of them is drawn: what the bar showed."""
    shares = []

    def progress(share):
        shares.append(share)
        if share > stop:
            raise Stopped

    path.mkdir(exist_ok=True)
    labels, one = np.array([3, 4], np.int32), parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with SampleFolder(storage.path(path), {"seed": 1}) as folder:
        large = LargeOptions(folder=folder, progress=progress, **more)
        asked = dict(seed=4, batch=2, strategy=Strategy(top_k=9), mesh=one, large=large)
        for pictures in trained.samples(labels, (16, 20), **asked):
            for index, picture in enumerate(pictures):
                folder.write(index, picture)
    return shares, folder


def test_a_large_picture_that_was_stopped_goes_on_in_its_midst(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "KEEP_SECONDS", 0)
    whole, _ = draw_large(trained, tmp_path / "whole", every=4)
    assert len(whole) > 2 and whole[-1] == 1
    with pytest.raises(Stopped):
        draw_large(trained, tmp_path / "stopped", stop=whole[0])
    assert sorted(path.name for path in (tmp_path / "stopped").glob("0*")) == ["000000.begun.npz", "000001.begun.npz"]
    with pytest.raises(UserError, match="other settings: seed: 2 here, 1 there"):
        fill(tmp_path / "stopped", {"seed": 2})
    again, _ = draw_large(trained, tmp_path / "stopped")
    assert again == whole[1:]
    names = ["000000.png", "000001.png"]
    assert sorted(path.name for path in (tmp_path / "stopped").glob("0*")) == names
    for name in names:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    growing = sorted((tmp_path / "whole" / job.GROWING).iterdir())
    rows = int(growing[0].stem.partition("_")[2])
    assert growing[0].name == f"000000_{rows:04d}.png" and 4 <= rows < 16
    picture, finished = (
        np.asarray(Image.open(path)).astype(int) for path in (growing[0], tmp_path / "whole" / names[0])
    )
    assert picture.shape == finished.shape
    factor = len(picture) // 16
    assert (picture[-factor:] == 128).all() and (picture[: rows * factor] != 128).mean() > 0.5


def test_hosts_share_all_indices():
    shares = [host_share(50, process, 8) for process in range(8)]
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(50))
    assert {len(share) for share in shares} == {6, 7}


def test_how_codes_are_decoded_may_change_until_a_picture_is_whole(tmp_path):
    drawn = np.zeros((1, 4, 4), np.int32)
    (tmp_path / "a").mkdir()

    def opened(decode, seed=1):
        return SampleFolder(storage.path(tmp_path / "a"), {"seed": seed, "decode": decode}, later=("decode",))

    with opened("exact") as folder:
        folder._kept -= job.KEEP_SECONDS
        folder.keep([0], drawn, 7)
    with pytest.raises(UserError, match="seed: 2 here, 1 there"):
        opened("tiles", seed=2)
    with opened("tiles") as folder:
        assert folder.begun([0])[1] == 7
        folder.write(0, np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(UserError, match="decode: 'exact' here, 'tiles' there"):
        opened("exact")
