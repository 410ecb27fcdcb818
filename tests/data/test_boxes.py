"""Pictures with boxes: COCO's JSON and Open Images' tables as published, and boxes that no model can use."""

import json
import logging
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from configs import common
from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.sources import open_source


def config(path, source="coco", **fields):
    data = common.data(source)
    data.update(path=str(path), resize="bilinear_no_antialias", **fields)
    return data


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(path)


CATEGORIES = {
    "instances": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}, {"id": 10, "name": "traffic light"}],
    "stuff": [{"id": 100, "name": "sky"}, {"id": 183, "name": "other"}],
}


def coco(root, boxes, files=("1.jpg", "2.jpg"), there=None):
    """Writes pictures of 20 x 10 with [(file, category, box, crowd), ...]."""
    for name in files if there is None else there:
        save(root / "val2017" / name)
    images = [{"id": k, "file_name": name, "width": 20, "height": 10} for k, name in enumerate(files)]
    for kind, categories in CATEGORIES.items():
        ids = {category["id"] for category in categories}
        annotations = [
            {"id": n, "image_id": files.index(name), "category_id": category, "bbox": box, "iscrowd": crowd}
            for n, (name, category, box, crowd) in enumerate(boxes)
            if category in ids or (kind == "instances" and category == 77)
        ]
        path = root / "annotations" / f"{kind}_val2017.json"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def test_coco_boxes_are_relative_and_classes_in_the_order_of_texts(tmp_path):
    coco(
        tmp_path,
        [("2.jpg", 2, [5, 5, 10, 5], 0), ("1.jpg", 10, [0, 0, 20, 10], 1), ("1.jpg", 100, [2, 1, 4, 2], 0)]
        + [("2.jpg", 183, [0, 0, 9, 9], 0), ("1.jpg", 1, [2, 1, 4, 2], 0)],
    )
    source = open_source(config(tmp_path), "val")
    assert source.tables["box_classes"] == ("person", "traffic light", "sky", "dog") and source.classes == ()
    assert source.names == ["1.jpg", "2.jpg"] and len(source) == 2
    first, second = pickle.loads(pickle.dumps(source))[0], source[1]
    assert first["image"].shape == (10, 20, 3)
    order = np.argsort(first["box_classes"])
    assert first["box_classes"][order].tolist() == [0, 1, 2] and first["box_flags"][order].tolist() == [0, 1, 0]
    np.testing.assert_allclose(first["boxes"][order], [[0.1, 0.1, 0.2, 0.2], [0, 0, 1, 1], [0.1, 0.1, 0.2, 0.2]])
    np.testing.assert_allclose(second["boxes"], [[0.25, 0.5, 0.5, 0.5]])
    assert second["box_classes"].tolist() == [3] and second["boxes"].dtype == np.float32
    encoded = source.encoded(1)
    assert encoded["image_bytes"] == (tmp_path / "val2017/2.jpg").read_bytes() and len(encoded["boxes"]) == 1


def test_archives_as_downloaded_and_a_bucket_hold_the_same(tmp_path, bucket):
    coco(tmp_path / "a", [("2.jpg", 2, [5, 5, 10, 5], 0), ("1.jpg", 100, [2, 1, 4, 2], 0)])
    packed = {"val2017.zip": ["val2017"], "annotations_trainval2017.zip": ["annotations/instances_val2017.json"]}
    packed["stuff_annotations_trainval2017.zip"] = ["annotations/stuff_val2017.json"]
    (tmp_path / "b").mkdir()
    for archive, members in packed.items():
        with zipfile.ZipFile(tmp_path / "b" / archive, "w") as zipped:
            for member in members:
                for file in sorted((tmp_path / "a").rglob("*")):
                    if file.is_file() and str(file.relative_to(tmp_path / "a")).startswith(member):
                        zipped.write(file, file.relative_to(tmp_path / "a"))
    for file in (tmp_path / "a").rglob("*.*"):
        storage.write_bytes(f"{bucket}/{file.relative_to(tmp_path / 'a')}", file.read_bytes())
    plain, *others = (open_source(config(path), "val") for path in (tmp_path / "a", tmp_path / "b", bucket))
    for other in others:
        assert other.names == plain.names and other.tables == plain.tables
        for k in range(2):
            np.testing.assert_array_equal(other[k]["image"], plain[k]["image"])
            np.testing.assert_array_equal(other[k]["boxes"], plain[k]["boxes"])


def test_boxes_are_clipped_and_empty_ones_dropped_in_one_line(tmp_path, caplog):
    coco(
        tmp_path,
        [("1.jpg", 1, [-4, 5, 8, 20], 0), ("1.jpg", 1, [3, 3, 0, 5], 0), ("1.jpg", 1, [25, 3, 5, 5], 0)]
        + [("1.jpg", 1, [3, 3, -2, 5], 0), ("1.jpg", 1, [0, 0, float("nan"), 5], 0), ("2.jpg", 77, [0, 0, 5, 5], 0)],
    )
    with caplog.at_level(logging.WARNING):
        source = open_source(config(tmp_path), "val")
    np.testing.assert_allclose(source[0]["boxes"], [[0, 0.5, 0.2, 0.5]])
    lines = "\n".join(record.getMessage() for record in caplog.records)
    assert "4 of 5 boxes are empty" in lines and "1 annotations, such as 5, are of no category" in lines
    assert len(source) == 1 and "1 files have fewer boxes" in lines and "'2.jpg'" in lines


def test_pictures_without_boxes_stay_where_that_is_asked_for(tmp_path):
    coco(tmp_path, [("1.jpg", 1, [0, 0, 20, 10], 0), ("1.jpg", 2, [0, 0, 2, 1], 0)])
    source = open_source(config(tmp_path, min_objects=0), "val")
    assert len(source) == 2 and source[1]["boxes"].shape == (0, 4) and source[1]["box_classes"].shape == (0,)
    assert len(open_source(config(tmp_path, min_objects=2), "val")) == 1
    assert open_source(config(tmp_path, min_box_area=0.02), "val")[0]["box_classes"].tolist() == [0]
    with pytest.raises(UserError, match=r"config\.data\.min_objects: no picture has 3 boxes"):
        open_source(config(tmp_path, min_objects=3), "val")


def test_annotations_without_their_picture_are_left_out_in_one_line(tmp_path, caplog):
    coco(tmp_path, [("1.jpg", 1, [0, 0, 5, 5], 0), ("2.jpg", 1, [0, 0, 5, 5], 0)], there=["2.jpg"])
    with caplog.at_level(logging.WARNING):
        source = open_source(config(tmp_path), "val")
    assert source.names == ["2.jpg"] and len(caplog.records) == 1 and "'1.jpg'" in caplog.records[0].getMessage()
    assert source[0]["boxes"].shape == (1, 4)


@pytest.mark.parametrize(
    "classes, names, boxes",
    [
        ("things", ("person", "traffic light", "dog"), [0, 2]),
        ("stuff", ("sky",), [0]),
        ("dog, sky", ("sky", "dog"), [0, 1]),
    ],
)
def test_some_classes_alone(tmp_path, classes, names, boxes):
    coco(tmp_path, [("1.jpg", k, [0, 0, 5, 5], 0) for k in (1, 2, 100)])
    if classes == "things":
        (tmp_path / "annotations/stuff_val2017.json").unlink()
    source = open_source(config(tmp_path, classes=classes), "val")
    assert source.tables["box_classes"] == names and sorted(source[0]["box_classes"].tolist()) == boxes


def test_what_is_no_coco_is_named(tmp_path):
    coco(tmp_path, [("1.jpg", 1, [0, 0, 5, 5], 0)])
    with pytest.raises(UserError, match=r"'train2017'"):
        open_source(config(tmp_path), "train")
    with pytest.raises(UserError, match=r"config\.data\.classes.*'person'"):
        open_source(config(tmp_path, classes="persn"), "val")
    path = tmp_path / "annotations/instances_val2017.json"
    whole = json.loads(path.read_text())
    for content, message in (
        ("{", "is no JSON"),
        (json.dumps({"images": []}), "has no list 'annotations'"),
        (
            json.dumps(whole | {"annotations": [{"id": 3, "image_id": 0, "category_id": 1, "bbox": [1, 2]}]}),
            "an annotation",
        ),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"instances_val2017\.json' {message}|{message}"):
            open_source(config(tmp_path), "val")
    path.unlink()
    with pytest.raises(UserError, match=r"lacks 'annotations/instances_val2017\.json'"):
        open_source(config(tmp_path), "val")


HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)


def open_images(root, rows, header=HEADER):
    for name in ("0a", "0b", "0c"):
        save(root / "train" / f"{name}.jpg")
    (root / "class-descriptions-boxable.csv").write_text(
        "/m/01s55n,Suitcase\n/m/09,Cat\n/m/011k07,Tortoise\n/m/zz,Zebra\n"
    )
    (root / "oidv6-train-annotations-bbox.csv").write_text(header + "".join(f"{row}\n" for row in rows))


ROWS = (
    "0b,xclick,/m/09,1,0.1,0.6,0.2,0.4,1,0,0,0,1",
    "0a,xclick,/m/01s55n,1,0.5,1.5,0,1,0,1,1,0,0",
    "0b,xclick,/m/zz,1,0,0.5,0,0.5,-1,-1,-1,-1,-1",
    "ff,xclick,/m/zz,1,0,0.5,0,0.5,0,0,0,1,0",
)


def test_open_images_boxes_flags_and_the_order_of_classes(tmp_path, caplog):
    open_images(tmp_path, ROWS)
    with caplog.at_level(logging.WARNING):
        source = open_source(config(tmp_path, "open_images"), "train")
    assert source.tables["box_classes"] == ("Tortoise", "Cat", "Zebra", "Suitcase")
    assert source.names == ["0a.jpg", "0b.jpg"] and "'ff'" in caplog.text and "'0c.jpg'" in caplog.text
    np.testing.assert_allclose(source[0]["boxes"], [[0.5, 0, 0.5, 1]])
    assert source[0]["box_classes"].tolist() == [3] and source[0]["box_flags"].tolist() == [1]
    np.testing.assert_allclose(source[1]["boxes"], [[0.1, 0.2, 0.5, 0.2], [0, 0, 0.5, 0.5]], atol=1e-6)
    assert source[1]["box_classes"].tolist() == [1, 2] and source[1]["box_flags"].tolist() == [2 + 8, 0]


def test_open_images_merges_and_allow_list(tmp_path):
    open_images(tmp_path, ROWS)
    (tmp_path / "class-merges.csv").write_text("/m/zz,/m/09\n")
    (tmp_path / "class-allow-list.txt").write_text("Cat\nZebra\n")
    source = open_source(config(tmp_path, "open_images"), "train")
    assert source.tables["box_classes"] == ("Cat",) and source.names == ["0b.jpg"]
    assert source[0]["box_classes"].tolist() == [0, 0]


def test_what_is_no_open_images_is_named(tmp_path):
    open_images(tmp_path, ROWS, header=HEADER.replace("IsInside", "Inside"))
    with pytest.raises(UserError, match="has no column 'IsInside'"):
        open_source(config(tmp_path, "open_images"), "train")
    open_images(tmp_path, [ROWS[0].replace("0.6", "wide")])
    with pytest.raises(UserError, match="line 2 of .*oidv6-train"):
        open_source(config(tmp_path, "open_images"), "train")
    with pytest.raises(UserError, match="'validation'"):
        open_source(config(tmp_path, "open_images"), "val")
