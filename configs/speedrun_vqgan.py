"""Stage 1 of the speedrun: the original's recipe on 64 x 64 pictures, small enough for a budget of minutes.

    python train_vqgan.py --config=configs/speedrun_vqgan.py --workdir=runs/x
    python train_vqgan.py --config=configs/speedrun_vqgan.py:form=gpu --config.data.source=folder \\
        --config.data.path=/tiny_imagenet --workdir=runs/x

Arguments: `form=cpu` some ten minutes on two cores, `form=gpu` some fifteen on an H200; `runlocal` two steps.
benchmarks/speedrun_recipes.py changes it piece by piece. Of `common.reference` all but the learning rate is kept: at
4.5e-6 times the batch a thousand steps would teach it nothing.
"""

from ml_collections import ConfigDict

from configs import common, quantizers
from vqgan_jax.config import choose, parse_arg

CODES = 1024


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, form="cpu", runlocal=False)
    config = common.vqgan()
    config.data = common.data("scenes")
    config.data.crop = "center"
    config.log_every, config.save_every, config.images_every, config.images_shown = "25", "50%", "0", 0
    config.loss.perceptual_weight = 0.0  # LPIPS needs files
    config.loss.adversarial_start = "50%"  # late, as the original's
    ae = config.model.autoencoder
    ae.resolution = 64
    choose("form", arg.form, {"cpu": _cpu, "gpu": _gpu})(config)
    learning_rate = config.optimizer.learning_rate
    common.reference(config)
    config.optimizer.scale_by_batch, config.optimizer.learning_rate = False, learning_rate
    config.data.resize = "bilinear"  # nothing is resized; so that recipes differ in what they train alone
    return common.run_local(config) if arg.runlocal else config


def _cpu(config: ConfigDict) -> None:
    """f8. The stem has stride 4, so that nothing runs above 16 x 16, where a CPU's time would go."""
    config.steps, config.batch_size, config.eval_every = "3000", 8, "0"  # scored at the end alone
    ae, model = config.model.autoencoder, config.model
    ae.stem, ae.channels, ae.multipliers, ae.blocks, ae.attention_resolutions = 4, 64, (1, 1), 1, (8,)
    ae.z_channels = 64
    model.quantizer = quantizers.vq(CODES, 64)
    model.discriminator.channels, model.discriminator.layers = 16, 2
    config.optimizer.learning_rate = 5e-4


def _gpu(config: ConfigDict) -> None:
    """f8, as wide and deep as the original."""
    config.steps, config.batch_size, config.eval_every, config.eval_examples = "12000", 64, "25%", 512
    config.dtype = "bfloat16"
    ae, model = config.model.autoencoder, config.model
    ae.multipliers, ae.attention_resolutions = (1, 2, 2, 4), (8,)
    model.quantizer = quantizers.vq(CODES, 256)
    config.optimizer.learning_rate = 1e-4
