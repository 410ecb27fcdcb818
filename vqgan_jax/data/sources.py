"""The sources by the name in `config.data.source`: each a function from `config.data` and a split to a `Source`.

A further source is one class that follows `Source`, and one entry of `SOURCES`.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vqgan_jax.config import choose
from vqgan_jax.data.boxes import open_coco, open_open_images
from vqgan_jax.data.cifar import open_cifar10
from vqgan_jax.data.faces import open_celeba_hq, open_faceshq, open_ffhq
from vqgan_jax.data.image_files import open_files, open_list
from vqgan_jax.data.imagenet import open_imagenet, open_imagenet_depth
from vqgan_jax.data.keypoints import open_deepfashion
from vqgan_jax.data.pairs import open_ade20k, open_coco_stuff, open_pairs, open_sflckr
from vqgan_jax.data.records import open_records
from vqgan_jax.data.scenes_source import open_scenes
from vqgan_jax.data.source import CorruptExample, Example, Source
from vqgan_jax.data.tfds_source import open_tfds

__all__ = ["SOURCES", "CorruptExample", "Example", "Source", "open_source"]

SOURCES: dict[str, Callable[[ConfigDict, str], Source]] = {
    "scenes": open_scenes,
    "folder": open_files,
    "archive": open_files,
    "list": open_list,
    "records": open_records,
    "tfds": open_tfds,
    "pairs": open_pairs,
    "ade20k": open_ade20k,
    "coco_stuff": open_coco_stuff,
    "sflckr": open_sflckr,
    "coco": open_coco,
    "open_images": open_open_images,
    "imagenet": open_imagenet,
    "imagenet_depth": open_imagenet_depth,
    "ffhq": open_ffhq,
    "celeba_hq": open_celeba_hq,
    "faceshq": open_faceshq,
    "cifar10": open_cifar10,
    "deepfashion": open_deepfashion,
}


def open_source(data: ConfigDict, split: str) -> Source:
    """Opens the split "train" or "val" of the source that `config.data` names.

    Raises:
      UserError: an unknown source or split, or nothing to read under `config.data.path`.
    """
    choose("split", split, dict.fromkeys(("train", "val")))
    return choose("config.data.source", data.source, SOURCES)(data, split)
