"""Prepared tfds data sets: ArrayRecord and TFRecord give the same examples, without TensorFlow; faults are named."""

import io
import json
import pickle
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from configs import common
from tests.data.same import assert_same, examples
from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data import tfrecords
from vqgan_jax.data.records import Records
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.tfrecords import Part, TFRecords
from vqgan_jax.object_tokens import FLAGS
from vqgan_jax.tools.prepare import Picture, prepare

COUNTS = {"train": 23, "validation": 4}
NAMES = ("cat", "dog", "ünicorn")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tfrecords"


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def raw(split, i):
    """What the data set holds, in our terms."""
    rng = np.random.default_rng([COUNTS[split], i])
    count = i % 3
    boxes = np.sort(rng.random((count, 2, 2), np.float32), axis=1)  # corners (y, x)
    return {
        "image": rng.integers(0, 256, (5, 6, 3), np.uint8),
        "name": f"{split}/{i}ä.png",
        "label": i % 3,
        "segmentation": rng.integers(0, 256, (5, 6), np.uint8),
        "corners": boxes.reshape(count, 4),
        "box_classes": np.arange(count, dtype=np.int32),
        "crowd": np.arange(count) % 2 == 1,
        "occluded": np.arange(count) - 1,
    }


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Every feature that is read, and one that is not."""

    VERSION = tfds.core.Version("1.10.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="a")]

    def _info(self):
        kinds = tfds.features
        objects = {
            "bbox": kinds.BBoxFeature(),
            "label": kinds.ClassLabel(names=["ear", "tail"]),
            "is_crowd": np.bool_,
            "is_occluded": np.int8,
            "area": np.int64,
        }
        features = {
            "image": kinds.Image(shape=(None, None, 3)),
            "label": kinds.ClassLabel(names=NAMES),
            "segmentation_mask": kinds.Image(shape=(None, None, 1)),
            "file_name": kinds.Text(),
            "objects": kinds.Sequence(objects),
            "junk": kinds.Tensor(shape=(2,), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

    def _split_generators(self, _):
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
        for i in range(COUNTS[split]):
            one = raw(split, i)
            rows = zip(one["corners"], one["box_classes"], one["crowd"], one["occluded"], strict=True)
            yield (
                i,
                {
                    "image": png(one["image"]),
                    "label": one["label"],
                    "segmentation_mask": png(one["segmentation"]),
                    "file_name": one["name"],
                    "objects": [
                        {
                            "bbox": tfds.features.BBox(*map(float, c)),
                            "label": k,
                            "is_crowd": w,
                            "is_occluded": o,
                            "area": 1,
                        }
                        for c, k, w, o in rows
                    ],
                    "junk": np.zeros(2, np.float32),
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir written by tfds, as ArrayRecord, each split in three files."""
    root = tmp_path_factory.mktemp("tfds")
    builder = Tiny(data_dir=root, config="a", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    older = root / "tiny" / "a" / "1.9.0"
    shutil.copytree(older.with_name("1.10.0"), older)
    info = older / "dataset_info.json"
    info.write_text(info.read_text().replace("1.10.0", "1.9.0"))
    assert "tensorflow" not in sys.modules
    return root


@pytest.fixture
def array_records(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "array_records")
    return tmp_path / "array_records"


def crc32c(data):
    """The checksum bit by bit, as the standard defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(payload):
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", crc32c(length)) + payload + struct.pack("<I", crc32c(payload))


@pytest.fixture
def tf_records(array_records, tmp_path):
    """The same data set as TensorFlow would have written it."""
    root = tmp_path / "tf_records"
    shutil.copytree(array_records, root)
    for path in sorted(root.rglob("*array_record*")):
        reader = ArrayRecordReader(str(path))
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(
            b"".join(map(framed, reader.read_all()))
        )
        path.unlink()
    for path in root.rglob("dataset_info.json"):
        path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    return root


def config(path, name="tiny", train="train", val="validation", **fields):
    data = common.data("tfds")
    data.update(dict(path=str(path), name=name, train_split=train, val_split=val, image_size=4) | fields)
    return data


def expected(split, i):
    one = raw(split, i)
    y, x, bottom, right = one.pop("corners").T
    one["boxes"] = np.stack([x, y, right - x, bottom - y], axis=1)
    group, occluded = (1 << FLAGS.index(flag) for flag in ("group", "occluded"))
    one["box_flags"] = (one.pop("crowd") * group + (one.pop("occluded") == 1) * occluded).astype(np.int32)
    return one


@pytest.mark.parametrize("kind", ["array_records", "tf_records"])
def test_examples_are_what_was_prepared(kind, request):
    source = open_source(config(request.getfixturevalue(kind)), "train")
    assert source.classes == NAMES and source.tables == {"box_classes": ("ear", "tail")}
    assert source.folder.name == "1.10.0"  # the newest, by number
    by_name = {example["name"]: example for example in examples(source)}
    assert len(by_name) == COUNTS["train"]
    for i in range(COUNTS["train"]):
        one = expected("train", i)
        assert_same([by_name[one["name"]]], [one])
    for i in (-1, COUNTS["train"]):
        with pytest.raises(IndexError):
            source[i]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("split", ["train", "train[:50%]", "train[30%:80%]", "train[7:]+validation", "all"])
def test_both_formats_give_the_same_examples_in_the_same_order(array_records, tf_records, split):
    a, b = (open_source(config(path, train=split), "train") for path in (array_records, tf_records))
    assert len(a) > 1
    assert_same(examples(a), examples(b))
    # And as tfds reads the first of them.
    with_tfds = tfds.builder_from_directory(str(a.folder)).as_data_source(split)
    np.testing.assert_array_equal([one["image"] for one in with_tfds], [one["image"] for one in examples(a)])
    a, b = (open_source(config(path), "val") for path in (array_records, tf_records))
    assert len(a) == COUNTS["validation"]
    assert_same(examples(a), examples(b))


@pytest.mark.parametrize("kind", ["array_records", "tf_records"])
def test_splits_cut_from_one_are_disjoint_and_complete(kind, request):
    data = config(request.getfixturevalue(kind), train="train[:80%]", val="train[80%:]")
    train, val = ([example["name"] for example in examples(open_source(data, split))] for split in ("train", "val"))
    assert len(train) == 18 and len({*train, *val}) == COUNTS["train"] == len(train) + len(val)
    whole = open_source(config(request.getfixturevalue(kind)), "train")
    rest = open_source(data, "val")
    assert [rest.where(i) for i in range(len(rest))] == [whole.where(18 + i) for i in range(len(rest))]


@pytest.mark.parametrize("kind", ["array_records", "tf_records"])
def test_sources_go_to_threads_and_processes(kind, request):
    source = open_source(config(request.getfixturevalue(kind)), "train")
    every = examples(source)
    indices = np.random.default_rng(0).integers(0, len(source), 200).tolist()
    for one in (source, pickle.loads(pickle.dumps(source))):
        with ThreadPoolExecutor(8) as pool:
            assert_same(list(pool.map(one.__getitem__, indices)), [every[i] for i in indices])


@pytest.mark.parametrize("kind", ["array_records", "tf_records"])
def test_a_bucket_holds_them_as_well(kind, request, bucket):
    folder = request.getfixturevalue(kind)
    for path in folder.rglob("*.*"):
        if path.is_file():
            storage.write_bytes(f"{bucket}/data/{path.relative_to(folder)}", path.read_bytes())
    for split in ("train", "val"):
        assert_same(
            examples(open_source(config(f"{bucket}/data"), split)), examples(open_source(config(folder), split))
        )


def test_records_prepared_from_tfds_are_equal(tf_records, tmp_path):
    data = config(tf_records)
    prepare(data, str(tmp_path / "out"), splits=("train", "val"), picture=Picture(), shards=2, workers=1)
    for split in ("train", "val"):
        made, source = Records(tmp_path / "out", split), open_source(data, split)
        assert_same(examples(made), examples(source))
        assert made.classes == source.classes and made.tables == source.tables


def test_the_index_is_built_once_and_anew_for_a_changed_file(tf_records, cache, monkeypatch):
    first = examples(open_source(config(tf_records), "train"))
    assert len(list(cache.iterdir())) == 3
    build = tfrecords._build_index
    built = []
    monkeypatch.setattr(tfrecords, "_build_index", lambda path: built.append(path.name) or build(path))
    assert_same(examples(open_source(config(tf_records), "train")), first)
    assert not built
    path = next(tf_records.rglob("1.10.0/tiny-train*00001-of*"))
    path.write_bytes(path.read_bytes() + framed(b"one more"))
    with pytest.raises(UserError, match=f"{path}: holds .* records in place of"):
        open_source(config(tf_records), "train")
    assert built == [path.name]
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="records in place of"):  # not something about the cache
        open_source(config(tf_records), "train")


def test_without_a_cache_the_index_is_not_kept(tf_records, monkeypatch):
    first = examples(open_source(config(tf_records), "train"))
    monkeypatch.setenv("VQGAN_JAX_CACHE", "/dev/null/cache")
    assert_same(examples(open_source(config(tf_records), "train")), first)


def damaged_shard(root, change):
    path = min(root.rglob("1.10.0/tiny-train*"))
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("at", ["length", "its checksum", "first", "end", "header's end"])
def test_a_damaged_or_cut_tfrecord_is_named_on_opening(tf_records, at):
    def change(data):
        (length,) = struct.unpack("<Q", data[:8])
        second = length + 16
        if at == "length":
            data[second] ^= 1
        elif at == "its checksum":
            data[second + 9] ^= 1
        elif at == "first":
            data[7] = 0x7F  # a length beyond any file
        elif at == "end":
            del data[-1:]
        else:
            del data[second + 5 :]

    path = damaged_shard(tf_records, change)
    with pytest.raises(UserError, match=f"{path}: is cut off or damaged at byte") as caught:
        open_source(config(tf_records), "train")
    if at in ("length", "its checksum", "header's end"):
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert f"at byte {length + 16} of" in str(caught.value)


@pytest.mark.parametrize("kind", ["array_records", "tf_records"])
def test_damaged_data_costs_one_example(kind, request):
    root = request.getfixturevalue(kind)
    whole = {example["name"] for example in examples(open_source(config(root), "train"))}

    def change(data):
        at = (
            data.index(b"\x89PNG") + 2 if kind == "tf_records" else 400
        )  # in the first record, compressed in one of them
        data[at] ^= 1

    path = damaged_shard(root, change)
    source, read, corrupt = open_source(config(root), "train"), set(), []
    for i in range(len(source)):
        try:
            read.add(source[i]["name"])
        except CorruptExample as error:
            corrupt.append(error.path)
    assert len(read) == len(whole) - 1 and read < whole
    assert len(corrupt) == 1 and corrupt[0].startswith(str(path))


def test_a_checksum_is_believed_over_a_picture_that_decodes(tmp_path, monkeypatch):
    path = tmp_path / "one"
    data = bytearray(framed(b"first") + framed(b"second"))
    data[-6] ^= 1
    path.write_bytes(data)
    part = Part(storage.path(path), 0, 2, 2)
    if tfrecords.google_crc32c is not None:
        source = TFRecords([part])
        assert source[0] == b"first"
        with pytest.raises(CorruptExample, match="checksum"):
            source[1]
    monkeypatch.setattr(tfrecords, "google_crc32c", None)  # as if it were not installed
    assert TFRecords([part])[1] == b"secood"


def test_checksums_are_those_of_the_standard():
    rows = np.random.default_rng(0).integers(0, 256, (50, 8), np.uint8)
    ours = tfrecords._masked(tfrecords._crc32c(rows))
    assert ours.tolist() == [crc32c(bytes(row)) for row in rows]
    check = tfrecords._crc32c(np.frombuffer(b"123456789", np.uint8)[None])
    assert check.tolist() == [0xE3069283]  # the value that every catalogue of checksums gives


def test_a_missing_file_is_named(array_records, tf_records):
    for root in (array_records, tf_records):
        path = max(root.rglob("1.10.0/tiny-train*"))
        path.unlink()
        with pytest.raises(UserError, match=f"{path}: the file is missing"):
            open_source(config(root), "train")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"path": ""}, r"config\.data\.path: name the folder"),
        ({"path": "/nowhere"}, "there is no folder '/nowhere'"),
        ({"name": ""}, r"config\.data\.name: name one of .*tiny"),
        ({"name": "tinny"}, "holds no 'tinny', did you mean 'tiny'"),
        ({"name": "tiny/b"}, "holds no 'b'; there are: a"),
        ({"name": "tiny:3"}, "is no name; write it as DATASET"),
        ({"name": "tiny:3.0.0"}, "holds no version 3.0.0; there are: 1.10.0, 1.9.0"),
        ({"name": "empty"}, "holds no prepared version; there are: none"),
        ({"name": "half"}, "lacks dataset_info.json"),
        ({"train": "trian"}, r"no split 'trian' .*there are: train \(23\), validation \(4\)"),
        ({"train": "train["}, "no split 'train'?"),
        ({"train": "train[40:50]"}, r"no split .*incompatible with 23"),
        ({"train": ""}, r"config\.data\.train_split: name a split"),
    ],
)
def test_mistakes_are_told_in_one_line(array_records, fields, said):
    (array_records / "empty").mkdir()
    (array_records / "half" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=said) as caught:
        open_source(config(**{"path": array_records} | fields), "train")
    assert "\n" not in str(caught.value)


def test_names_with_config_and_version_and_the_folder_itself(array_records):
    for name, folder in {"tiny/a": "1.10.0", "tiny/a:1.9.0": "1.9.0", "tiny:1.9.0": "1.9.0"}.items():
        assert open_source(config(array_records, name), "train").folder.name == folder
    source = open_source(config(array_records / "tiny" / "a" / "1.9.0", ""), "train")
    assert len(source) == COUNTS["train"]


def edit(root, file, change):
    path = root / "tiny" / "a" / "1.10.0" / file
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_what_cannot_be_read_is_said(array_records):
    folder = array_records / "tiny" / "a" / "1.10.0"
    edit(array_records, "dataset_info.json", lambda info: info.update(fileFormat="riegeli"))
    with pytest.raises(UserError, match="is kept as riegeli; prepare it with --file_format=array_record"):
        open_source(config(array_records), "train")
    edit(array_records, "dataset_info.json", lambda info: info.pop("splits"))
    with pytest.raises(UserError, match="holds no splits"):
        open_source(config(array_records), "train")
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match=f"'{folder}' cannot be opened") as caught:
        open_source(config(array_records), "train")
    assert "\n" not in str(caught.value)


def test_a_data_set_without_pictures_is_refused(array_records):
    def drop(features):
        content = features["featuresDict"]["features"]
        for key in ("image", "segmentation_mask"):
            del content[key]

    edit(array_records, "features.json", drop)
    with pytest.raises(UserError, match="has no feature 'image' .*there are: .*junk"):
        open_source(config(array_records), "train")
