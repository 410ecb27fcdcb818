"""Records: what is written is read, in any order, thread and process; what is missing or damaged is named."""

import io
import json
import os
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from configs import common
from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data import records
from vqgan_jax.data.records import CODES, IMAGES, Records, read_manifest, verify, write_manifest, write_shard
from vqgan_jax.data.source import CorruptExample

COUNTS = (3, 5, 1)


def example(i):
    rng = np.random.default_rng(i)
    return {
        "codes": rng.integers(0, 1 << 16, (4, 4), np.int32),
        "depth": rng.random((3, 5), np.float32),
        "segmentation": rng.integers(0, 255, (3, 5), np.uint8),
        "boxes": np.zeros((i % 2, 4), np.float32),
        "label": i,
        "name": f"Ünï/{i}.png",
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert type(a[key]) is type(b[key])
        np.testing.assert_array_equal(a[key], b[key])
        assert np.asarray(a[key]).dtype == np.asarray(b[key]).dtype


def write(folder, counts=COUNTS, kind=IMAGES, make=example, **extra):
    shards, start = [], 0
    for n, count in enumerate(counts):
        shards.append(write_shard(storage.path(folder) / f"train-{n}", map(make, range(start, start + count))))
        start += count
    splits = {"train": {"count": start, "shards": shards}, "val": {"count": 0, "shards": []}}
    write_manifest(folder, {"kind": kind, "splits": splits, "classes": ["a", "b"], "keys": ["label"], **extra})
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "records")


def png(i):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 3, 3), i, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_written_is_read_in_any_order(folder):
    source = Records(folder, "train")
    assert len(source) == sum(COUNTS) and source.classes == ("a", "b")
    for i in (8, 0, 3, 2, 7, 3):
        assert_same(source[i], example(i))
    for i in (-1, 9):
        with pytest.raises(IndexError):
            source[i]
    assert len(Records(folder, "val")) == 0


def test_readers_serve_threads_and_are_opened_again_after_pickling(folder):
    source = Records(folder, "train")
    source[0]
    pickled = pickle.dumps(source)
    assert len(pickled) < 3000
    indices = np.random.default_rng(0).integers(0, 9, 400).tolist()
    for one in (source, pickle.loads(pickled)):
        with ThreadPoolExecutor(8) as pool:
            for i, read in zip(indices, pool.map(one.__getitem__, indices), strict=True):
                assert_same(read, example(i))


def test_pictures_keep_their_bytes_and_are_decoded_on_reading(tmp_path):
    write(tmp_path, (2,), make=lambda i: {"image_bytes": png(i), "label": i})
    source = Records(tmp_path, "train")
    assert source.encoded(1) == {"image_bytes": png(1), "label": 1}
    assert_same(source[1], {"image": np.full((2, 3, 3), 1, np.uint8), "label": 1})


def test_the_same_examples_give_the_same_bytes(folder, tmp_path):
    other = write(tmp_path / "other", make=lambda i: dict(reversed(example(i).items())))
    assert read_manifest(folder) == read_manifest(other)
    for shard in read_manifest(folder)["splits"]["train"]["shards"]:
        data = (folder / shard["file"]).read_bytes()
        assert data == (other / shard["file"]).read_bytes() and len(data) == shard["bytes"]
    assert verify(folder) == 3


def test_a_shard_whose_examples_fail_leaves_nothing(tmp_path):
    def failing():
        yield example(0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_shard(tmp_path / "shard", failing())
    assert not list(tmp_path.iterdir())


def test_a_shard_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(UserError, match=f"{tmp_path / 'shard'}: cannot be written .*File too large"):
            write_shard(
                tmp_path / "shard", ({"image_bytes": np.random.default_rng(i).bytes(1 << 18)} for i in range(9))
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_missing_or_truncated_shard_is_named_on_opening(folder, damage):
    path = folder / "train-1"
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(data[:-1] if damage == "truncated" else data + b"0")
    for check in (lambda: Records(folder, "train"), lambda: verify(folder)):
        with pytest.raises(UserError, match=f"{path}: the shard (is missing|has)") as caught:
            check()
        assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_found_by_verify_and_costs_one_example(folder):
    path = folder / "train-1"
    data = bytearray(path.read_bytes())
    at = bytes(data).index("Ünï/4.png".encode()) if "Ünï/4.png".encode() in data else len(data) // 3
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: the shard differs"):
        verify(folder)
    source, damaged = Records(folder, "train"), []
    for i in range(len(source)):
        try:
            assert_same(source[i], example(i))
        except CorruptExample as error:
            damaged.append(error.path)
    assert len(damaged) == 1 and damaged[0].startswith(f"{path}[")


def test_more_shards_than_files_may_be_open_are_read(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limits[1]))
    try:
        source = Records(write(tmp_path, [1] * 60), "train")
        assert [source[i]["label"] for i in range(60)] == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_is_no_manifest_is_told_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="manifest.json: no such file"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match="manifest.json: no such file"):
        read_manifest(folder / "train-0")
    write_manifest(tmp_path / "part", {"kind": IMAGES}, name=records.UNFINISHED)
    with pytest.raises(UserError, match="part: is unfinished"):
        Records(tmp_path / "part", "train")
    with pytest.raises(UserError, match="holds images, where codes"):
        Records(folder, "train", kind=CODES)
    with pytest.raises(UserError, match="did you mean 'train'"):
        Records(folder, "trian")
    for text in ("{", "[]", "{}"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="is no manifest of records"):
            read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 99, "kind": IMAGES}))
    with pytest.raises(UserError, match="newer"):
        read_manifest(folder)


def test_the_source_takes_its_splits_names_from_the_config(folder):
    data = common.data("records")
    data.update(dict(path=str(folder), train_split="", val_split="train"))
    assert [len(records.open_records(data, split)) for split in ("train", "val")] == [9, 9]
    data.path = ""
    with pytest.raises(UserError, match=r"config\.data\.path"):
        records.open_records(data, "train")


@pytest.mark.parametrize("in_place", [True, False])
def test_shards_in_a_bucket_are_read_in_place_or_copied(bucket, tmp_path, monkeypatch, in_place):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    if not in_place:  # as if array_record had no client for buckets
        real = records.ArrayRecordReader
        monkeypatch.setattr(
            records, "ArrayRecordReader", lambda path, *a, **k: real(path.replace("gs://", "/nowhere/"), *a, **k)
        )
    folder = f"{bucket}/records"
    write(folder)
    assert verify(folder) == 3
    source = Records(folder, "train")
    for i in (8, 0, 4):
        assert_same(source[i], example(i))
    assert (tmp_path / "cache").exists() != in_place
    (storage.path(folder) / "train-2").unlink()
    with pytest.raises(UserError, match="train-2: the shard is missing"):
        Records(folder, "train")
