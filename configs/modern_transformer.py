"""Stage 2 as of 2026: class-conditional ImageNet at 256 pixels, a raster-order Llama on cached codes of f16.

    python train_transformer.py --config=configs/modern_transformer.py:L --config.vqgan=gs://bucket/tokenizer \\
        --config.data.path=/imagenet --workdir=gs://bucket/L
    python train_transformer.py --config=configs/modern_transformer.py:speedrun --config.vqgan=runs/x --workdir=runs/y
    python -m vqgan_jax.tools.aot --config=configs/modern_transformer.py:L --first=configs/modern_vqgan.py \\
        --topology=v5e:16x16

Arguments: `B`, `L` (or nothing), `XL`, `XXL`, `3B`; `adaln` blocks modulated by the class; `gpt2` the original's block
and learned positions; `speedrun` (with `form=gpu` its larger one) the recipe on model size, data and steps of
configs/speedrun_transformer.py, both blocks with equal parameters; `runlocal` two steps. The first stage is that of
configs/modern_vqgan.py or LlamaGen's. The target of L is a gFID of 1.4 or better (50,000 guided samples, ADM's ImageNet
batch): raster models reach 1.50 with 177M and 1.42 with 318M (AliTok), 1.70 with 461M (RAR), the original 15.78 with
1.4B. Why each piece, in gFID:

- Shapes, heads and counts of LlamaGen (arXiv 2406.06525: 5.46, 3.80, 3.39, 3.09, 3.05 from B to 3B). RMSNorm, SwiGLU,
  2-D rotary positions and QK-norm as AliTok (1.50 at 177M).
- RAR's order (arXiv 2411.00776): random for half the run, raster from three quarters on, and each token is told the
  place of the next. Raster alone 3.08, random alone 3.01, annealed 2.18; sampling stays as it was. RAR's own positions
  are learned.
- RAR's optimizer and run: AdamW, betas (.9, .96), decay 0.03, clipping at 1, a quarter of warm-up to 4e-4, a cosine to
  1e-5, 400 epochs of batch 2048, residual dropout 0.1. It drops 0.1 of its attention weights too; here none, as in
  LlamaGen, for the fused kernels take none.
- The class is one token. RAR-L and IBQ (342M, 2.88, where LlamaGen-L has 3.80) modulate by AdaLN; AliTok, by its size,
  does not; each has a tokenizer of its own, so no figure isolates it. `adaln` adds 6 width^2 a layer (L has 494M then)
  and nearly no time, as it is computed once a picture.
- The condition is dropped in 0.1 of the rows, for guidance: RAR-L 6.72 to 1.70, LlamaGen-3B 9.38 to 2.18. The schedule
  is RAR's power-cosine, with its scale, power and temperature of the nearest size; they do not transfer, so sweep them
  (evaluate.py --sweep). From the full distribution: top-k and top-p cost FID (LlamaGen, IBQ).
- Codes of the centre crop and its mirror image, made once: RandAR found them better than ten crops; encoding in the
  step would add 26 % to L's FLOPs.
- No EMA: RAR's figures are without, and it saves 4 bytes a parameter. `--config.ema_decay=0.9999` averages.
- Without guidance, at half the cost of a sample (CCA, arXiv 2410.09347: LlamaGen-L 3.43 after one epoch):
  `--config=configs/finetune.py:RUN,cca`.

Cost in chip-hours at best, by `tools.aot`, never run (benchmarks/aot.md): B 242 on v5e:8x8, L 813 on v5e:16x16, XL 523
on v5p:4x4x4, XXL 909 and 3B 1477 on v5p:4x4x8.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common, speedrun_transformer
from vqgan_jax.config import choose, parse_arg

FACTOR = 16  # pixels a code


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, LlamaGen's by shape, and what its run needs.

    `parameters` are LlamaGen's, of 16384 codes and 1000 classes with the null one; the run's model has a row of `width`
    more for each of the 257 places that random orders name, and twice a head's width a layer for QK-norm.
    """

    parameters: int
    layers: int
    heads: int
    width: int
    guidance: float  # this and the next two: RAR's of its own model of about this size
    power: float
    temperature: float = 1.02
    fsdp: int = 1


SIZES = {
    "B": Size(110_888_448, 12, 12, 768, 16.0, 2.75, 1.0),
    "L": Size(342_910_976, 24, 16, 1024, 15.5, 2.5),
    "XL": Size(774_699_520, 36, 20, 1280, 6.9, 1.5, fsdp=16),
    "XXL": Size(1_410_972_672, 48, 24, 1536, 8.0, 1.2, fsdp=16),
    "3B": Size(3_096_659_200, 24, 32, 3200, 8.0, 1.2, fsdp=16),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, name="L", adaln=False, gpt2=False, form="cpu", runlocal=False)
    known = SIZES | {"speedrun": None}
    size = choose("--config=configs/modern_transformer.py", arg.name, known)
    config = speedrun(arg) if size is None else imagenet(size)
    gpt = config.model.transformer
    if not arg.gpt2:
        gpt.block, gpt.positions, gpt.qk_norm = "llama", "rope", True
    gpt.adaln, gpt.target_positions = arg.adaln, True
    config.model.condition_dropout = 0.1
    config.loss.permute_from, config.loss.permute_until = "50%", "75%"
    config.sampling = dict(top_k=0, top_p=1.0, schedule="power-cosine") | guidance(size)
    if arg.runlocal:
        small = config if size is None else common.shrink_transformer(config, FACTOR)
        return common.run_local(small)
    return config


def imagenet(size: Size) -> ConfigDict:
    """The full-size run: RAR's, on codes that are cached."""
    config = common.transformer()
    config.steps, config.batch_size, config.dtype = "400 epochs", 2048, "bfloat16"
    config.mesh.fsdp, config.ema_decay = size.fsdp, 0.0
    config.eval_every, config.save_every, config.images_every, config.eval_examples = "1%", "1%", "2%", 10_000
    config.fid_every, config.fid_samples = "5%", 10_000
    config.data = common.data("imagenet")
    config.data.image_size, config.data.crop, config.data.flip = 256, "center", True
    config.cache_codes = True
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width = size.layers, size.heads, size.width
    gpt.embed_dropout = gpt.residual_dropout = 0.1
    config.model.condition = ConfigDict(dict(name="class", classes=1000))
    config.optimizer = common.adamw(4e-4, b2=0.96, weight_decay=0.03, warmup="25%", final_share=0.025)
    return config


def speedrun(arg: ConfigDict) -> ConfigDict:
    """The recipe on the speedrun's model, data, batch, steps and learning rate; an MLP as narrow as makes a Llama's
    block as large as GPT-2's."""
    config = speedrun_transformer.get_config(f"form={arg.form}")
    gpt = config.model.transformer
    if not arg.gpt2:
        gpt.mlp_width = round(8 * gpt.width / 3 / 8) * 8
    config.optimizer = common.adamw(config.optimizer.learning_rate)
    return config


def guidance(size: Size | None) -> dict[str, float]:
    """What the sampler's schedule needs; of a small model on few pixels a gentle one."""
    if size is None:
        return dict(temperature=1.0, guidance=3.0, power=1.0)
    return dict(temperature=size.temperature, guidance=size.guidance, power=size.power)
