"""Small transformers with parameters large enough for logits that differ."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests import reference as ref
from vqgan_jax.conditioning import ClassLabelConfig, EncodedImageConfig
from vqgan_jax.config import GPT2
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig

DROPOUTS = ("embed_dropout", "residual_dropout", "attention_dropout")


def random_transformer(
    layers=2,
    width=32,
    grid=(6, 6),
    dropout=0.1,
    classes=10,
    heads=4,
    *,
    spatial=False,
    prefix=0,
    dtype=jnp.float32,
    order="row_major",
    **architecture,
):
    """A transformer that knows the null condition, and its stacked parameters; its condition is a class, or as many
    codes as the picture has (spatial). `architecture`: what differs from a GPT-2."""
    config = TransformerConfig(
        ArchitectureConfig(layers, heads, width, 0, prefix, **dict.fromkeys(DROPOUTS, 0.0) | GPT2 | architecture),
        EncodedImageConfig("depth") if spatial else ClassLabelConfig(classes),
        grid,
        order,
        False,
        dropout,
    )
    stages = {"depth": Tokenizer(VQGAN(ref.DEPTH_STAGE_TINY))} if spatial else {}
    model = ImageTransformer(config, Tokenizer(VQGAN(ref.FIRST_STAGE_TINY)), stages, dtype=dtype)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0)))
    key = jax.random.key(1)
    return model, jax.tree.map(lambda x: 5 * x + 0.1 * jax.random.normal(key, x.shape), params)
