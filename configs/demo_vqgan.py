"""Stage 1 on the embedded scenes at 64x64, in about four minutes on two CPU cores (f = 8, 256 codes).

    python train_vqgan.py --config=configs/demo_vqgan.py --workdir=runs/x

Arguments: `runlocal` two steps; `reference` the original's oddities; `quantizer=vq` the codebook by gradient.
"""

from ml_collections import ConfigDict

from configs import common
from vqgan_jax.config import choose, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, reference=False, quantizer="ema")
    config = common.vqgan()
    config.steps = "2000"
    config.batch_size = 8
    config.log_every, config.eval_every, config.save_every, config.images_every = "50", "20%", "20%", "20%"
    config.eval_examples = 512
    config.ema_decay = 0.99
    config.data = common.data("scenes")
    config.data.crop, config.data.flip = "center", True
    ae = config.model.autoencoder
    # A stem of stride 4 and a pixel-shuffle tail: nothing runs above 16x16, which is where a CPU's time would go.
    ae.resolution, ae.stem, ae.channels, ae.multipliers, ae.blocks = 64, 4, 64, (1, 1), 1
    ae.decoder_extra_blocks, ae.attention_resolutions, ae.z_channels = 0, (), 64
    config.model.quantizer = choose("quantizer", arg.quantizer, {"ema": common.ema, "vq": common.vq})(256, 16)
    config.model.discriminator.enabled = False
    config.loss.reconstruction, config.loss.perceptual_weight = "l2", 0.0
    config.optimizer = common.adam(2e-3, b1=0.9, b2=0.99, clip_norm=1.0, schedule="cosine", warmup="50", hold="50%")
    if arg.reference:
        common.reference(config)
    return common.run_local(config) if arg.runlocal else config
