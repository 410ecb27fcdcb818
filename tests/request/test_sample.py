"""sample.py under conditions and with given parts: in one process in memory, and as the script on one and two."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from tests.processes import free_address, run_together
from tests.request import models
from vqgan_jax import pretrained
from vqgan_jax.config import UserError
from vqgan_jax.request.flags import Asked
from vqgan_jax.sampling.strategies import Strategy

SIZE = models.SIZE


def sampled(out: Path, asked: Asked, **changes) -> dict[str, np.ndarray]:
    """The arrays that sample.py writes."""
    settings = dict(batch=8, seed=0, strategy=Strategy(guidance=2.0), size="", best=True, dtype="float32")
    settings |= dict(stride=0, decode="exact", memory=0.0, every=0, mesh={"data": -1, "fsdp": 1, "tensor": 1})
    sample.sample("workdir", str(out), asked, **settings | changes)
    with np.load(out / "samples.npz") as arrays:
        return dict(arrays)


def test_a_guided_job_under_two_conditions_with_a_given_part(tmp_path, masks, monkeypatch):
    """Classes, masks in files and the left of pictures: arrays, sheet, resuming, and other settings."""
    trained = models.untrained("class_segmentation", dropout=0.1)
    monkeypatch.setattr(pretrained, "open_transformer", lambda *_, **__: trained)
    asked = Asked(
        classes=("2", "5"), condition=(f"segmentation={masks}",), each=2, given="val", mask="right", paste=True
    )
    made = sampled(tmp_path / "out", asked)
    assert made["arr_0"].shape == (6, SIZE, SIZE, 3)
    assert made["label"].tolist() == [2, 2, 5, 5, 2, 2] and made["segmentation"][:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        made["given"].shape == (6, *models.GRID) and made["given"][:, :, :2].all() and not made["given"][:, :, 2:].any()
    )
    np.testing.assert_array_equal(made["arr_0"][0, :, : SIZE // 2], made["arr_0"][1, :, : SIZE // 2])  # pasted
    assert (made["arr_0"][0] != made["arr_0"][1]).any()

    # Rows of class, mask, what its tokens say, what is given, two samples and the original, each enlarged to 96 pixels.
    sheet = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert sheet.shape == (3 * (96 + 14 + 2), 7 * (96 + 2), 3)
    np.testing.assert_array_equal(sheet[:96:6, 4 * 98 : 4 * 98 + 96 : 6], made["arr_0"][0])
    record = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert record["each"] == 2 and record["given"]["mask"] == {"region": "right"}

    for name in ("000001.png", "000005.png", "samples.npz"):
        (tmp_path / "out" / name).unlink()
    again = sampled(tmp_path / "out", asked)
    for name, array in made.items():
        np.testing.assert_array_equal(again[name], array)
    more = sampled(tmp_path / "out", Asked(**vars(asked) | {"number": 8}))
    np.testing.assert_array_equal(more["arr_0"][:6], made["arr_0"])
    Image.fromarray(np.full((SIZE, SIZE), 4, np.uint8)).save(masks / "0.png")
    with pytest.raises(UserError, match="other settings: condition.segmentation.sha256"):
        sampled(tmp_path / "out", asked)


def run(*argv: str, processes: int = 1) -> list[subprocess.CompletedProcess]:
    """Runs sample.py, in processes that meet over gloo where there are several."""
    address = free_address()
    meet = (
        "import jax, runpy, sys\n"
        "index, initialize, sys.argv[0] = int(sys.argv.pop()), jax.distributed.initialize, 'sample.py'\n"
        f"meet = dict(coordinator_bind_address='{address}', cluster_detection_method='deactivate')\n"
        f"jax.distributed.initialize = lambda: initialize('{address}', {processes}, index, **meet)\n"
        "runpy.run_path('sample.py', run_name='__main__')"
    )
    alone = [["sample.py", *argv]]
    several = [["-c", meet, *argv, "--distributed", str(index)] for index in range(processes)]
    return run_together(alone if processes == 1 else several, {"JAX_NUM_CPU_DEVICES": "1"}, timeout=400)


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz") as found:
        return dict(found)


@pytest.mark.slow
def test_the_script_under_masks_layouts_and_given_parts(tmp_path, masks):
    semantic = models.write_workdir("segmentation", tmp_path / "semantic")
    (done,) = run(f"--workdir={semantic}", f"--out={tmp_path / 'a'}", f"--condition={masks}", "--each=2", "--batch=4")
    assert done.returncode == 0, done.stderr
    assert arrays(tmp_path / "a")["segmentation"][:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]

    layout = models.write_workdir("objects", tmp_path / "layout")
    (tmp_path / "boxes.json").write_text(
        '[[{"class": "house", "box": [0, 0.5, 0.5, 0.5]}], [{"class": 1, "point": [0, 1]}]]'
    )
    (done,) = run(f"--workdir={layout}", f"--out={tmp_path / 'b'}", f"--condition={tmp_path / 'boxes.json'}")
    assert done.returncode == 0, done.stderr
    assert arrays(tmp_path / "b")["box_classes"].tolist() == [[4, -1, -1], [1, -1, -1]]
    (tmp_path / "boxes.json").write_text('[{"class": "castle", "box": [0, 0.5, 0.5, 0.5]}]')
    (done,) = run(f"--workdir={layout}", f"--out={tmp_path / 'b'}", f"--condition={tmp_path / 'boxes.json'}")
    assert done.returncode == 2 and "boxes.json" in done.stderr.splitlines()[-1], done.stderr

    free = models.write_workdir("none", tmp_path / "free")
    hole = np.zeros((SIZE, SIZE), np.uint8)
    hole[4:9, 4:12] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    picture = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    asked = [f"--given={tmp_path / 'picture.png'}", f"--mask={tmp_path / 'hole.png'}", "--each=3", "--paste"]
    (done,) = run(f"--workdir={free}", f"--out={tmp_path / 'c'}", *asked)
    assert done.returncode == 0, done.stderr
    mended = arrays(tmp_path / "c")
    assert mended["arr_0"].shape[0] == 3 and not mended["given"][0, 1:3, 1:3].any()
    np.testing.assert_array_equal(mended["arr_0"][:, hole == 0], picture[hole == 0][None].repeat(3, 0))
    assert (tmp_path / "c" / "grid.png").exists()


@pytest.mark.slow
def test_two_processes_split_a_job_and_equal_one(tmp_path):
    """And one that was stopped goes on in two."""
    workdir = models.write_workdir("segmentation", tmp_path / "workdir")
    asked = [f"--workdir={workdir}", "--number=7", "--batch=2", "--seed=5", "--given=val", "--mask=center"]
    (alone,) = run(*asked, f"--out={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    together = run(*asked, f"--out={tmp_path / 'two'}", processes=2)
    assert [done.returncode for done in together] == [0, 0], together[0].stderr + together[1].stderr
    assert "7 images" in together[0].stdout and "images" not in together[1].stdout
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()} and len(names) == 10
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    shutil.copytree(tmp_path / "one", tmp_path / "stopped")
    for name in ("000001.png", "000002.png", "000006.png", "samples.npz", "grid.png"):
        (tmp_path / "stopped" / name).unlink()
    again = run(*asked, f"--out={tmp_path / 'stopped'}", processes=2)
    assert "2 of this host's were there" in again[0].stdout, again[0].stderr  # of 4, and 2 of the other's 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_the_bar_does_not_take_what_an_earlier_job_drew_for_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with sample.tqdm(total=10, file=io.StringIO(), mininterval=0) as bar:
        sample.hold(bar, 8.0)
        for _ in range(3):
            now[0] += 30
            bar.update(0.1)
        assert bar.format_dict["n"] == pytest.approx(8.3) and bar.format_dict["initial"] == 8
        assert bar.format_dict["rate"] == pytest.approx(0.1 / 30)


def test_a_batch_is_no_larger_than_what_is_missing(tmp_path, monkeypatch):
    """Else a picture more would be drawn as often as a batch has room."""
    trained, batches = models.untrained("class_segmentation", dropout=0.1), []
    monkeypatch.setattr(pretrained, "open_transformer", lambda *_, **__: trained)

    def samples(self, conditions, grid, *, batch, indices, **rest):
        batches.append(batch)
        for start in range(0, len(indices), batch):
            yield np.zeros((len(indices[start : start + batch]), SIZE, SIZE, 3), np.uint8)

    monkeypatch.setattr(type(trained), "samples", samples)
    for number in (5, 6, 15):
        sampled(tmp_path / "out", Asked(number=number), batch=4)
    assert batches == [3, 1, 3]
