"""A small sweep on the embedded scenes: two tokenizers, and on the codes of each two transformers, in some six minutes.

    python launch/sweep.py --config=configs/demo_sweep.py --out=runs/sweep

Each tokenizer is trained once and its codes are written once, whatever number of trials builds on them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs import common


def chain(arg: str | None = None) -> Mapping[str, Sequence[str]]:
    """The stages of a trial: the words behind `python`."""
    transformer = "--config=configs/demo_transformer.py"
    few = ("--config.eval_every=50%", "--config.save_every=50%", "--config.images_every=100%")
    return {
        "tokenizer": (
            *("train_vqgan.py", "--config=configs/demo_vqgan.py", "--workdir={out}", "--config.steps=200"),
            *("--config.log_every=10", "--config.eval_examples=128", "--config.optimizer.warmup=20", *few),
        ),
        "codes": (
            *("-m", "vqgan_jax.tools.encode", transformer, "--config.vqgan={tokenizer}", "--out={out}"),
            *("--config.data.train_examples=2048", "--config.data.val_examples=128"),
        ),
        "transformer": (
            *("train_transformer.py", transformer, "--config.vqgan={tokenizer}", "--config.codes={codes}"),
            *("--workdir={out}", "--config.steps=100", "--config.log_every=10", "--config.optimizer.warmup=20"),
            *("--config.data.train_examples=2048", "--config.data.val_examples=128", *few),
        ),
        # With weights of Inception at hand: "--samples=5000", "--preset=adm" for FID.
        "scores": ("evaluate.py", "--workdir={transformer}", "--out={out}.json", "--examples=128", "--samples=0"),
    }


def sweep() -> Iterator[dict[str, Any]]:
    """Sizes of both stages."""
    return common.product(
        {"tokenizer.model.quantizer.codebook_size": (64, 256), "transformer.model.transformer.layers": (1, 3)}
    )
