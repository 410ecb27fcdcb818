"""ImageNet (ILSVRC 2012) as downloaded or unpacked, its depth maps, and classes chosen from it (Restricted ImageNet).

The class of a picture is the rank of its synset, "n01440764", among the sorted ones: the order of every released model.
"""

import csv
import io
import posixpath
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.image_files import ImageFiles, decode_at_least, in_split
from vqgan_jax.data.pairs import Pairs, decode_depth
from vqgan_jax.data.stores import Store, find_store, matched, read_optional, stem
from vqgan_jax.data.tables import IMAGENET_GROUPS, select

_LAYOUT = "train (or ILSVRC2012_img_train.tar) with one folder a synset, and val (or ILSVRC2012_img_val.tar)"
_VAL_LABELS = (
    "put its pictures into folders by synset, or LOC_val_solution.csv or the folder ILSVRC2012_devkit_t12 beside it"
)
_SYNSET = re.compile(r"n\d{8}")
_IGNORED = ("n06596364_9591.JPEG",)  # no picture, in the official archive
_ORIGINAL = {  # where the released archives and their mirrors keep a split
    "train": ("ILSVRC2012_img_train.tar", "ILSVRC/Data/CLS-LOC/train", "ILSVRC2012_train/data"),
    "val": ("ILSVRC2012_img_val.tar", "ILSVRC/Data/CLS-LOC/val", "ILSVRC2012_validation/data"),
}


def open_imagenet(data: ConfigDict, split: str) -> ImageFiles:
    """Opens `imagenet`. `config.data.classes` keeps some of its classes, ranked anew as the reference does.

    Raises:
      UserError: something is missing, a class that is not there, or validation pictures without labels.
    """
    synsets = _synsets(data)
    groups = IMAGENET_GROUPS if len(synsets) == 1000 else {}
    if not groups and any(item.strip() in IMAGENET_GROUPS for item in data.classes.split(",")):
        raise UserError(f"config.data.classes: '{data.classes}' is of 1000 classes, '{data.path}' has {len(synsets)}")
    classes = tuple(synsets[rank] for rank in select(data.classes, synsets, groups))
    if split == "train" or not data.val_split:
        store = _store(data, "train")
        synset_of = {name: _synset(name) for name in store.names}
        if not data.val_split:
            synset_of = {n: s for n, s in synset_of.items() if in_split(n, split, data.val_share)}
    else:
        store = _store(data, "val")
        synset_of = _validation(data, store)
    label_of = {synset: label for label, synset in enumerate(classes)}
    names = [
        name for name, synset in synset_of.items() if synset in label_of and posixpath.basename(name) not in _IGNORED
    ]
    if not names:
        raise UserError(f"config.data.path: '{store.where('')}' holds no picture of the {len(classes)} classes")
    labels = [label_of[synset_of[name]] for name in names]
    return ImageFiles(store, names, labels=labels, classes=classes, at_least=decode_at_least(data, split))


def open_imagenet_depth(data: ConfigDict, split: str) -> Pairs:
    """Opens `imagenet_depth`: ImageNet with a depth map for each picture, in the folder `config.data.depths`.

    Depth maps lie as the pictures do: depths/train/n01440764/n01440764_18.png and depths/val/... Their values are kept
    as they are but for the range, so that MiDaS's are 1 where it is near, as the released models know them.

    Raises:
      UserError: as `open_imagenet`, or no depth maps.
    """
    pictures = open_imagenet(data, split)
    top = data.depths or "depth"
    folder = {"train": data.train_split, "val": data.val_split or data.train_split}[split]
    layout = f"'{top}/{folder}' with the depth maps of the pictures' names"
    store = find_store(data.path, [posixpath.join(top, folder)], layout)
    rows = matched(pictures.names, {"depth map": store.names}, layout)
    label_of = dict(zip(pictures.names, pictures.labels, strict=True))
    names = [name for name, _ in rows]
    kept = ImageFiles(
        pictures.store,
        names,
        labels=[label_of[name] for name in names],
        classes=pictures.classes,
        at_least=decode_at_least(data, split),
    )
    return Pairs(kept, {"depth": (store, [depth for _, depth in rows])}, {"depth": decode_depth})


def _store(data: ConfigDict, split: str) -> Store:
    named = {"train": data.train_split, "val": data.val_split}[split]
    return find_store(data.path, [named, *_ORIGINAL[split]], _LAYOUT)


def _synsets(data: ConfigDict) -> list[str]:
    """All synsets of training, sorted; of a local folder only the top is looked at."""
    for candidate in (data.train_split, *_ORIGINAL["train"]):
        folder = storage.path(posixpath.join(data.path, candidate))
        if folder.is_dir():
            found = sorted(entry.name for entry in folder.iterdir() if _SYNSET.fullmatch(entry.name))
            if found:
                return found
    found = sorted({synset for name in _store(data, "train").names if (synset := _synset(name))})
    if not found:
        raise UserError(f"config.data.path: '{data.path}' has no folders by synset (n01440764); {_LAYOUT} belong there")
    return found


def _synset(name: str) -> str:
    """The synset that a picture's folder names; "" where it names none."""
    folder = posixpath.basename(posixpath.dirname(name))
    return folder if _SYNSET.fullmatch(folder) else ""


def _validation(data: ConfigDict, store: Store) -> Mapping[str, str]:
    """The synset of each validation picture: by its folder, or by the official solution."""
    by_folder = {name: _synset(name) for name in store.names}
    if all(by_folder.values()):
        return by_folder
    solution = _solution(data.path)
    if solution is None:
        raise UserError(f"config.data.val_split: '{store.where('')}' does not say its classes; {_VAL_LABELS}")
    by_name = {name: solution.get(stem(posixpath.basename(name)), "") for name in store.names}
    unknown = [name for name, synset in by_name.items() if not synset]
    if unknown:
        raise UserError(f"config.data.val_split: the labels of validation do not name '{store.where(unknown[0])}'")
    return by_name


def _solution(root: str) -> Mapping[str, str] | None:
    """Synsets by the name of a validation picture, from Kaggle's table or from the official development kit."""
    if found := read_optional(root, ["LOC_val_solution.csv", "ILSVRC/LOC_val_solution.csv"]):
        rows = csv.reader(io.StringIO(found[0].decode("utf-8-sig")))
        return {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and _SYNSET.match(row[1])}
    kit = "ILSVRC2012_devkit_t12/data"
    truth = read_optional(root, [f"{kit}/ILSVRC2012_validation_ground_truth.txt"])
    meta = read_optional(root, [f"{kit}/meta.mat"])
    if truth is None or meta is None:
        return None
    synset_of = _meta(*meta)
    try:
        synsets = [synset_of[int(line)] for line in truth[0].decode().split()]
    except (KeyError, ValueError) as error:
        raise UserError(f"config.data.path: '{truth[1]}' and meta.mat do not agree on the id {error}") from None
    return {f"ILSVRC2012_val_{number:08d}": synset for number, synset in enumerate(synsets, start=1)}


def _meta(data: bytes, where: str) -> Mapping[int, str]:
    """Synsets by the development kit's own ids."""
    from scipy.io import loadmat  # comes with JAX; nothing else here needs it

    try:
        table = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # whatever a damaged file makes of it
        raise UserError(f"config.data.path: '{where}' is not the development kit's table ({error})") from None
