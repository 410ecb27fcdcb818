"""Prepared data sets of TensorFlow Datasets without TensorFlow, as ArrayRecord or as TFRecord: the same examples.

Splits are texts of tfds ("train[:95%]", "train+test"). Pictures are decoded by us and not by tfds, which would need
TensorFlow or OpenCV for it.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vqgan_jax import storage
from vqgan_jax.config import UserError, suggest
from vqgan_jax.data.decoding import decode_ids, decode_image
from vqgan_jax.data.image_files import decode_at_least
from vqgan_jax.data.records import allow_open_files
from vqgan_jax.data.source import CorruptExample, Example, locate
from vqgan_jax.data.tfrecords import Part, TFRecords
from vqgan_jax.object_tokens import FLAGS

_NAME = re.compile(r"(?P<dataset>\w+)(/(?P<config>[^/:]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# What tfds's data sets call these, in order of preference.
_SEGMENTATIONS = ("segmentation", "segmentation_mask", "segmentation_label")
_OBJECTS = ("objects", "bobjects")
_FILE_NAMES = ("file_name", "filename", "image/filename")
_FLAG_OF = {
    "is_crowd": "group",
    "is_group_of": "group",
    "is_occluded": "occluded",
    "is_depiction": "depiction",
    "is_inside": "inside",
}


class TfdsSource:
    """A split of a prepared data set.

    Of its features these are read: "image" (or the only picture there is); the class "label"; ids of one channel under
    one of `_SEGMENTATIONS`; "bbox", "label" and flags of the sequence `_OBJECTS`; a file's name.

    Args:
      folder: the data set's version, that holds dataset_info.json.
      split: as tfds writes it.
      at_least: see `decode_image`.

    Attributes:
      classes: names of the labels.
      tables: names of the ids of segmentation and boxes.

    Raises:
      UserError: no prepared data set, no such split, no pictures, or a file that is missing or damaged.
    """

    def __init__(self, folder: epath.Path, split: str, *, at_least: int | None = None):
        import tensorflow_datasets as tfds  # half a second, and only this source needs it

        self.folder, self._at_least = folder, at_least
        try:
            builder = tfds.builder_from_directory(str(folder))
            features = dict(builder.info.features.items())
        except Exception as error:  # tfds and its parsers raise anything at all
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"config.data.path: '{folder}' cannot be opened ({reason})") from None
        if not builder.info.splits:
            raise UserError(f"config.data.path: '{folder}' holds no splits: it was not prepared to its end")
        try:
            instructions = builder.info.splits[split].file_instructions
        except ValueError as error:
            options = ", ".join(f"{name} ({info.num_examples:,})" for name, info in builder.info.splits.items())
            reason = str(error).splitlines()[0].split("See format")[0].strip()
            raise UserError(
                f"config.data: '{folder}' has no split '{split}' ({reason}); there are: {options}"
            ) from None
        self._parts = [
            Part(storage.path(one.filename), one.skip, one.take, one.examples_in_shard) for one in instructions
        ]
        self._ends = list(itertools.accumulate(part.take for part in self._parts))
        self._read_features(features)
        self._records: Any
        match builder.info.file_format:
            case tfds.core.FileFormat.ARRAY_RECORD:
                for part in self._parts:
                    if not part.path.exists():
                        raise UserError(f"{part.path}: the file is missing; copy it again")
                allow_open_files(len(self._parts))
                raw = tfds.decode.DeserializeMethod.RAW_BYTES
                self._records = builder.as_data_source(split, deserialize_method=raw) if self._parts else ()
            case tfds.core.FileFormat.TFRECORD:
                self._records = TFRecords(self._parts)
            case other:
                raise UserError(
                    f"config.data.path: '{folder}' is kept as {other.value}; prepare it with --file_format=array_record"
                )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        example = self.encoded(index)
        example["image"] = decode_image(example.pop("image_bytes"), self.where(index), at_least=self._at_least)
        return example

    def encoded(self, index: int) -> Example:
        """The example with its picture's bytes as "image_bytes" in place of "image". Raises as `__getitem__` does."""
        where = self.where(index)
        try:
            raw = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
        except CorruptExample:
            raise
        except Exception as error:  # array_record, protobuf and tfds raise anything at all on damaged bytes
            raise CorruptExample(where, f"{type(error).__name__}: {' '.join(str(error).split())}") from None
        example: Example = {"image_bytes": raw[self._image], "name": where}
        if self._name:
            example["name"] = raw[self._name].decode("utf-8", "backslashreplace")
        if "label" in raw:
            example["label"] = int(raw["label"])
        if self._segmentation:
            example["segmentation"] = decode_ids(raw[self._segmentation], where)
        if self._objects:
            example |= _boxes(raw[self._objects])
        return example

    def where(self, index: int) -> str:
        """The file and the number of the record in it, for errors."""
        number, position = locate(self._ends, index)
        part = self._parts[number]
        return f"{part.path}[{part.skip + position}]"

    def _read_features(self, features: Mapping[str, Any]) -> None:
        """Sets which of our keys is which feature, and how those are read."""
        import tensorflow_datasets as tfds

        kinds = tfds.features
        pictures = {key: feature for key, feature in features.items() if isinstance(feature, kinds.Image)}
        ids = [key for key in _SEGMENTATIONS if key in pictures and pictures[key].shape[-1] == 1]
        images = ["image"] if "image" in pictures else [key for key in pictures if key not in ids]
        if len(images) != 1:
            raise UserError(
                f"config.data.name: '{self.folder}' has no feature 'image' that is a picture; there are: "
                f"{', '.join(features)}"
            )
        used = {images[0]: pictures[images[0]]}
        self._image, self._segmentation, self._name, self._objects = images[0], None, None, None
        self.classes: tuple[str, ...] = ()
        self.tables: dict[str, tuple[str, ...]] = {}
        if isinstance(features.get("label"), kinds.ClassLabel):
            used["label"] = features["label"]
            self.classes = tuple(used["label"].names)
        if ids:
            self._segmentation = ids[0]
            used[ids[0]] = pictures[ids[0]]
            if names := getattr(pictures[ids[0]], "names", None):
                self.tables["segmentation"] = tuple(names)
        for key in _OBJECTS:
            inner = dict(getattr(getattr(features.get(key), "feature", None), "items", dict)())
            if isinstance(inner.get("bbox"), kinds.BBoxFeature) and isinstance(inner.get("label"), kinds.ClassLabel):
                self._objects = key
                known = ("bbox", "label", *_FLAG_OF)
                used[key] = kinds.Sequence({name: feature for name, feature in inner.items() if name in known})
                self.tables["box_classes"] = tuple(inner["label"].names)
                break
        for key in _FILE_NAMES:
            if isinstance(features.get(key), kinds.Text):
                self._name, used[key] = key, features[key]
                break
        self._features = kinds.FeaturesDict(used)
        self._decoders = {key: tfds.decode.SkipDecoding() for key in (*images, *ids[:1])}


def open_tfds(data: ConfigDict, split: str) -> TfdsSource:
    """The source `tfds`: `path` is the data_dir, `name` the data set, train_split and val_split are splits of tfds.

    Raises:
      UserError: see `TfdsSource` and `find_folder`.
    """
    if not (text := data[f"{split}_split"]):
        raise UserError(f"config.data.{split}_split: name a split of tfds, such as 'train[:95%]' and 'train[95%:]'")
    return TfdsSource(find_folder(data.path, data.name), text, at_least=decode_at_least(data, split))


def find_folder(data_dir: str, name: str) -> epath.Path:
    """The folder of a prepared version: DATA_DIR/DATASET[/CONFIG]/VERSION.

    Args:
      data_dir: local or gs://; with an empty name the version's folder itself.
      name: "DATASET[/CONFIG][:VERSION]"; without a version the newest, without a config the only one.

    Raises:
      UserError: there is none; it says what is there.
    """
    if not data_dir:
        raise UserError("config.data.path: name the folder that holds prepared tfds data sets (its data_dir)")
    root = storage.path(data_dir)
    if not root.is_dir():
        raise UserError(f"config.data.path: there is no folder '{root}'")
    if not name:
        if not (root / "dataset_info.json").exists():
            raise UserError(f"config.data.name: name one of '{root}', such as 'imagenet2012:5.1.0'{_there(root)}")
        return root
    if (match := _NAME.fullmatch(name)) is None:
        raise UserError(f"config.data.name: '{name}' is no name; write it as DATASET[/CONFIG][:VERSION]")
    folder = root
    for part in (match["dataset"], match["config"]):
        if part:
            if part not in (found := _folders(folder)):
                raise UserError(f"config.data.name: '{folder}' holds no '{part}'{suggest(part, found)}")
            folder = folder / part
    versions = [part for part in _folders(folder) if _VERSION.fullmatch(part)]
    if not versions and not match["config"] and len(configs := _folders(folder)) == 1:
        folder = folder / configs[0]
        versions = [part for part in _folders(folder) if _VERSION.fullmatch(part)]
    version = match["version"] or max(versions, key=lambda text: [*map(int, text.split("."))], default="")
    if version not in versions:
        wanted = f"version {version}" if version else "prepared version"
        raise UserError(f"config.data.name: '{folder}' holds no {wanted}{_there(folder)}")
    folder = folder / version
    if not (folder / "dataset_info.json").exists():
        raise UserError(f"config.data.path: '{folder}' lacks dataset_info.json: it was not prepared to its end")
    return folder


def _folders(folder: epath.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())


def _there(folder: epath.Path) -> str:
    return f"; there are: {', '.join(_folders(folder)) or 'none'}"


def _boxes(objects: Mapping[str, Sequence[Any]]) -> Example:
    """Boxes, their classes and flags; tfds has corners: top, left, bottom, right."""
    corners = np.array(objects["bbox"], np.float32).reshape(-1, 4)
    low, high = corners[:, 1::-1], corners[:, :1:-1]
    flags = np.zeros(len(corners), np.int32)
    for key, flag in _FLAG_OF.items():
        if key in objects:  # -1 is unknown
            flags |= (np.array(objects[key], np.int64) == 1).astype(np.int32) << FLAGS.index(flag)
    return {
        "boxes": np.concatenate([low, high - low], axis=1),
        "box_classes": np.array(objects["label"], np.int32).reshape(-1),
        "box_flags": flags,
    }
