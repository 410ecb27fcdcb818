"""ImageNet as it is handed on: classes by sorted synset, validation labels, chosen classes, and depth maps."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from configs import common
from vqgan_jax.config import UserError
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.tables import IMAGENET_GROUPS, select

SYNSETS = ("n00000003", "n00000010", "n00000200")


def config(path, source="imagenet", **fields):
    data = common.data(source)
    data.update(path=str(path), resize="bilinear_no_antialias", **fields)
    return data


def jpeg(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if data is None else data)


@pytest.fixture
def root(tmp_path):
    for k, synset in enumerate(reversed(SYNSETS)):
        write(tmp_path / "train" / synset / f"{synset}_1.JPEG", jpeg(100 * k))
    write(tmp_path / "train" / SYNSETS[0] / "n06596364_9591.JPEG", b"no picture")
    return tmp_path


def flat_validation(root, count=3):
    for n in range(1, count + 1):
        write(root / "val" / f"ILSVRC2012_val_{n:08d}.JPEG")


def labels(source):
    return [(name.rsplit("/", 1)[-1], source[k]["label"]) for k, name in enumerate(source.names)]


def test_the_class_is_the_rank_of_the_synset(root):
    source = open_source(config(root), "train")
    assert source.classes == SYNSETS
    assert labels(source) == [(f"{synset}_1.JPEG", k) for k, synset in enumerate(SYNSETS)]  # and the ignored file is
    assert np.abs(source[0]["image"].astype(int) - 200).max() <= 2


def test_validation_by_folders(root):
    for synset in SYNSETS[1:]:
        write(root / "val" / synset / "ILSVRC2012_val_00000001.JPEG")
    assert [label for _, label in labels(open_source(config(root), "val"))] == [1, 2]


def test_validation_by_kaggles_table(root):
    flat_validation(root, 2)
    rows = "ImageId,PredictionString\n"
    rows += f"ILSVRC2012_val_00000002,{SYNSETS[2]} 1 2 3 4 {SYNSETS[2]} 5 6 7 8 \n"
    rows += f"ILSVRC2012_val_00000001,{SYNSETS[1]} 1 2 3 4\n"
    (root / "LOC_val_solution.csv").write_text(rows)
    source = open_source(config(root), "val")
    assert labels(source) == [("ILSVRC2012_val_00000001.JPEG", 1), ("ILSVRC2012_val_00000002.JPEG", 2)]
    write(root / "val" / "ILSVRC2012_val_00000007.JPEG")
    with pytest.raises(UserError, match="00000007"):
        open_source(config(root), "val")


def test_validation_by_the_development_kit(root):
    flat_validation(root)
    kit = root / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    ids = np.array([(7, SYNSETS[2], "c"), (8, SYNSETS[0], "a"), (9, SYNSETS[1], "b")], dtype=fields)
    savemat(kit / "meta.mat", {"synsets": ids})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("8\n7\n9\n")
    assert [label for _, label in labels(open_source(config(root), "val"))] == [0, 2, 1]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("8\n7\n10\n")
    with pytest.raises(UserError, match="do not agree on the id 10"):
        open_source(config(root), "val")


def test_flat_validation_without_labels_says_what_would_do(root):
    flat_validation(root)
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv or the folder ILSVRC2012_devkit_t12"):
        open_source(config(root), "val")


def test_the_official_archive_is_read_in_place(root, tmp_path):
    outer = tmp_path / "packed"
    outer.mkdir()
    with tarfile.open(outer / "ILSVRC2012_img_train.tar", "w") as nested:
        for k, synset in enumerate(SYNSETS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as members:
                info = tarfile.TarInfo(f"{synset}_5.JPEG")
                info.size = len(jpeg(50 * k))
                members.addfile(info, io.BytesIO(jpeg(50 * k)))
            info = tarfile.TarInfo(f"{synset}.tar")
            info.size = len(inner.getvalue())
            nested.addfile(info, io.BytesIO(inner.getvalue()))
    source = open_source(config(outer), "train")
    assert source.classes == SYNSETS and labels(source) == [(f"{s}_5.JPEG", k) for k, s in enumerate(SYNSETS)]
    assert np.abs(source[2]["image"].astype(int) - 100).max() <= 2


def test_chosen_classes_are_ranked_anew(root):
    source = open_source(config(root, classes="n00000200, 0"), "train")
    assert source.classes == (SYNSETS[0], SYNSETS[2]) and [label for _, label in labels(source)] == [0, 1]
    with pytest.raises(UserError, match="of 1000 classes, .* has 3"):
        open_source(config(root, classes="restricted"), "train")
    with pytest.raises(UserError, match="'2-3' is not within the ranks 0 to 2"):
        open_source(config(root, classes="2-3"), "train")


def test_held_out_share(root):
    for n in range(40):
        write(root / "train" / SYNSETS[1] / f"{n}.JPEG")
    train, val = (open_source(config(root, val_split="", val_share=0.3), split) for split in ("train", "val"))
    assert not set(train.names) & set(val.names) and len(train) + len(val) == 43 and 4 < len(val) < 25


def test_depth_maps_join_by_name_and_keep_their_labels(root):
    depth = np.arange(16, dtype="<f4").reshape(4, 4) * 100 + 50
    for synset in SYNSETS[1:]:
        path = root / "depth" / "train" / synset / f"{synset}_1.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(depth.view(np.uint8).reshape(4, 4, 4)).save(path)
    source = open_source(config(root, "imagenet_depth"), "train")
    assert source.classes == SYNSETS and [label for _, label in labels(source)] == [1, 2]
    np.testing.assert_allclose(source[1]["depth"], np.arange(16).reshape(4, 4) / 15, atol=1e-6)
    with pytest.raises(UserError, match="'depths/train'"):
        open_source(config(root, "imagenet_depth", depths="depths"), "train")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar"):
        open_source(config(tmp_path), "train")
    write(tmp_path / "train" / "cat" / "1.JPEG")
    with pytest.raises(UserError, match="no folders by synset"):
        open_source(config(tmp_path), "train")


def test_restricted_imagenet_and_the_texts_that_choose_classes():
    assert len(IMAGENET_GROUPS["restricted"]) == 203 and len(IMAGENET_GROUPS["restricted_reference"]) == 194
    names = [f"n{k}" for k in range(1000)]
    chosen = select("restricted", names, IMAGENET_GROUPS)
    assert chosen == sorted(IMAGENET_GROUPS["restricted"]) and 32 in chosen and 268 in chosen and 269 not in chosen
    assert 32 not in select("restricted_reference", names, IMAGENET_GROUPS)
    assert select("", names, {}) == list(range(1000))
    assert select("30-32, n7,5:7,5", names, {}) == [5, 6, 7, 30, 31, 32]
    for text, message in (
        ("restrictd", "did you mean 'restricted'"),
        ("998-1000", "not within"),
        ("7:7", "not within"),
        ("9-3", "not within"),
        ("-3", "unknown name"),
    ):
        with pytest.raises(UserError, match=message):
            select(text, names, IMAGENET_GROUPS)
