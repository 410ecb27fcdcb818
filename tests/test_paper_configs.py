"""The paper's rows: parameters counted by the reference's layout, apart from our modules; known figures among them."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import paper_transformer, paper_vqgan
from tests.test_config import load
from vqgan_jax.config import UserError
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

CONFIGS = Path(__file__).parent.parent / "configs"
BLOCKS = 2  # residual blocks a level


def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return inputs * outputs * kernel**2 + outputs


def residual(inputs: int, outputs: int) -> int:
    skip = conv(inputs, outputs, 1) if inputs != outputs else 0
    return 2 * inputs + conv(inputs, outputs) + 2 * outputs + conv(outputs, outputs) + skip


def attention(width: int) -> int:
    return 2 * width + 4 * conv(width, width, 1)


def level(inputs: int, width: int, blocks: int, attends: bool) -> int:
    total = residual(inputs, width) + (blocks - 1) * residual(width, width)
    return total + attends * blocks * attention(width)


def encoder(row: paper_vqgan.Row) -> int:
    width, resolution = 128, row.size
    total = conv(row.channels, width)
    for multiplier in row.multipliers:
        total += level(width, 128 * multiplier, BLOCKS, resolution in row.attention)
        width, resolution = 128 * multiplier, resolution // 2
    for multiplier in row.multipliers[:-1]:
        total += conv(128 * multiplier, 128 * multiplier)
    return total + 2 * residual(width, width) + attention(width) + 2 * width + conv(width, row.dim)


def decoder(row: paper_vqgan.Row) -> int:
    width, resolution = 128 * row.multipliers[-1], row.size // row.factor
    total = conv(row.dim, width) + 2 * residual(width, width) + attention(width)
    for multiplier in reversed(row.multipliers):
        total += level(width, 128 * multiplier, BLOCKS + 1, resolution in row.attention)
        width, resolution = 128 * multiplier, 2 * resolution
    for multiplier in row.multipliers[1:]:
        total += conv(128 * multiplier, 128 * multiplier)
    return total + 2 * width + conv(width, row.channels)


def vqgan(row: paper_vqgan.Row) -> int:
    logits = conv(row.dim, row.codes, 1) if row.quantizer == "gumbel" else 0
    return encoder(row) + decoder(row) + 2 * conv(row.dim, row.dim, 1) + row.codes * row.dim + logits


def gpt(row: paper_transformer.Row) -> int:
    condition = dict(row.condition)
    tokens = {"none": 1, "class": condition.get("classes"), "objects": condition.get("vocab")}
    tokens |= {"image": row.cond and paper_vqgan.ROWS[row.cond].codes, "coordinates": condition.get("codes")}
    vocabulary, d = max(paper_vqgan.ROWS[row.first].codes, tokens[condition["name"]]), row.width
    return 2 * vocabulary * d + row.positions * d + row.layers * (12 * d * d + 13 * d) + 2 * d


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_count_gives_the_known_integers():
    f16, f8 = paper_vqgan.ROWS["imagenet_f16_1024"], paper_vqgan.ROWS["openimages_f8_gumbel"]
    assert (encoder(f16), decoder(f16)) == (29_298_176, 42_449_795)
    assert (encoder(f8), decoder(f8)) == (26_345_728, 38_316_163)


@pytest.mark.parametrize("name", paper_vqgan.ROWS)
def test_a_first_stage_has_the_parameters_of_the_reference(name):
    row = paper_vqgan.ROWS[name]
    config = load(CONFIGS / "paper_vqgan.py", f"{name},reference")
    model = VQGAN(VQGANConfig.from_config(config.model))
    assert model.config.factor == row.factor
    images = jnp.zeros((1, row.size, row.size, row.channels))
    params = jax.eval_shape(lambda: model.init({"params": jax.random.key(0), "quantizer": jax.random.key(1)}, images))
    assert count(params["params"]) == row.parameters == vqgan(row)


@pytest.mark.parametrize("name", paper_transformer.ROWS)
def test_a_transformer_has_the_parameters_of_the_reference(name):
    row = paper_transformer.ROWS[name]
    config = load(CONFIGS / "paper_transformer.py", f"{name},reference")
    stages = [
        Tokenizer(VQGAN(VQGANConfig.from_config(load(CONFIGS / "paper_vqgan.py", stage).model)))
        for stage in (row.first, row.cond)
        if stage
    ]
    model = ImageTransformer(TransformerConfig.from_config(config.model), *stages)
    model.check_size(config.data.image_size)
    assert count(jax.eval_shape(model.init, jax.random.key(0))) == row.parameters == gpt(row)


@pytest.mark.parametrize("file", ["paper_vqgan.py", "paper_transformer.py"])
def test_an_unknown_row_is_named(file):
    with pytest.raises(UserError, match="imagenett.*imagenet"):
        load(CONFIGS / file, "imagenett")
