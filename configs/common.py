"""The pieces that configs share. Every field of every config has its default here or in the config itself.

Durations are texts in any unit: "300" (steps), "2 epochs", "1e6 examples", "10%" of the run. Tuples are written
'(1, 1, 2)' on the command line; an empty text or 0 switches an option off.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import quantizers
from vqgan_jax.config import GPT2, UserError
from vqgan_jax.data.tables import IMAGENET_GROUPS


def run() -> ConfigDict:
    """What both trainers need beside model, data and optimizer."""
    return ConfigDict(
        dict(
            seed=0,
            steps="100 epochs",
            batch_size=8,  # global: over all devices and hosts
            accumulation=1,  # micro-batches a step
            dtype="float32",  # compute; parameters are float32 always
            remat="",  # what the backward pass computes again: "block", "attention", "dots" (all but products)
            ema_decay=0.999,  # 0: none
            nonfinite_budget=0,  # steps that may be skipped because they were not finite; their batches are kept
            replay="",  # WORKDIR/nonfinite/step_*.npz: run this batch again, and say which operation was not finite
            init_from="",  # a workdir or an imported model whose parameters to start from; the optimizer starts fresh
            train_only=(),  # nothing else changes: ("generator/decoder", "generator/post_quant", "discriminator")
            init_exclude=(),  # of these, what starts fresh too: ("discriminator", "generator/decoder/conv_out")
            log_every="50",
            eval_every="5%",
            save_every="5%",
            images_every="5%",
            eval_examples=1024,  # of the validation split; 0: all
            fid_every="0",  # score rFID of held-out images (stage 1: val/rfid), FID of samples (stage 2: val/fid)
            fid_samples=5000,  # so many samples, or held-out images (0: all)
            fid_reference="train",  # stage 2: a split, or a folder or .npz as of evaluate.py --reference
            fid_preset="adm",
            fid_weights="",  # local file of Inception; "" downloads it to the cache folder
            images_shown=16,
            checkpoint=dict(keep_last=2, keep_best=1),
            hand_to_clu=False,  # write through clu.metric_writers, where TensorFlow is installed
            wandb="",  # "project" or "entity/project" of Weights & Biases, where wandb is installed
            watchdog_seconds=1800,  # several hosts: end if a step takes longer, naming whom all wait for; 0: never
            profile="",  # "100-110": steps to trace
            mesh=dict(data=-1, fsdp=1, tensor=1),
        )
    )


def data(source: str = "scenes") -> ConfigDict:
    """Where examples come from."""
    return ConfigDict(
        dict(
            source=source,
            path="",
            name="",  # tfds: the data set under `path`, such as "imagenet2012:5.1.0"; its splits: "train[:95%]"
            train_split="train",  # folder, archive: a folder in `path`; list: a text file in it; "" is `path` itself
            val_split="val",  # "": hold out `val_share` of the training files
            val_share=0.02,
            train_examples=14336,  # scenes: how many to render
            val_examples=1024,
            seed=0,
            images="images",  # pairs: folders of pictures, masks and depth maps under `path`, matched by relative name
            masks="",
            depths="",  # also of imagenet_depth
            segments=0,  # pairs: how many ids the masks may hold; 0: any
            classes="",  # those to keep: "restricted" (of ImageNet), or names and ranks such as "n01440764, 30-32"
            min_objects=1,  # coco, open_images: leave out pictures with fewer boxes
            min_box_area=0.0,  # and boxes of a smaller share of the picture
            image_size=64,  # pixels a side, or in a config file (height, width)
            resize_to=0,  # what the short side is resized to before the crop; 0: image_size
            resize="bilinear",  # antialiased, as the paper prepares real images for its FID
            crop="random",
            crop_scale=(0.5, 1.0),  # share of the area, for crop="random_resized"
            flip=True,
            max_boxes=16,
            low_res_factor=8,  # of low_res: so many times coarser than the picture
            threads=4,
            processes=0,
            max_corrupt_share=0.01,
        )
    )


def adam(learning_rate: float, **changes) -> ConfigDict:
    """Adam as stage 1 uses it; the learning rate is that of the whole batch unless `scale_by_batch`."""
    return ConfigDict(
        dict(
            learning_rate=learning_rate,
            scale_by_batch=False,
            b1=0.5,
            b2=0.9,
            epsilon=1e-8,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule="constant",
            warmup="0",
            hold="0",
            final_share=0.0,
        )
        | changes
    )


def adamw(learning_rate: float, **changes) -> ConfigDict:
    """AdamW as stage 2 uses it: decay on kernels only."""
    settings = dict(b1=0.9, b2=0.95, weight_decay=0.01, clip_norm=1.0, schedule="cosine", warmup="5%")
    return adam(learning_rate, **settings | changes)


def vqgan_model(resolution: int = 256) -> ConfigDict:
    """The paper's f16 VQGAN with 1024 codes."""
    return ConfigDict(
        dict(
            input_key="image",
            autoencoder=dict(
                in_channels=3,
                out_channels=3,
                resolution=resolution,
                channels=128,
                multipliers=(1, 1, 2, 2, 4),
                blocks=2,
                decoder_extra_blocks=1,
                attention_resolutions=(16,),
                mid_attention=True,
                z_channels=256,
                dropout=0.0,
                stem=1,
            ),
            quantizer=quantizers.vq(1024, 256),
            discriminator=patchgan(),
        )
    )


def patchgan() -> ConfigDict:
    """The reference's discriminator."""
    return ConfigDict(dict(enabled=True, name="patchgan", channels=64, layers=3, norm="batch", spectral_norm=False))


def blurpool(channels: int = 128, stages: int = 3) -> ConfigDict:
    """VQGAN+'s discriminator, with 16x16 logits of 256 pixels; pictures of 64 take 2 stages."""
    most = channels << stages - 1  # each stage but the first doubles them
    return ConfigDict(
        dict(enabled=True, name="blurpool", channels=channels, max_channels=most, stages=stages, spectral_norm=False)
    )


def dino_heads() -> ConfigDict:
    """Heads on the frozen features of DINO, as many and where StyleGAN-T and VAR have them."""
    return ConfigDict(
        dict(
            enabled=True,
            name="dino",
            network="dino_vits16",
            layers=(0, 3, 6, 9, 12),
            size=224,
            kernel=3,
            norm="group",
            spectral_norm=True,
        )
    )


def vqgan_loss() -> ConfigDict:
    """Stage 1's objective: L1 + LPIPS + hinge PatchGAN under the adaptive weight."""
    return ConfigDict(
        dict(
            reconstruction="l1",
            pixel_weight=1.0,
            perceptual_weight=1.0,
            logits_weight=0.0,  # of ResNet-50's logits, beside LPIPS or in its place
            quantizer_weight=1.0,
            discriminator_loss="hinge",
            adversarial_weight=0.8,
            adversarial_start="25%",
            adversarial_ramp="5%",
            discriminator_start="100%",  # before adversarial_start: the discriminator trains before its loss counts
            adaptive=True,
            adaptive_epsilon=1e-6,  # the paper's delta
            adaptive_maximum=1e4,
            schedule="simultaneous",
            idle_discriminator_updates=False,
            lecam_weight=0.0,
            lecam_decay=0.999,
            perturbation=dict(  # codes replaced by near ones before they are decoded, while training
                share=0.0,  # of a picture's codes; 1.0 as published (alpha); 0: none
                pictures=0.1,  # share of the pictures (beta)
                nearest=100,  # among so many nearest codes (delta)
                anneal_start="20%",  # from here share and nearest fall,
                anneal_end="60%",  # to here,
                final_share=0.5,  # to this much of themselves
            ),
            augment="",  # what the discriminator sees: "color,translation,cutout", or some of them
        )
    )


def vqgan() -> ConfigDict:
    """A whole stage-1 config: the paper's model and sizes, to be changed by a config file."""
    config = run()
    config.model = vqgan_model()
    config.data = data("folder")
    config.loss = vqgan_loss()
    config.optimizer = adam(4.5e-6, scale_by_batch=True)
    config.discriminator_optimizer = ""  # what it changes of `optimizer`: "learning_rate=1e-4,b1=0.0,b2=0.99"
    config.lpips = dict(vgg="", heads="")  # local files; "" downloads them to the cache folder
    config.resnet50 = ""  # likewise, of loss.logits_weight
    config.dino = ""  # likewise, of the "dino" discriminator
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val/psnr", "max"
    return config


def transformer() -> ConfigDict:
    """A whole stage-2 config: GPT2-medium, unconditional, to be changed by a config file."""
    config = run()
    config.vqgan = ""  # workdir of the first stage
    config.cond_vqgan = ""  # workdir of the VQGAN of an encoded condition; of several, with commas between
    config.cache_codes = False  # encode the data once (centre crops, mirrored too with data.flip), not at every step
    config.remap = False  # of the first stage's codes only those that the training pictures use; the others are removed
    config.codes = ""  # a folder that vqgan_jax.tools.encode wrote: read its codes in place of pictures
    config.model = ConfigDict(
        dict(
            transformer=dict(
                layers=24,
                heads=16,
                width=1024,
                block_size=0,  # 0: as many positions as the sequence needs
                prefix=0,  # condition tokens that see each other both ways; -1: all of them
                embed_dropout=0.0,
                residual_dropout=0.0,
                attention_dropout=0.0,
                **GPT2,
            ),
            condition=dict(name="none"),
            grid=(16, 16),
            order="row_major",
            shared_vocabulary=False,
            condition_dropout=0.0,  # share of the rows that train without condition; above 0 sampling can be guided
        )
    )
    config.data = data("folder")
    config.loss = dict(
        keep=1.0,
        label_smoothing=0.0,
        z_weight=0.0,  # of log(Z)^2: 1e-4 keeps logits from drifting
        permute_from="0",  # RAR: rows in random orders, all of them before this,
        permute_until="0",  # and none after this; "0" = never
        cca=dict(weight=0.0, beta=0.02),  # CCA: 300 to 1000 tunes `init_from` to be sampled without guidance
    )
    config.optimizer = adamw(4.5e-6, scale_by_batch=True)
    config.sampling = dict(temperature=1.0, top_k=100, top_p=1.0)  # of the pictures drawn during training
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val/nll", "min"
    return config


def condition_parts(condition: ConfigDict) -> list[ConfigDict]:
    """The parts of a joint condition; of another, itself."""
    joint = condition.name == "joint"
    return [part for name, part in condition.items() if name != "name"] if joint else [condition]


def check_reference(arg: ConfigDict) -> None:
    """Raises UserError where a config's argument asks for `reference` and for a piece that the original has not."""
    for name, own in {"quantizer": ("", "vq", "gumbel"), "discriminator": ("", "patchgan")}.items():
        if arg.reference and arg.get(name, "") not in own:
            raise UserError(f"{name}={arg[name]},reference: the reference has its own {name}; leave one of both out")


def reference(config: ConfigDict) -> ConfigDict:
    """Sets every oddity of the reference at once, on a config of either stage: the `reference` argument of configs.

    The README's table names each with its reason.
    """
    config.ema_decay = 0.0
    config.data.resize, config.data.flip = "bilinear_no_antialias", False
    restricted = config.data.classes == "restricted"
    if restricted:
        config.data.classes = "restricted_reference"
    plain = dict(scale_by_batch=True, clip_norm=0.0, schedule="constant", warmup="0")
    if "transformer" in config.model:
        config.optimizer = adamw(4.5e-6, b1=0.9, b2=0.95, weight_decay=0.01, **plain)
        config.loss.label_smoothing = 0.0
        config.model.shared_vocabulary = True
        condition = config.model.condition
        for part in condition_parts(condition):
            if part.name == "class" and restricted:
                part.classes = len(IMAGENET_GROUPS["restricted_reference"])
            if part.name == "coordinates":
                part.scheme = "raster"
            if part.name == "objects":
                part.trim = False
        return config
    config.optimizer = adam(4.5e-6, b1=0.5, b2=0.9, **plain)
    loss, quantizer = config.loss, config.model.quantizer
    loss.adaptive_epsilon, loss.adaptive_maximum = 1e-4, 1e4
    loss.schedule, loss.adversarial_ramp, loss.idle_discriminator_updates = "alternating", "0", True
    loss.discriminator_start, loss.lecam_weight, loss.augment = "100%", 0.0, ""
    loss.adaptive, loss.logits_weight, loss.perturbation.share = True, 0.0, 0.0
    config.discriminator_optimizer = ""
    judge = config.model.discriminator
    if judge.name != "patchgan":
        config.model.discriminator = patchgan()
        config.model.discriminator.enabled = judge.enabled
    config.model.discriminator.spectral_norm = False
    if quantizer.name in ("vq", "ema"):
        quantizer = config.model.quantizer = quantizers.vq(quantizer.codebook_size, quantizer.dim)
        quantizer.commitment_weight, quantizer.codebook_weight = 1.0, 0.25
    return config


def shrink_vqgan(config: ConfigDict) -> ConfigDict:
    """A full-size VQGAN as small as its kind allows: the same factor, input and quantizer, on pictures of four codes a
    side, narrow, without weights to download, and with its discriminator from the first step."""
    model = config.model
    ae, quantizer = model.autoencoder, model.quantizer
    levels = len(ae.multipliers)
    size = small_size(2 ** (levels - 1))
    attends = bool(ae.attention_resolutions)
    ae.resolution, ae.channels, ae.multipliers, ae.blocks = size, 32, (1,) * levels, 1
    ae.attention_resolutions = (size >> levels - 1,) if attends else ()
    if "levels" in quantizer:
        quantizer.levels = (3,) * min(len(quantizer.levels), 4)
    elif "bits" in quantizer:
        quantizer.bits = min(quantizer.bits, 6)
        quantizer.group_bits = min(quantizer.group_bits, quantizer.bits)
    else:
        quantizer.codebook_size, quantizer.dim = min(quantizer.codebook_size, 64), min(quantizer.dim, 16)
    ae.z_channels = quantizer.dim if "dim" in quantizer else 16
    if "input_dim" in quantizer:
        quantizer.input_dim = quantizer.dim
    if model.discriminator.name == "dino":  # which looks through weights
        model.discriminator = patchgan()
    model.discriminator.channels = 32 if model.discriminator.name == "blurpool" else 16
    config.loss.perceptual_weight, config.loss.logits_weight, config.loss.adversarial_start = 0.0, 0.0, "0"
    return _small_data(config, size)


def shrink_transformer(config: ConfigDict, factor: int) -> ConfigDict:
    """A full-size transformer as small as its kind allows, on codes of a small VQGAN of `factor` pixels a code."""
    gpt, size = config.model.transformer, small_size(factor)
    gpt.layers, gpt.heads, gpt.width, gpt.block_size = 2, 2, 32, 0
    config.model.grid = (size // factor, size // factor)
    return _small_data(config, size)


def small_size(factor: int) -> int:
    """Height and width in pixels of the pictures of a small model: four codes a side or more."""
    return max(32, 4 * factor)


def _small_data(config: ConfigDict, size: int) -> ConfigDict:
    data = config.data
    with data.ignore_type():  # of a size that is not square
        data.image_size = size
    data.resize_to, data.classes = 0, ""
    return config


def run_local(config: ConfigDict) -> ConfigDict:
    """Two steps on a laptop, to see that a config runs: the `runlocal` argument of every config."""
    config.steps, config.batch_size, config.accumulation, config.eval_examples = "2", 8, 1, 16
    config.log_every, config.eval_every, config.save_every, config.images_every = "1", "2", "2", "2"
    config.fid_every = "0"  # needs weights
    config.data.source, config.data.classes = "scenes", ""  # whose classes are others
    config.data.train_examples, config.data.val_examples = 32, 16
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    return config


def product(*axes: Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every combination, for a config's `sweep()`: product({"seed": (0, 1), "optimizer.learning_rate": (1e-3, 1e-4)}).

    Args:
      *axes: values by key, all of which are combined; or what `product` and `zipped` give, which is taken as it is.
    """
    choices = []
    for axis in axes:
        if isinstance(axis, Mapping):
            choices += [[{key: value} for value in values] for key, values in axis.items()]
        else:
            choices.append(list(axis))
    for parts in itertools.product(*choices):
        yield {key: value for part in parts for key, value in part.items()}


def zipped(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The first values of all keys, then the second ones, and so on. Raises ValueError where some have more."""
    for row in zip(*values.values(), strict=True):
        yield dict(zip(values, row, strict=True))
