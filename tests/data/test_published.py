"""Faces, CIFAR-10 and DeepFashion as they are handed on: splits, labels, key points, and files that are not theirs."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from configs import common
from vqgan_jax.config import UserError
from vqgan_jax.data import faces
from vqgan_jax.data.keypoints import JOINTS, LANDMARKS
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.tables import CIFAR10


def config(path, source, **fields):
    data = common.data(source)
    data.update(path=str(path), resize="bilinear_no_antialias", **fields)
    return data


def save(path, size=(4, 4), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(faces, "_FFHQ_TRAIN", 3)
    monkeypatch.setattr(faces, "_CELEBA_TRAIN", 2)


def test_faces_are_split_by_number(tmp_path, few):
    for n in range(5):
        save(tmp_path / "images1024x1024" / "00000" / f"{n:05d}.png")
    train, val = (open_source(config(tmp_path, "ffhq"), split) for split in ("train", "val"))
    assert list(train.names) == [f"00000/{n:05d}.png" for n in range(3)] and len(val) == 2 and train.classes == ()
    assert train[0]["image"].shape == (4, 4, 3) and "label" not in train[0]


def test_numbers_are_not_texts(tmp_path, few):
    for n in (0, 1, 2, 10):
        save(tmp_path / "CelebA-HQ-img" / f"{n}.jpg")
    assert list(open_source(config(tmp_path, "celeba_hq"), "train").names) == ["0.jpg", "1.jpg"]
    assert list(open_source(config(tmp_path, "celeba_hq"), "val").names) == ["2.jpg", "10.jpg"]


def test_lists_decide_where_they_lie(tmp_path):
    for n in range(4):
        save(tmp_path / f"{n:05d}.png")
    (tmp_path / "ffhqtrain.txt").write_text("00003.png\n00001.png\n")
    assert list(open_source(config(tmp_path, "ffhq"), "train").names) == ["00003.png", "00001.png"]
    (tmp_path / "ffhqtrain.txt").write_text("00003.png\n00009.png\n")
    with pytest.raises(UserError, match=r"ffhqtrain\.txt' names '00009\.png'"):
        open_source(config(tmp_path, "ffhq"), "train")


def test_celeba_hq_in_numpy_files(tmp_path, few):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 6), np.uint8)
    np.save(tmp_path / "imgHQ00000.npy", pixels)
    np.save(tmp_path / "imgHQ00001.npy", pixels.astype(np.float32))
    source = open_source(config(tmp_path, "celeba_hq"), "train")
    np.testing.assert_array_equal(source[0]["image"], pixels[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(source.encoded(0)["image"], source[0]["image"])
    with pytest.raises(CorruptExample, match="float32 of shape"):
        source[1]
    (tmp_path / "imgHQ00001.npy").write_bytes(b"")
    with pytest.raises(CorruptExample, match="imgHQ00001"):
        source[1]


def test_faceshq_is_both_with_a_class_each(tmp_path, few):
    for n in range(4):
        save(tmp_path / "ffhq" / f"{n:05d}.png", colour="blue")
        save(tmp_path / "celebahq" / f"{n:05d}.png")
    source = open_source(config(tmp_path, "faceshq"), "train")
    assert source.classes == ("celeba_hq", "ffhq") and len(source) == 5
    assert [source[k]["label"] for k in range(5)] == [0, 0, 1, 1, 1]
    assert [int(source[k]["image"][0, 0, 2]) for k in range(5)] == [0, 0, 255, 255, 255]
    assert source.encoded(4)["label"] == 1 and len(source.names) == 5
    with pytest.raises(IndexError):
        source[5]
    with pytest.raises(UserError, match="has no folder 'celeba_hq'"):
        open_source(config(tmp_path / "ffhq", "faceshq"), "train")


def cifar_rows(seed, count=3):
    random = np.random.default_rng(seed)
    return random.integers(0, 10, count, np.uint8), random.integers(0, 256, (count, 3, 32, 32), np.uint8)


def cifar_files(kind):
    """The files of a version by name, six batches of three pictures."""
    files = {}
    for seed, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        labels, pixels = cifar_rows(seed)
        if kind == "bin":
            files[f"{name}.bin"] = np.concatenate([labels[:, None], pixels.reshape(3, -1)], axis=1).tobytes()
        else:
            batch = {b"labels": labels.tolist(), b"data": pixels.reshape(3, -1), b"batch_label": b"x"}
            files[name] = pickle.dumps(batch, protocol=2) if seed % 2 else python2_pickle(batch)
    return files


def python2_pickle(value):
    """The bytes that Python 2 would write, for which every text and every row of bytes is a `str`."""

    class Pickler(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def save_string(self, text):
            data = text.encode("latin1") if isinstance(text, str) else text
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
            self.memoize(text)

        dispatch[str] = dispatch[bytes] = save_string

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["bin", "py"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_in_every_version(tmp_path, kind, packed):
    folder = f"cifar-10-batches-{kind}"
    if packed:
        name = {"bin": "cifar-10-binary.tar.gz", "py": "cifar-10-python.tar.gz"}[kind]
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for file, data in cifar_files(kind).items():
                info = tarfile.TarInfo(f"{folder}/{file}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        (tmp_path / folder).mkdir()
        for file, data in cifar_files(kind).items():
            (tmp_path / folder / file).write_bytes(data)
    train, val = (open_source(config(tmp_path, "cifar10"), split) for split in ("train", "val"))
    assert len(train) == 15 and len(val) == 3 and train.classes == CIFAR10 and len(CIFAR10) == 10
    labels, pixels = cifar_rows(1)
    example = pickle.loads(pickle.dumps(train))[4]
    np.testing.assert_array_equal(example["image"], pixels[1].transpose(1, 2, 0))
    assert example["label"] == labels[1] and len(pickle.dumps(train)) < 1000


def test_cifar10_runs_no_code_and_names_damage(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file, data in cifar_files("py").items():
        (folder / file).write_bytes(data)

    class Harm:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",))

    (folder / "test_batch").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=r"test_batch' is no batch of CIFAR-10 \(it names builtins\.exec\)"):
        open_source(config(tmp_path, "cifar10"), "val")
    assert not (tmp_path / "harm").exists()
    (folder / "data_batch_2").unlink()
    with pytest.raises(UserError, match="data_batch_2' is missing"):
        open_source(config(tmp_path, "cifar10"), "train")
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz"):
        open_source(config(tmp_path / "nowhere", "cifar10"), "train")


def test_joints_of_pose_transfer(tmp_path):
    save(tmp_path / "train" / "a.jpg", size=(20, 40))
    y, x = [-1] * 18, [-1] * 18
    y[0], x[0], y[4], x[4], y[5], x[5] = 10, 5, 40, 20, 41, 3
    (tmp_path / "fasion-resize-annotation-train.csv").write_text(
        f"name:keypoints_y:keypoints_x\na.jpg: {y}: {x}\nb.jpg: {y}: {x}\n"
    )
    source = open_source(config(tmp_path, "deepfashion"), "train")
    points = source[0]["keypoints"]
    assert len(source) == 1 and points.shape == (18, 3) and points.dtype == np.float32
    np.testing.assert_allclose(points[[0, 4]], [[0.25, 0.25, 1], [1, 1, 1]])
    assert points[5].tolist() == [0, 0, 0] and points[:, 2].sum() == 2  # what lies outside is not seen
    np.testing.assert_array_equal(source[0]["keypoints"], points)  # reading changes nothing
    encoded = source.encoded(0)
    assert encoded["image_bytes"] == (tmp_path / "train" / "a.jpg").read_bytes() and "image" not in encoded
    np.testing.assert_array_equal(encoded["keypoints"], points)
    assert source.tables["keypoints"] == tuple(JOINTS) and len(JOINTS) == 18
    mirrored = source[0]["keypoints_mirrored"]
    assert [JOINTS[k] for k in mirrored[[0, 2, 15]]] == ["nose", "left shoulder", "right eye"]
    (tmp_path / "fasion-resize-annotation-train.csv").write_text("a.jpg: [1]: [2]\n")
    with pytest.raises(UserError, match="line 1 of"):
        open_source(config(tmp_path, "deepfashion"), "train")


def test_landmarks_of_clothes(tmp_path):
    for name in ("WOMEN/a.jpg", "WOMEN/b.jpg", "MEN/c.jpg"):
        save(tmp_path / "img" / name, size=(10, 10))
    for folder in ("Anno", "Eval"):
        (tmp_path / folder).mkdir()
    table = "3\nimage_name clothes_type variation_type landmark_visibility_1 ...\n"
    table += "img/WOMEN/a.jpg 2 1 0 1 2 1 3 4 0 5 6 2 0 0\n"
    table += "img/WOMEN/b.jpg 1 1 " + " ".join(f"0 {k} 9" for k in range(6)) + "\n"
    table += "img/MEN/c.jpg 3 1 " + " ".join("0 1 1" for _ in range(8)) + "\n"
    (tmp_path / "Anno/list_landmarks_inshop.txt").write_text(table)
    parts = "3\nimage_name item_id evaluation_status\nimg/WOMEN/a.jpg id1 train\n"
    parts += "img/WOMEN/b.jpg id2 query\nimg/MEN/c.jpg id1 train\n"
    (tmp_path / "Eval/list_eval_partition.txt").write_text(parts)
    train, val = (open_source(config(tmp_path, "deepfashion"), split) for split in ("train", "val"))
    assert train.names == ["MEN/c.jpg", "WOMEN/a.jpg"] and val.names == ["WOMEN/b.jpg"]
    points = train[1]["keypoints"]
    np.testing.assert_allclose(points[4], [0.1, 0.2, 1])  # left waistline
    assert points[5].tolist() == [0, 0, 0] and points[7].tolist() == [0, 0, 0]  # hidden, and outside
    np.testing.assert_allclose(points[6], [0.5, 0.6, 1])
    seen = val[0]["keypoints"][:, 2]
    assert [LANDMARKS[k] for k in np.flatnonzero(seen == 0)] == ["left waistline", "right waistline"]
