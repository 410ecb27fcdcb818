"""Stage 2 on the embedded scenes, class-conditional, in about three minutes on two CPU cores.

    python train_transformer.py --config=configs/demo_transformer.py --config.vqgan=runs/x --workdir=runs/y

Arguments: `runlocal` two steps; `reference` the original's oddities; `condition=none` unconditional.
"""

from ml_collections import ConfigDict

from configs import common
from vqgan_jax.config import choose, parse_arg


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
    conditions = {"class": dict(name="class", classes=8), "none": dict(name="none")}
    config.model.condition = ConfigDict(choose("condition", arg.condition, conditions))
    config.optimizer = common.adamw(2e-3, warmup="100")
    if arg.reference:
        common.reference(config)
    return common.run_local(config) if arg.runlocal else config
