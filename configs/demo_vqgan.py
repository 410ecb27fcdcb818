"""Stage 1 on the embedded scenes at 64x64, in about four minutes on two CPU cores (f = 8, 256 codes).

    python train_vqgan.py --config=configs/demo_vqgan.py --workdir=runs/x
    python train_vqgan.py --config=configs/demo_vqgan.py:input=segmentation --workdir=runs/segmentation

Arguments: `runlocal` two steps; `reference` the original's oddities; `quantizer=vq` the codebook by gradient, `ema`
(the default), `low_dim`, `fsq`, `lfq`, `bsq`, `simvq`, `ibq`, `gumbel`;
`input=segmentation`, `depth`, `edges`, `low_res` or `keypoints` the VQGAN of a condition, in about a minute.
"""

from ml_collections import ConfigDict

from configs import common, quantizers
from vqgan_jax.config import choose, parse_arg

CHANNELS = {"image": 3, "segmentation": 10, "depth": 1, "edges": 1, "low_res": 3, "keypoints": 3}  # by input


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, reference=False, quantizer="", input="image")
    common.check_reference(arg)
    channels = choose("input", arg.input, CHANNELS)
    config = common.vqgan()
    config.steps = "2000"
    config.batch_size = 8
    config.log_every, config.eval_every, config.save_every, config.images_every = "50", "20%", "20%", "20%"
    config.eval_examples = 512
    config.ema_decay = 0.99
    config.data = common.data("scenes")
    config.data.crop, config.data.flip = "center", True
    config.model.input_key = arg.input
    ae = config.model.autoencoder
    ae.in_channels = ae.out_channels = channels
    # A stem of stride 4 and a pixel-shuffle tail: nothing runs above 16x16, which is where a CPU's time would go.
    ae.resolution, ae.stem, ae.channels, ae.multipliers, ae.blocks = 64, 4, 64, (1, 1), 1
    ae.decoder_extra_blocks, ae.attention_resolutions, ae.z_channels = 0, (), 64
    config.model.quantizer = quantizers.of_size(arg.quantizer or "ema", 256, 16)
    if arg.quantizer == "gumbel" and not arg.reference:  # the released model anneals far longer than this run
        config.model.quantizer = quantizers.annealed_gumbel(256, 16)
    config.model.discriminator.enabled = False
    config.loss.reconstruction, config.loss.perceptual_weight = "l2", 0.0
    config.optimizer = common.adam(2e-3, b1=0.9, b2=0.99, clip_norm=1.0, schedule="cosine", warmup="50", hold="50%")
    if arg.input != "image":
        condition(config)
    if arg.reference:
        common.reference(config)
    return common.run_local(config) if arg.runlocal else config


def condition(config: ConfigDict) -> None:
    """A condition's VQGAN: half as wide and a third to a half as long, for it says less than a picture does."""
    key = config.model.input_key
    config.steps = {"segmentation": "600", "low_res": "600", "keypoints": "2000"}.get(key, "1200")
    config.eval_every, config.save_every, config.images_every, config.eval_examples = "50%", "50%", "50%", 128
    config.model.autoencoder.channels = 32
    if key in ("edges", "keypoints") and "codebook_size" in config.model.quantizer:
        # Thin on black: more ways that a patch can look.
        config.model.quantizer.codebook_size = 1024
    # Where hardly a pixel is wrong, the commitment would weigh more than what it is for.
    config.loss.pixel_weight = {"depth": 10.0, "keypoints": 100.0}.get(key, 1.0)
    if key == "segmentation":
        config.loss.reconstruction = "bce"
        config.checkpoint.best_metric, config.checkpoint.best_mode = "val/bce", "min"
