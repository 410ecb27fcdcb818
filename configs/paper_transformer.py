"""The transformers of the paper, a row each (arXiv 2012.09841, Table 8; scene layouts: arXiv 2105.06458).

    python train_transformer.py --config=configs/paper_transformer.py:class_imagenet_big --workdir=runs/x \\
        --config.vqgan=runs/vqgan --config.data.path=/imagenet

Arguments: the row's name first; `reference` the original's oddities; `runlocal` two steps of a small model of the same
kind on the embedded scenes. A row's `first` and `cond` name the stages of configs/paper_vqgan.py to train before it
(`ROW,runlocal` for `runlocal`), to be given as `--config.vqgan` and `--config.cond_vqgan`. All have 16 heads and codes
of f16, or of the row's stage, on crops of 16 x 16 codes unless the row says otherwise. The learning rate is 4.5e-6
times the batch. Of Table 8 FacesHQ f1 alone is not here: its codes are 512 colours by k-means, not a VQGAN's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common, paper_vqgan
from vqgan_jax.config import choose, parse_arg

MAX_OBJECTS = 30  # of a scene
RESTRICTED = {"classes": "restricted"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model. `parameters` are those of the reference's layout (`:reference`), where kinds of tokens share ids."""

    first: str  # row of paper_vqgan.py
    parameters: int
    layers: int = 24
    width: int = 1024
    cond: str = ""  # row of paper_vqgan.py, for a condition that is encoded
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of config.data, what differs from the stages'
    condition: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "none"})
    grid: tuple[int, int] = (16, 16)  # of codes
    positions: int = 512
    dropout: float = 0.0
    batch: int = 48
    top_k: int = 100  # that the published figure was sampled with
    published: str = ""


def label(classes: int) -> dict[str, Any]:
    """The class, one token."""
    return {"name": "class", "classes": classes}


def encoded(key: str) -> dict[str, Any]:
    """A picture's codes."""
    return {"name": "image", "input_key": key}


def boxes(classes: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """The boxes, three tokens each, and two for the crop."""
    layout = dict(kind="boxes", max_objects=MAX_OBJECTS, vocab=8192, classes=classes, crop=True, flags=flags, trim=True)
    return {"name": "objects", **layout}


def layouts(source: str, min_box_area: float, **crop: Any) -> dict[str, Any]:
    """`config.data` of pictures with 2 objects or more, all of which the condition has room for."""
    kept = dict(max_boxes=MAX_OBJECTS, min_objects=2, min_box_area=min_box_area)
    return {"source": source, "resize_to": 0, **kept, **crop}


def coordinates(factor: int) -> dict[str, Any]:
    """Where in the whole picture each code stands."""
    return {"name": "coordinates", "codes": 1024, "factor": factor, "scheme": "joint"}


FID, NLL = "FID {}", "NLL {} nats a token"

ROWS = {
    # Unconditional
    "imagenet": Row("imagenet_f16_1024", 304_670_720, positions=256, published=NLL.format(4.78)),
    "restricted_imagenet": Row("restricted_imagenet", 86_628_864, layers=12, width=768, published=NLL.format(4.78)),
    "lsun_churches": Row("lsun_churches", 304_670_720, positions=256, published=NLL.format(4.63)),
    "ffhq": Row("ffhq", 355_055_616, layers=28, positions=256, top_k=300, published=FID.format(9.6)),
    "ffhq_big": Row("ffhq", 801_798_400, width=1664, positions=256, top_k=300),
    "celebahq": Row("celebahq", 355_055_616, layers=28, positions=256, top_k=400, published=FID.format(10.2)),
    "celebahq_big": Row("celebahq", 801_798_400, width=1664, positions=256, top_k=400),
    "cifar10": Row("cifar10", 304_670_720, positions=256),
    # Class-conditional
    "class_imagenet": Row("imagenet_f16_1024", 304_671_744, condition=label(1000), positions=257),
    "class_imagenet_big": Row(
        "imagenet_f16_16384",
        1_410_642_432,
        layers=48,
        width=1536,
        condition=label(1000),
        positions=257,
        batch=128,
        top_k=973,
        published="FID 15.78 with top-p 0.88; 5.20 with top-k 600 and 5 % acceptance",
    ),
    "class_restricted_imagenet": Row(
        "restricted_imagenet", 128_960_256, layers=18, width=768, condition=label(203), positions=257
    ),
    "class_cifar10": Row("cifar10", 304_671_744, condition=label(10), positions=257),
    # Semantic synthesis
    "ade20k": Row(
        "ade20k",
        361_609_216,
        layers=28,
        cond="ade20k_segmentation",
        condition=encoded("segmentation"),
        dropout=0.1,
        published=FID.format(35.5),
    ),
    "coco": Row(
        "coco",
        651_307_520,
        layers=32,
        width=1280,
        cond="coco_segmentation",
        condition=encoded("segmentation"),
        published=FID.format("22.4 (20.4 released)"),
    ),
    "coco_v1": Row(  # of the paper's first version; the width is the one that comes nearest to its 470 M
        "coco_v1",
        462_379_008,
        layers=36,
        cond="coco_segmentation",
        condition=encoded("segmentation"),
        dropout=0.1,
    ),
    "sflckr": Row(
        "sflckr_f16",
        304_932_864,
        cond="sflckr_segmentation",
        condition=encoded("segmentation"),
        published=NLL.format(4.49),
    ),
    "sflckr_f4": Row("sflckr_f4", 304_932_864, cond="sflckr_segmentation_f4", condition=encoded("segmentation")),
    "sflckr_f32": Row("sflckr_f32", 304_932_864, cond="sflckr_segmentation_f32", condition=encoded("segmentation")),
    # Structure, edges, resolution, pose
    "depth_imagenet": Row("imagenet_f16_1024", 304_932_864, cond="imagenet_depth", condition=encoded("depth")),
    "depth_restricted": Row(
        "imagenet_f16_1024",
        178_970_624,
        layers=14,
        cond="imagenet_depth",
        condition=encoded("depth"),
        data=RESTRICTED,
        published=NLL.format("4.70"),
    ),
    "depth_restricted_v2": Row(
        "imagenet_f16_1024", 304_932_864, cond="imagenet_depth", condition=encoded("depth"), data=RESTRICTED
    ),
    "edges_imagenet": Row("imagenet_f8", 304_932_864, cond="imagenet_edges", condition=encoded("edges")),
    "super_resolution": Row(
        "imagenet_f8", 153_778_176, layers=12, cond="imagenet_low_res", condition=encoded("low_res")
    ),
    "pose_deepfashion": Row(  # whole persons: 340 positions are two upright grids
        "deepfashion",
        129_417_216,
        layers=18,
        width=768,
        cond="deepfashion_keypoints",
        condition=encoded("keypoints"),
        grid=(17, 10),
        positions=340,
    ),
    # Scenes
    "coco_scenes": Row(
        "coco",
        975_876_352,
        layers=40,
        width=1408,
        condition=boxes(183, ("group",)),
        data=layouts("coco", 1e-5),
        positions=348,
        dropout=0.1,
        batch=48,
    ),
    "open_images_scenes": Row(
        "coco",
        1_045_638_144,
        layers=36,
        width=1536,
        condition=boxes(354, ("group", "occluded", "depiction", "inside")),
        # squares from a third of the short side up, about as many pixels as the model sees
        data=layouts("open_images", 1e-4, crop="random_resized", crop_scale=(0.1, 1.0)),
        positions=348,
        dropout=0.1,
        published="FID 41.48, SceneFID 14.60",
    ),
    # Faces, of windows that know where they stand. As in the reference the faces have 256 pixels, so that at f16 the
    # window is the whole face and every example has the same coordinates; for faces larger than the window, train on
    # crops of them: --config.data.resize_to=512.
    "faceshq": Row("faceshq_f16", 304_932_864, condition=coordinates(16)),
    "faceshq_f8": Row("faceshq_f8", 304_932_864, condition=coordinates(8)),
    "faceshq_f4": Row("faceshq_f4", 304_932_864, condition=coordinates(4)),
    "faceshq_f2": Row("faceshq_f2", 304_932_864, condition=coordinates(2)),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, name="imagenet", runlocal=False, reference=False)
    row = choose("--config=configs/paper_transformer.py", arg.name, ROWS)
    first = paper_vqgan.ROWS[row.first]
    config = common.transformer()
    config.steps = "1e8 examples"
    config.batch_size = row.batch
    config.data = paper_vqgan.data(paper_vqgan.ROWS[row.cond or row.first])
    config.data.classes = first.classes
    config.data.update(row.data)
    height, width = (n * first.factor for n in row.grid)
    with config.data.ignore_type():
        config.data.image_size = height if height == width else (height, width)

    model = config.model
    model.grid = row.grid
    gpt = model.transformer
    gpt.layers, gpt.width, gpt.block_size = row.layers, row.width, row.positions
    gpt.embed_dropout = gpt.residual_dropout = gpt.attention_dropout = row.dropout
    model.condition = ConfigDict(dict(row.condition))
    config.sampling.top_k = row.top_k
    if arg.reference:
        common.reference(config)
    return common.run_local(common.shrink_transformer(config, first.factor)) if arg.runlocal else config
