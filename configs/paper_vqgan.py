"""The first stages of the paper and of its released models, a row each (arXiv 2012.09841, Tables 5 and 8).

    python train_vqgan.py --config=configs/paper_vqgan.py:imagenet_f16_1024 --workdir=runs/x \\
        --config.data.path=/imagenet

Arguments: the row's name first; `quantizer=fsq` (or `vq`, `low_dim`, `ema`, `gumbel`, `lfq`, `bsq`, `simvq`, `ibq`)
another quantizer of the row's size or near it; `discriminator=blurpool` or `dino`; `reference` the original's oddities;
`runlocal` two steps of a small model of the same kind on the embedded scenes. Where the paper leaves a number open
(widths of f2, f4, f8 and f32, batch sizes), the row follows its nearest relative. Learning rate everywhere: 4.5e-6
times the batch. The adversarial loss starts late on purpose: section 4 of the paper.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common, quantizers
from vqgan_jax.config import choose, parse_arg


@dataclasses.dataclass(frozen=True)
class Row:
    """One first stage; what it leaves out is the f16 model's. `published` is rFID on the validation (training) set."""

    source: str  # config.data.source
    parameters: int  # of the autoencoder and its codebook, the discriminator apart
    codes: int = 1024
    dim: int = 256  # of a code, and z_channels
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    attention: tuple[int, ...] = (16,)  # resolutions
    quantizer: str = "vq"
    key: str = "image"  # the batch key it reconstructs
    channels: int = 3  # of that key; labels of a segmentation
    batch: int = 12
    start: str = "250001"  # of the adversarial loss
    weight: float = 0.8  # of the adversarial loss
    discriminator_layers: int = 3
    size: int = 256
    resize_to: int = 0  # short side before the crop; 0 = size
    classes: str = ""  # those to keep
    published: str = ""

    @property
    def factor(self) -> int:
        """Pixels a code along a side."""
        return 2 ** (len(self.multipliers) - 1)


F2, F4, F8, F32 = (1, 2), (1, 2, 4), (1, 1, 2, 4), (1, 1, 2, 2, 4, 4)

ROWS = {
    # ImageNet
    "imagenet_f16_1024": Row("imagenet", 72_141_699, published="7.94 (10.54)"),
    "imagenet_f16_16384": Row(
        "imagenet",
        76_073_859,
        codes=16384,
        start="1",
        weight=0.75,
        discriminator_layers=2,
        published="4.98 (7.41), 973 codes in use",
    ),
    "imagenet_f8": Row("imagenet", 65_055_619, multipliers=F8, size=128, resize_to=256),
    "restricted_imagenet": Row("imagenet", 70_035_779, dim=64, codes=768, classes="restricted"),
    # OpenImages: the Gumbel model of the paper, and the VQ models that the authors trained later (arXiv 2112.10752)
    "openimages_f8_gumbel": Row(
        "folder",
        68_995_971,
        codes=8192,
        multipliers=F8,
        attention=(32,),
        quantizer="gumbel",
        published="1.49 (3.24)",
    ),
    "openimages_f8_256": Row(
        "folder",
        67_652_783,
        codes=256,
        dim=4,
        multipliers=(1, 2, 2, 4),
        attention=(32,),
        batch=10,
        weight=0.75,
        resize_to=384,
        published="1.49",
    ),
    "openimages_f8_16384": Row(
        "folder",
        67_717_295,
        codes=16384,
        dim=4,
        multipliers=(1, 2, 2, 4),
        attention=(32,),
        batch=10,
        start="1",
        weight=0.75,
        resize_to=384,
        published="1.14",
    ),
    "openimages_f4_8192": Row(
        "folder", 55_322_782, codes=8192, dim=3, multipliers=F4, attention=(), batch=8, start="1", weight=0.75
    ),
    # Faces
    "faceshq_f16": Row("faceshq", 72_141_699, batch=3, start="30001"),
    "faceshq_f8": Row("faceshq", 65_055_619, multipliers=F8, size=128, resize_to=256, batch=3, start="30001"),
    "faceshq_f4": Row("faceshq", 63_282_051, multipliers=F4, size=64, resize_to=256, batch=3, start="30001"),
    "faceshq_f2": Row("faceshq", 16_192_643, multipliers=F2, size=32, resize_to=256, batch=3, start="30001"),
    "ffhq": Row("ffhq", 72_141_699, batch=3, start="30001"),
    "celebahq": Row("celeba_hq", 72_141_699, batch=3, start="30001"),
    # Scenes
    "lsun_churches": Row("folder", 72_141_699),
    "sflckr_f16": Row("sflckr", 72_141_699),
    "sflckr_f4": Row("sflckr", 63_282_051, multipliers=F4, size=64, resize_to=256),
    "sflckr_f32": Row("sflckr", 100_469_635, multipliers=F32, size=512),
    "coco": Row("coco_stuff", 73_976_707, codes=8192, resize_to=296),
    "coco_v1": Row("coco_stuff", 72_928_131, codes=4096, resize_to=296),
    "ade20k": Row("ade20k", 72_928_131, codes=4096, batch=6, resize_to=290),
    "deepfashion": Row("deepfashion", 72_141_699),
    "cifar10": Row("cifar10", 16_192_643, multipliers=F2, size=32, batch=64),
    "custom": Row("folder", 72_141_699, batch=5, start="10000"),
    # Conditions
    "imagenet_depth": Row("imagenet_depth", 72_137_089, key="depth", channels=1, batch=3, start="50001", weight=0.75),
    "imagenet_edges": Row("imagenet", 65_051_009, key="edges", channels=1, multipliers=F8, size=128, resize_to=256),
    "imagenet_low_res": Row("imagenet", 65_055_619, key="low_res", multipliers=F8, size=128, resize_to=256),
    "deepfashion_keypoints": Row("deepfashion", 72_141_699, key="keypoints"),
    "ade20k_segmentation": Row("ade20k", 72_482_839, key="segmentation", channels=151, batch=6, resize_to=290),
    "coco_segmentation": Row("coco_stuff", 72_556_599, key="segmentation", channels=183, resize_to=296),
    "sflckr_segmentation": Row("sflckr", 72_554_294, key="segmentation", channels=182),
    "sflckr_segmentation_f4": Row(
        "sflckr", 63_694_646, key="segmentation", channels=182, multipliers=F4, size=64, resize_to=256
    ),
    "sflckr_segmentation_f32": Row("sflckr", 100_882_230, key="segmentation", channels=182, multipliers=F32, size=512),
}


def data(row: Row) -> ConfigDict:
    """`config.data` of a row."""
    config = common.data(row.source)
    config.image_size, config.resize_to, config.classes = row.size, row.resize_to, row.classes
    return config


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, name="imagenet_f16_1024", quantizer="", discriminator="", runlocal=False, reference=False)
    common.check_reference(arg)
    row = choose("--config=configs/paper_vqgan.py", arg.name, ROWS)
    config = common.vqgan()
    config.steps = "1e7 examples"
    config.batch_size = row.batch

    config.data = data(row)

    model = config.model
    model.input_key = row.key
    ae = model.autoencoder
    ae.in_channels = ae.out_channels = row.channels
    ae.resolution, ae.multipliers, ae.attention_resolutions = row.size, row.multipliers, row.attention
    ae.z_channels = row.dim
    model.quantizer = quantizers.of_size(arg.quantizer or row.quantizer, row.codes, row.dim)
    kinds = {"patchgan": common.patchgan, "blurpool": common.blurpool, "dino": common.dino_heads}
    model.discriminator = choose("discriminator", arg.discriminator or "patchgan", kinds)()
    if model.discriminator.name == "patchgan":
        model.discriminator.layers = row.discriminator_layers

    loss = config.loss
    loss.adversarial_start, loss.adversarial_weight = row.start, row.weight
    if row.key == "segmentation":  # cross entropy of labels alone
        loss.reconstruction, loss.perceptual_weight, model.discriminator.enabled = "bce", 0.0, False
        config.checkpoint.best_metric, config.checkpoint.best_mode = "val/bce", "min"
    if arg.reference:
        common.reference(config)
    return common.run_local(common.shrink_vqgan(config)) if arg.runlocal else config
