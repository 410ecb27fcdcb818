"""The paper's rows: parameters counted by the reference's layout, apart from our modules; known figures among them."""

import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import train_transformer
import train_vqgan
from configs import paper_transformer, paper_vqgan
from tests.test_config import load
from vqgan_jax import pretrained
from vqgan_jax.config import UserError
from vqgan_jax.data import scenes
from vqgan_jax.data.tables import IMAGENET_GROUPS
from vqgan_jax.data.transforms import Transform
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer, by_input_key
from vqgan_jax.train import setup
from vqgan_jax.train.recipe import transformer_recipe, uses_lpips, vqgan_recipe
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


@pytest.mark.parametrize("quantizer", ["fsq", "lfq", "bsq", "low_dim", "ema", "simvq", "ibq", "gumbel"])
@pytest.mark.parametrize("discriminator", ["blurpool", "dino"])
def test_a_row_takes_other_pieces(quantizer, discriminator):
    config = paper_vqgan.get_config(f"imagenet_f16_1024,quantizer={quantizer},discriminator={discriminator}")
    made = VQGANConfig.from_config(config.model)
    assert config.model.discriminator.name == discriminator
    assert made.quantizer.codebook_size == (1000 if quantizer == "fsq" else 1024)


@pytest.mark.parametrize(
    ("config", "piece"),
    [("paper_vqgan", "quantizer=fsq"), ("paper_vqgan", "discriminator=blurpool"), ("demo_vqgan", "quantizer=ema")],
)
def test_the_reference_takes_no_other_piece(config, piece):
    row = "imagenet_f16_1024," if config == "paper_vqgan" else ""
    with pytest.raises(UserError, match=f"{piece},reference: the reference has its own"):
        load(CONFIGS / f"{config}.py", f"{row}{piece},reference")


@pytest.mark.parametrize("name", paper_transformer.ROWS)
def test_a_transformer_has_the_parameters_of_the_reference(name):
    row = paper_transformer.ROWS[name]
    config = load(CONFIGS / "paper_transformer.py", f"{name},reference")
    stages = [
        Tokenizer(VQGAN(VQGANConfig.from_config(load(CONFIGS / "paper_vqgan.py", stage).model)))
        for stage in (row.first, row.cond)
        if stage
    ]
    model = ImageTransformer(TransformerConfig.from_config(config.model), stages[0], by_input_key(stages[1:]))
    model.check_size(config.data.image_size)
    assert count(jax.eval_shape(model.init, jax.random.key(0))) == row.parameters == gpt(row)


def test_table_8_is_complete():
    """Layers, width, codes, positions and f by row; FacesHQ f1 alone has no VQGAN."""
    table = {
        "restricted_imagenet": (12, 768, 768, 512, 16),
        "class_restricted_imagenet": (18, 768, 768, 257, 16),
        "depth_restricted": (14, 1024, 1024, 512, 16),
        "depth_restricted_v2": (24, 1024, 1024, 512, 16),
        "imagenet": (24, 1024, 1024, 256, 16),
        "class_imagenet": (24, 1024, 1024, 257, 16),
        "class_imagenet_big": (48, 1536, 16384, 257, 16),
        "edges_imagenet": (24, 1024, 1024, 512, 8),
        "super_resolution": (12, 1024, 1024, 512, 8),
        "sflckr_f4": (24, 1024, 1024, 512, 4),
        "sflckr": (24, 1024, 1024, 512, 16),
        "sflckr_f32": (24, 1024, 1024, 512, 32),
        "faceshq_f2": (24, 1024, 1024, 512, 2),
        "faceshq_f4": (24, 1024, 1024, 512, 4),
        "faceshq_f8": (24, 1024, 1024, 512, 8),
        "faceshq": (24, 1024, 1024, 512, 16),
        "ffhq": (28, 1024, 1024, 256, 16),
        "ffhq_big": (24, 1664, 1024, 256, 16),
        "celebahq": (28, 1024, 1024, 256, 16),
        "celebahq_big": (24, 1664, 1024, 256, 16),
        "coco": (32, 1280, 8192, 512, 16),
        "coco_v1": (36, 1024, 4096, 512, 16),
        "ade20k": (28, 1024, 4096, 512, 16),
        "pose_deepfashion": (18, 768, 1024, 340, 16),
        "lsun_churches": (24, 1024, 1024, 256, 16),
        "cifar10": (24, 1024, 1024, 256, 2),
    }
    for name, figures in table.items():
        row = paper_transformer.ROWS[name]
        first = paper_vqgan.ROWS[row.first]
        assert (row.layers, row.width, first.codes, row.positions, first.factor) == figures, name
    assert {name for name, row in paper_transformer.ROWS.items() if row.dropout} == {
        "ade20k",
        "coco_v1",
        "coco_scenes",
        "open_images_scenes",
    }


@pytest.mark.parametrize(("name", "source", "area"), [("coco", "coco", 1e-5), ("open_images", "open_images", 1e-4)])
def test_scenes_show_the_model_all_the_objects_it_has_room_for(name, source, area):
    config = load(CONFIGS / "paper_transformer.py", f"{name}_scenes")
    assert config.data.max_boxes == config.model.condition.max_objects == 30
    assert (config.data.source, config.data.min_objects, config.data.min_box_area) == (source, 2, area)


def test_depth_to_image_of_restricted_imagenet():
    """Of both sizes; the smaller one is that of the published NLL."""
    for name in ("depth_restricted", "depth_restricted_v2"):
        config = load(CONFIGS / "paper_transformer.py", name)
        assert (config.data.source, config.data.classes) == ("imagenet_depth", "restricted")
    rows = paper_transformer.ROWS
    assert "4.70" in rows["depth_restricted"].published and not rows["depth_restricted_v2"].published
    assert load(CONFIGS / "paper_transformer.py", "depth_imagenet").data.classes == ""


def test_the_reference_leaves_out_the_last_class_of_each_range():
    ours, theirs = (
        load(CONFIGS / "paper_transformer.py", f"class_restricted_imagenet{arg}") for arg in ("", ",reference")
    )
    for config, name in ((ours, "restricted"), (theirs, "restricted_reference")):
        assert config.data.classes == name and config.model.condition.classes == len(IMAGENET_GROUPS[name])
    stage = load(CONFIGS / "paper_vqgan.py", "restricted_imagenet,reference")
    assert stage.data.classes == "restricted_reference"


def abstract_step(recipe, batch, frozen):
    """Traces a step of a fresh state, which it returns."""
    state = nn.unbox(jax.eval_shape(recipe.init, jax.random.key(0)))
    after, metrics = jax.eval_shape(recipe.step, state, batch, frozen)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert "skipped" in metrics
    return state


def abstract_batch(config, keys):
    """What the row's transform makes of a scene, as many times as there are rows."""
    transform = Transform.from_config(config.data, keys=keys, classes=len(scenes.CLASSES), train=True)
    size = config.data.image_size
    row = transform(scenes.render(0, 1, size, size), np.random.default_rng(0))
    return {key: jax.ShapeDtypeStruct((config.batch_size, *value.shape), value.dtype) for key, value in row.items()}


def local_stage(name: str) -> Tokenizer:
    """A first stage's `runlocal`."""
    return Tokenizer(VQGAN(VQGANConfig.from_config(load(CONFIGS / "paper_vqgan.py", f"{name},runlocal").model)))


def abstract_variables(tokenizer: Tokenizer):
    ae = tokenizer.config.autoencoder
    images = jax.ShapeDtypeStruct((1, ae.resolution, ae.resolution, ae.in_channels), jnp.float32)
    keys = {"params": jax.random.key(0), "quantizer": jax.random.key(1)}
    return jax.eval_shape(lambda x: nn.unbox(tokenizer.model.init(keys, x)), images)


def test_runlocal_of_every_first_stage_is_small_and_steps():
    """A step is traced of one of each kind: tracing all takes a minute, and the factor changes no more than shapes."""
    traced = set()
    for name, row in paper_vqgan.ROWS.items():
        config = load(CONFIGS / "paper_vqgan.py", f"{name},runlocal")
        model = VQGAN(VQGANConfig.from_config(config.model))
        assert model.config.factor == row.factor and model.config.input_key == row.key, name
        assert type(model.config.quantizer).__name__.lower().startswith(row.quantizer)
        ae = model.config.autoencoder
        assert ae.channels * max(ae.multipliers) == 32 and ae.blocks == 1 and ae.resolution <= 128, name
        assert not uses_lpips(config) and config.data.source == "scenes", name
        batch = abstract_batch(config, (row.key,))
        kind = (row.quantizer, min(row.channels, 4), row.discriminator_layers)
        if kind not in traced:
            state = abstract_step(vqgan_recipe(config, model, setup.Durations(config, 32)), batch, {})
            assert count(state.params["generator"]) < 1_000_000
        traced.add(kind)


def test_runlocal_of_every_transformer_is_small_and_steps():
    """A step is traced of one of each kind of condition."""
    traced = set()
    for name, row in paper_transformer.ROWS.items():
        config = load(CONFIGS / "paper_transformer.py", f"{name},runlocal")
        first, cond = local_stage(row.first), [local_stage(row.cond)] if row.cond else []
        model = ImageTransformer(TransformerConfig.from_config(config.model), first, by_input_key(cond))
        model.check_size(config.data.image_size)
        assert config.model.condition == ConfigDict(dict(row.condition)), name
        assert model.condition.labels == 0 or model.condition.labels >= len(scenes.CLASSES), name
        assert model.gpt.block_size < 600 and model.gpt.width == 32 and config.data.source == "scenes", name
        batch = abstract_batch(config, ("image", *model.condition.keys))
        if row.condition["name"] not in traced:
            frozen = {f"cond/{stage.config.input_key}": abstract_variables(stage) for stage in cond}
            frozen["first_stage"] = abstract_variables(first)
            abstract_step(transformer_recipe(config, model, setup.Durations(config, 32)), batch, frozen)
        traced.add(row.condition["name"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class_cifar10", "edges_imagenet", "coco_scenes"])
def test_runlocal_trains_both_stages_and_samples(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    row = paper_transformer.ROWS[name]
    config = load(CONFIGS / "paper_transformer.py", f"{name},runlocal")
    for key, stage in (("vqgan", row.first), ("cond_vqgan", row.cond)):
        if stage:
            config[key] = str(tmp_path / stage)
            train_vqgan.train(load(CONFIGS / "paper_vqgan.py", f"{stage},runlocal"), config[key])
    state = train_transformer.train(config, str(tmp_path / "run"))
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert list((tmp_path / "run" / "images").rglob("*samples*.png"))
    trained = pretrained.open_transformer(tmp_path / "run", key="--workdir")
    assert set(trained.frozen) == {"first_stage", *(f"cond/{key}" for key in trained.stages.cond)}


@pytest.mark.parametrize("file", ["paper_vqgan.py", "paper_transformer.py"])
def test_an_unknown_row_is_named(file):
    with pytest.raises(UserError, match="imagenett.*imagenet"):
        load(CONFIGS / file, "imagenett")
