"""Stage 2 of the speedrun: a class-conditional GPT on the 8 x 8 codes of a first stage of configs/speedrun_vqgan.py.

    python train_transformer.py --config=configs/speedrun_transformer.py --config.vqgan=runs/x --workdir=runs/y

Arguments: `form=cpu` some ten minutes on two cores, `form=gpu` some fifteen on an H200; `runlocal` two steps.
benchmarks/speedrun_recipes.py changes it piece by piece, and sets the data and the number of classes.
"""

from ml_collections import ConfigDict

from configs import common
from vqgan_jax.config import choose, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, form="cpu", runlocal=False)
    config = common.transformer()
    config.data = common.data("scenes")
    config.data.crop, config.data.flip = "center", False
    config.log_every, config.save_every, config.images_every = "25", "50%", "0"
    config.model.grid = (8, 8)
    config.model.condition = ConfigDict(dict(name="class", classes=8))
    config.ema_decay = 0.0
    # As published but for the rate: constant, no clipping, weight decay 0.01.
    plain = dict(clip_norm=0.0, schedule="constant", warmup="0")
    choose("form", arg.form, {"cpu": _cpu, "gpu": _gpu})(config, plain)
    return common.run_local(config) if arg.runlocal else config


def _cpu(config: ConfigDict, plain: dict) -> None:
    config.steps, config.batch_size, config.eval_every = "6000", 16, "0"  # scored at the end alone
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width = 4, 4, 96
    config.optimizer = common.adamw(1e-3, **plain)


def _gpu(config: ConfigDict, plain: dict) -> None:
    # 20,000 pictures: the best of the run by validation is what is scored.
    config.steps, config.batch_size, config.eval_every, config.save_every = "8000", 256, "5%", "5%"
    config.eval_examples, config.dtype = 0, "bfloat16"
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width = 12, 12, 768
    gpt.embed_dropout = gpt.residual_dropout = 0.1
    config.optimizer = common.adamw(3e-4, **plain)
