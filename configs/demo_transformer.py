"""Stage 2 on the embedded scenes, class-conditional, in about three minutes on two CPU cores.

    python train_transformer.py --config=configs/demo_transformer.py --config.vqgan=runs/x --workdir=runs/y
    python train_transformer.py --config=configs/demo_transformer.py:condition=segmentation --config.vqgan=runs/x \\
        --config.cond_vqgan=runs/segmentation --workdir=runs/y

Arguments: `runlocal` two steps; `reference` the original's oddities; `condition=NAME` what the pictures follow, one of
CONDITIONS. One that is encoded needs its VQGAN (configs/demo_vqgan.py:input=NAME).
"""

from ml_collections import ConfigDict

from configs import common
from vqgan_jax.config import choose, parse_arg

ENCODED = ("segmentation", "depth", "edges", "low_res", "keypoints")
_LABEL = dict(name="class", classes=8)
_MAP = dict(name="image", input_key="segmentation")
_BOXES = dict(name="objects", kind="boxes", max_objects=10, vocab=1024, classes=5, flags=(), trim=True)
_PLACE = dict(name="coordinates", codes=1024, factor=8, scheme="joint")
CONDITIONS = {
    "none": dict(name="none"),
    "class": _LABEL,
    **{key: _MAP | dict(input_key=key) for key in ENCODED},
    "objects": _BOXES | dict(crop=False),  # corners on a lattice of 32 x 32 points
    "coordinates": _PLACE,
    # Several at once, each under a name of its own.
    "class_segmentation": dict(name="joint", label=_LABEL, map=_MAP),
    "objects_coordinates": dict(name="joint", boxes=_BOXES | dict(crop=True), place=_PLACE),
    "segmentation_coordinates": dict(name="joint", map=_MAP, place=_PLACE),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, reference=False, condition="class")
    config = common.transformer()
    config.steps = "1000"
    config.batch_size = 32
    config.log_every, config.eval_every, config.save_every, config.images_every = "100", "20%", "20%", "20%"
    config.cache_codes = True
    config.ema_decay = 0.995
    config.data = common.data("scenes")
    config.data.crop, config.data.flip = "center", False
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width = 4, 4, 128
    config.model.grid = (8, 8)
    config.model.condition = ConfigDict(choose("condition", arg.condition, CONDITIONS))
    config.optimizer = common.adamw(2e-3, warmup="100")
    if arg.condition not in ("none", "class"):  # as many tokens again: fewer examples in about the same time
        config.batch_size, config.data.train_examples = 16, 8192
        # Which token of a picture goes with which code of the sample takes long to learn.
        config.steps = {"objects": "2400", "coordinates": "800"}.get(arg.condition, "1600")
        config.eval_every, config.save_every, config.images_every, config.eval_examples = "50%", "50%", "0", 512
    if "coordinates" in arg.condition:  # crops of pictures twice as large; samples may have their size
        config.data.resize_to, config.data.crop, config.cache_codes = 128, "random", False
        config.data.train_examples, config.data.val_examples = 2048, 256
    if arg.reference:
        common.reference(config)
    return common.run_local(config) if arg.runlocal else config
