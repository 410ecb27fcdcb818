"""Prepared records give the source's examples; a stopped run goes on to the same bytes; nothing is overwritten."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from configs import common
from tests.data.same import assert_same, examples
from vqgan_jax.config import UserError
from vqgan_jax.data.records import Records, read_manifest
from vqgan_jax.data.sources import open_source
from vqgan_jax.tools import prepare as tool
from vqgan_jax.tools.prepare import Picture, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def config(source, path="", **fields):
    data = common.data(source)
    data.update({"path": str(path), "train_examples": 23, "val_examples": 6, "image_size": 16} | fields)
    return data


def run(data, out, splits=("train", "val"), picture=None, shards=0, workers=1):
    return prepare(data, str(out), splits=splits, picture=picture or Picture(), shards=shards, workers=workers)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pixels(i, height=20, width=30):
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)


def save(path, i, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(i)).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Two classes in two splits, of every kind of file; two of them cannot be read."""
    root = tmp_path / "photos"
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "train" / "cat" / "1.jpg", 1, exif=exif, quality=80)
    save(root / "train" / "cat" / "zwölf.PNG", 2)
    save(root / "train" / "dog" / "3.webp", 3)
    Image.fromarray(pixels(4)).convert("CMYK").save(root / "train" / "dog" / "4.jpg")
    (root / "train" / "cat" / "2.jpg").write_bytes((root / "train" / "cat" / "1.jpg").read_bytes()[:300])
    (root / "train" / "dog" / "empty.png").write_bytes(b"")
    save(root / "val" / "dog" / "5.jpg", 5)
    return root


@pytest.fixture
def pairs(tmp_path):
    """Pictures with masks and depth maps of the same proportions."""
    root = tmp_path / "pairs"
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            save(root / "images" / split / f"{i}.jpg", i)
            for kind, dtype in (("masks", np.uint8), ("depths", np.uint16)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                array = np.random.default_rng(i).integers(0, 200, (40, 60)).astype(dtype)
                Image.fromarray(array).save(root / kind / split / f"{i}.png")
    return root


def test_records_equal_the_scenes_they_were_made_of(tmp_path):
    data = config("scenes")
    manifest = run(data, tmp_path / "out", shards=4)
    assert manifest["keys"] == sorted(open_source(data, "train")[0])
    assert manifest["splits"]["train"]["count"] == 23 and len(manifest["splits"]["train"]["shards"]) == 4
    for split in ("train", "val"):
        made, original = open_source(config("records", tmp_path / "out"), split), open_source(data, split)
        assert made.classes == original.classes
        assert_same(examples(made), examples(original))


def test_pictures_keep_their_bytes_and_what_cannot_be_read_is_named(photos, tmp_path, capsys):
    command = [f"--path={photos}", "--source=folder", f"--out={tmp_path / 'out'}", "--workers=1"]
    assert tool.main(command) == 0
    said = capsys.readouterr().out
    assert "train 4 in 1 shards, val 1 in 1 shards" in said and "2 left out" in said and said.count("\n") == 1
    manifest = read_manifest(tmp_path / "out")
    assert [Path(path).name for path, _ in manifest["splits"]["train"]["corrupt"]] == ["2.jpg", "empty.png"]
    assert manifest["classes"] == ["cat", "dog"] and manifest["keys"] == ["image", "label", "name"]
    original = open_source(config("folder", photos, resize="bilinear_no_antialias"), "train")
    made = Records(tmp_path / "out", "train")
    assert_same(examples(made), [original[i] for i in (0, 2, 3, 4)])
    names = [photos / "train" / name for name in ("cat/1.jpg", "cat/zwölf.PNG", "dog/3.webp", "dog/4.jpg")]
    assert [made.encoded(i)["image_bytes"] for i in range(4)] == [name.read_bytes() for name in names]
    # Both decode a JPEG smaller in training, where the crop is smaller.
    small = {"image_size": 2, "crop": "random"}
    assert_same(
        examples(open_source(config("records", tmp_path / "out", **small), "train"))[:1],
        [open_source(config("folder", photos, **small), "train")[0]],
    )


def test_an_archive_gives_the_records_of_its_folder(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted(photos.rglob("*.*")):
            archive.write(path, path.relative_to(photos))
    run(config("archive", tmp_path / "photos.zip"), tmp_path / "a")
    run(config("folder", photos), tmp_path / "b")
    for split in ("train", "val"):
        a, b = (examples(Records(tmp_path / name, split)) for name in "ab")
        assert_same([example | {"name": ""} for example in a], [example | {"name": ""} for example in b])


def test_masks_and_depths_are_kept_exactly_also_beside_smaller_pictures(pairs, tmp_path):
    data = config("pairs", pairs, masks="masks", depths="depths", resize="bilinear_no_antialias")
    run(data, tmp_path / "whole")
    run(data, tmp_path / "small", picture=Picture(10))
    for split in ("train", "val"):
        original = examples(open_source(data, split))
        assert_same(examples(Records(tmp_path / "whole", split)), original)
        small = examples(Records(tmp_path / "small", split))
        assert {example["image"].shape for example in small} == {(10, 15, 3)}
        assert_same([example | {"image": 0} for example in small], [example | {"image": 0} for example in original])


def test_resized_pictures_are_those_of_the_filter_and_none_is_enlarged(tmp_path):
    for i, size in enumerate([(40, 30), (31, 90), (12, 50)]):  # height, width
        (tmp_path / "in" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, *size)).save(tmp_path / "in" / "train" / f"{i}.png")
    data = config("folder", tmp_path / "in")
    for name, picture in {"png": Picture(15, "box"), "jpeg": Picture(15, "box", 95)}.items():
        run(data, tmp_path / name, ("train",), picture)
        source = Records(tmp_path / name, "train")
        assert [example["image"].shape for example in examples(source)] == [(20, 15, 3), (15, 44, 3), (12, 50, 3)]
        assert source.encoded(2)["image_bytes"] == (tmp_path / "in" / "train" / "2.png").read_bytes()
        exact = np.asarray(Image.fromarray(pixels(0, 40, 30)).resize((15, 20), Image.Resampling.BOX))
        kind = Image.open(io.BytesIO(source.encoded(0)["image_bytes"])).format
        assert kind == name.upper()
        difference = np.abs(source[0]["image"].astype(int) - exact)
        assert difference.max() == 0 if name == "png" else 0 < difference.mean() < 5
    # Of the whole picture, though a crop of 2 pixels would be cut from a JPEG decoded at an eighth.
    (tmp_path / "jpegs" / "train").mkdir(parents=True)
    Image.fromarray(pixels(3, 64, 64)).save(tmp_path / "jpegs" / "train" / "1.jpg")
    run(config("folder", tmp_path / "jpegs", image_size=2), tmp_path / "of_jpeg", ("train",), Picture(8))
    whole = Image.open(tmp_path / "jpegs" / "train" / "1.jpg").resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(Records(tmp_path / "of_jpeg", "train")[0]["image"], np.asarray(whole))
    assert read_manifest(tmp_path / "jpeg")["settings"]["picture"] == {"side": 15, "filter": "box", "jpeg": 95}


@pytest.mark.parametrize("finished", [0, 1, 5])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, finished):
    data = config("scenes")
    run(data, tmp_path / "whole", shards=3)
    write, written = tool._Writer.__call__, []

    def stopping(self, shard):
        if len(written) == finished:
            (tmp_path / "out" / f".123.tmp.{shard.file}").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(shard.file)
        return write(self, shard)

    monkeypatch.setattr(tool._Writer, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out", shards=3)
    with pytest.raises(UserError, match="(unfinished|no such file)"):
        Records(tmp_path / "out", "train")
    first = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in written[1:]}
    if written:  # damaged since
        path = tmp_path / "out" / written[0]
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(tool._Writer, "__call__", write)
    run(data, tmp_path / "out", shards=3)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert first == {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in first}  # and were not written again
    before = files(tmp_path / "out")
    assert run(data, tmp_path / "out", shards=3) == read_manifest(tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_goes_on_with_more_of_them(tmp_path):
    fields = ["--source=scenes", "--train_examples=400", "--val_examples=20", "--image_size=192", "--shards=40"]
    command = [sys.executable, "-m", "vqgan_jax.tools.prepare", *fields]
    environment = os.environ | {"VQGAN_JAX_CACHE": "/dev/null/none"}  # scenes are rendered while they are written
    process = subprocess.Popen([*command, f"--out={tmp_path / 'out'}", "--workers=2"], cwd=ROOT, env=environment)
    unfinished = tmp_path / "out" / "manifest.unfinished.json"
    while process.poll() is None and not (unfinished.exists() and len(json.loads(unfinished.read_text())["done"]) > 1):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not ended by itself
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive
    for out, workers in (("out", 2), ("whole", 1)):
        subprocess.run(
            [*command, f"--out={tmp_path / out}", f"--workers={workers}"], cwd=ROOT, env=environment, check=True
        )
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_several_processes_write_the_same_bytes(photos, tmp_path):
    for out, workers in (("one", 1), ("two", 2)):
        run(config("folder", photos), tmp_path / out, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_folder_of_other_records_or_files_is_refused(photos, tmp_path):
    data = config("folder", photos)
    run(data, tmp_path / "out")
    before = files(tmp_path / "out")
    save(photos / "train" / "dog" / "6.jpg", 6)
    with pytest.raises(UserError, match="made with other settings .files.train"):
        run(data, tmp_path / "out")
    (photos / "train" / "dog" / "6.jpg").rename(photos / "train" / "dog" / "empty.png")  # as many files as before
    (photos / "train" / "dog" / "empty.png").rename(photos / "train" / "dog" / "vacant.png")
    with pytest.raises(UserError, match="made with other settings .files.train"):
        run(data, tmp_path / "out")
    (photos / "train" / "dog" / "vacant.png").rename(photos / "train" / "dog" / "empty.png")
    with pytest.raises(UserError, match="made with other settings .picture.side: 10 here, 0 there"):
        run(data, tmp_path / "out", picture=Picture(10))
    with pytest.raises(UserError, match="made with other settings .data.val_share"):
        run(config("folder", photos, val_share=0.5), tmp_path / "out")
    assert run(config("folder", photos, flip=False, image_size=16), tmp_path / "out")  # what no record depends on
    assert files(tmp_path / "out") == before
    with pytest.raises(UserError, match="holds other files, such as 'train'"):
        run(data, photos)
    shard = next((tmp_path / "out").glob("train-*"))
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        run(data, tmp_path / "out")


def test_a_split_of_which_nothing_can_be_read_is_refused(tmp_path):
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="'train' has no example that can be read: .*1.jpg"):
        run(config("folder", tmp_path / "in"), tmp_path / "out", ("train",))


def test_a_bucket_takes_and_gives_records(photos, bucket, tmp_path):
    data = config("folder", photos)
    run(data, f"{bucket}/out")
    run(data, tmp_path / "out")
    for split in ("train", "val"):
        assert_same(
            examples(open_source(config("records", f"{bucket}/out"), split)),
            examples(open_source(config("records", tmp_path / "out"), split)),
        )
    run(config("records", f"{bucket}/out"), tmp_path / "again")  # records are a source too
    for split in ("train", "val"):
        assert_same(examples(Records(tmp_path / "again", split)), examples(Records(tmp_path / "out", split)))


def test_verify_reads_every_byte(photos, tmp_path, capsys):
    out = tmp_path / "out"
    run(config("folder", photos), out)
    assert tool.main([f"--out={out}", "--verify"]) == 0
    assert "2 shards are as they were written" in capsys.readouterr().out
    shard = next(out.glob("val-*"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert tool.main([f"--out={out}", "--verify"]) == 2
    assert f"{shard}: the shard differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--source=foldr"], "--source: unknown name 'foldr', did you mean 'folder'?"),
        (["--source=folder", "--path=/nowhere"], "--path: .*'/nowhere"),
        (["--source=scenes", "--jpeg=95"], "--jpeg=95: takes 95 to 100, and only with --resize"),
        (["--source=scenes", "--jpeg=80", "--resize=8"], "--jpeg=80"),
        (["--source=scenes", "--splits=trian"], "--splits=trian: takes"),
        (["--source=scenes", "--workers=0"], "--workers 1 or more"),
        (["--verify"], "manifest.json: no such file"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, flags, said):
    assert tool.main([f"--out={tmp_path / 'out'}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error
