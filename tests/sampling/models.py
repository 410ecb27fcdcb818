"""Small transformers with parameters large enough for logits that differ."""

import flax.linen as nn
import jax

from tests import reference as ref
from vqgan_jax.conditioning import ClassLabelConfig
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig


def random_transformer(layers=2, width=32, grid=(6, 6), dropout=0.1, classes=10, heads=4):
    """A class-conditional transformer that knows the null condition, and its stacked parameters."""
    config = TransformerConfig(
        ArchitectureConfig(layers, heads, width, 0, 0, 0.0, 0.0, 0.0),
        ClassLabelConfig(classes),
        grid,
        "row_major",
        False,
        dropout,
    )
    model = ImageTransformer(config, Tokenizer(VQGAN(ref.FIRST_STAGE_TINY)))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0)))
    key = jax.random.key(1)
    return model, jax.tree.map(lambda x: 5 * x + 0.1 * jax.random.normal(key, x.shape), params)
