"""Stage 1 as of 2026: the paper's convolutions at f16, with the codes, judges and schedule of its successors.

    python train_vqgan.py --config=configs/modern_vqgan.py --config.data.path=/imagenet --workdir=gs://bucket/tokenizer
    python train_vqgan.py --config=configs/modern_vqgan.py:speedrun --workdir=runs/small
    python -m vqgan_jax.tools.aot --config=configs/modern_vqgan.py --topology=v5e:4x8

Arguments: `imagenet` (or nothing): the run to start on a pod. `speedrun`: the recipe on model sizes, data and steps of
configs/speedrun_vqgan.py (with `form=gpu` its larger ones). `blocks=4`: residual blocks a level. `perceptual=lpips`.
`discriminator=dino`. `perturb`: for stage 2's sake. `runlocal`: two steps. rFID is on ImageNet's validation set:

- 16384 codes of 8 numbers on the unit sphere. LlamaGen (arXiv 2406.06525): 256, 32, 8, 4 numbers give 9.21 (0.3 % of
  the codes in use), 3.22, 2.19 (97 %), 9.88; 4096, 8192, 16384, 32768 codes 3.02, 2.91, 2.19, 2.26. Normalised and
  from all over the sphere, for plain ones from near 0: 11.4 to 5.3, usage 3 to 100 % (GSQ, arXiv 2412.02632). For the
  generator alone a small book may do better: RandAR's gFID is 2.47 on 1024 codes, 2.65 on these.
- No attention, a decoder as deep as the encoder: with the cosine schedule and half the channels 7.94 to 7.15 (MaskBit,
  arXiv 2409.16211), and 17 % fewer FLOPs in the autoencoder. In GSQ's short f8 runs attention helped: 0.65 to 0.59.
- 128 channels in generator and discriminator: 7.15 to 4.02. ResNet-50's logits as perceptual loss, L2 for pixels: 2.40.
  Blur-pool GroupNorm discriminator with LeCAM 0.001, weight 0.02 fixed: 2.00 at 300k steps; averaged weights and
  1.35M steps 1.66 (all MaskBit). Their L2 counts 4 times on [0, 1], which is once on [-1, 1]. GSQ found the logits
  harmful in short runs, and the adaptive weight too: 1.86 to 2.69.
- Betas (.9, .99): with a PatchGAN .9 for .5 and .99 for .9 gave 11.3 to 3.5, with DINO's heads 1.87 to 1.86 (GSQ).
- The discriminator starts at 5 % of the run and counts from 7 %, over 5 % (MaskBit: 20k steps, at once).
- `discriminator=dino`: 1.86 for 3.4 at equal settings (GSQ), with DiffAug; GigaTok found rFID 0.81 to 0.51 but gFID
  3.26 to 3.33: score the generator before choosing it.
- `perturb` (RobustTok, arXiv 2503.08354; all codes of a tenth of the pictures become one of their 100 nearest, both
  halved from 20 to 60 % of the run): rFID 0.91 to 1.02, gFID of RAR-L 1.70 to 1.60.
- `blocks=4`: IBQ's depth. Compare it at equal FLOPs.
- Averaged weights over 0.999: with the longer run the last step of MaskBit's, 2.00 to 1.66. No entropy term: VQGAN+
  ships without one, at 100 % usage. Warm-up and clipping cured SimVQ's NaNs. 256 images at 1e-4: GSQ gained from 512 at
  2e-4 (1.80 to 1.58), so raise both together. Commitment 0.25 is VQ-VAE's.
- In 3000 steps of photographs at 64 pixels (benchmarks/RESULTS.md) the original's GAN (adaptive weight, betas (.5, .9))
  did better than a fixed weight, (.9, .99) and a cosine: rFID-proxy 2.9 for 6.3 at weight 0.03 and 11.4 at 0.1. Those
  runs are 100 times as long.
- Ours, untested: weight decay 1e-4, 5000 steps of warm-up, a tenth of the rate at the end, crops of 0.8 to 1 of a
  picture, weight 0.1 of the logits.

Cost. TFLOP an image, counted in the traced step (train/roofline.py): 1.295, of which 0.31 are the discriminator's and
0.02 those of the logits; lpips 1.43, dino 1.04, blocks=4 2.04 (the paper's model 1.36). 300k steps of 256 (60 epochs)
are 9.9e19 FLOP. Compiled for v5e:4x8, 8 images a chip (benchmarks/aot.md): 5.2 of 15.8 GiB, bound by compute, at
least 136 chip-hours, 4.2 by the clock. With 4 images a chip (v5e:8x8) the compiler cuts pictures into pieces and moves
5 times the bytes an image: 587 chip-hours at least, so give a chip 8 or more. At 30 % of the bfloat16 peak it is, in
chip-hours, v5e 467, v4 335, A100 295, v5p 201, v6e 100, H200 93. The published 1.35M steps are 4.5 times that,
blocks=4 is 1.6 times.
"""

from ml_collections import ConfigDict

from configs import common, quantizers, speedrun_vqgan
from vqgan_jax.config import UserError, choose, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        name="imagenet",
        form="cpu",
        blocks=0,  # as the size has
        perceptual="logits",
        discriminator="blurpool",
        perturb=False,
        runlocal=False,
    )
    sizes = {"form": "cpu"} if arg.name == "imagenet" else {"perceptual": "logits", "discriminator": "blurpool"}
    if unused := [key for key, default in sizes.items() if arg[key] != default]:
        raise UserError(f"--config=configs/modern_vqgan.py:{arg.name}: has no '{unused[0]}' to choose; leave it out")
    config = choose("--config=configs/modern_vqgan.py", arg.name, {"imagenet": imagenet, "speedrun": speedrun})(arg)
    if arg.perturb:
        config.loss.perturbation.share = 1.0
    if arg.runlocal:
        small = common.shrink_vqgan(config) if arg.name == "imagenet" else config
        return common.run_local(small)
    return config


def imagenet(arg: ConfigDict) -> ConfigDict:
    """The full-size run."""
    config = common.vqgan()
    config.steps, config.batch_size, config.dtype = "300000", 256, "bfloat16"
    config.eval_examples, config.fid_every, config.fid_samples = 5000, "10%", 0
    config.data = common.data("imagenet")
    config.data.image_size, config.data.crop, config.data.crop_scale = 256, "random_resized", (0.8, 1.0)
    config.model.quantizer = quantizers.low_dim_vq(16384, 8)
    kinds = {"blurpool": common.blurpool, "dino": common.dino_heads}
    config.model.discriminator = choose("discriminator", arg.discriminator, kinds)()
    config.optimizer = common.adam(1e-4, weight_decay=1e-4, warmup="5000")
    config.loss.reconstruction = "l2"
    weights = {"logits": (0.0, 0.1), "lpips": (1.0, 0.0)}
    config.loss.perceptual_weight, config.loss.logits_weight = choose("perceptual", arg.perceptual, weights)
    return modern(config, arg)


def speedrun(arg: ConfigDict) -> ConfigDict:
    """The recipe on the speedrun's model, data, batch, steps and learning rate. Nothing to download, so no perceptual
    loss: pixels count by L1, whose gradient does not fade as they get near."""
    config = speedrun_vqgan.get_config(f"form={arg.form}")
    channels = max(32, config.model.discriminator.channels)
    config.model.quantizer = quantizers.low_dim_vq(speedrun_vqgan.CODES, 8)
    config.model.discriminator = common.blurpool(channels, stages=2)
    config.optimizer = common.adam(config.optimizer.learning_rate, warmup="2%")
    config.loss, config.ema_decay = common.vqgan_loss(), 0.99
    config.loss.perceptual_weight = 0.0
    return modern(config, arg)


def modern(config: ConfigDict, arg: ConfigDict) -> ConfigDict:
    """What both sizes have in common."""
    ae, loss, optimizer = config.model.autoencoder, config.loss, config.optimizer
    ae.attention_resolutions, ae.mid_attention, ae.decoder_extra_blocks = (), False, 0
    ae.blocks = arg.blocks or ae.blocks
    loss.discriminator_start, loss.adversarial_start, loss.adversarial_ramp = "5%", "7%", "5%"
    loss.adaptive, loss.adversarial_weight, loss.lecam_weight = False, 0.02, 0.001
    if config.model.discriminator.name == "dino":
        loss.augment = "color,translation,cutout"
    optimizer.b1, optimizer.b2, optimizer.clip_norm = 0.9, 0.99, 1.0
    optimizer.schedule, optimizer.final_share = "cosine", 0.1
    return config
