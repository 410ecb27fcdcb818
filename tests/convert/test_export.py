"""Our models go out to the reference and come in again, bit for bit, or are refused by name."""

import dataclasses
import functools
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import reference as ref
from tests.convert.files import GOOD, assert_equal, assert_same_import, run
from vqgan_jax import pretrained
from vqgan_jax.conditioning import ClassLabelConfig, CoordinatesConfig, UnconditionalConfig
from vqgan_jax.config import GPT2, UserError
from vqgan_jax.convert import export
from vqgan_jax.models.autoencoder import AutoencoderConfig
from vqgan_jax.models.discriminators import BlurPoolConfig, PatchGAN, PatchGANConfig
from vqgan_jax.models.quantizers import EMAConfig
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.object_tokens import ObjectTokens
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.torch_files import open_tensors
from vqgan_jax.train.portable import read_stage
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig


@pytest.mark.parametrize("name", GOOD)
def test_export_and_import_again_is_bit_exact(name, tmp_path):
    run(f"checkpoint={ref.GOLDEN}/{name}.ckpt", f"out={tmp_path}/a")
    assert run(f"checkpoint={tmp_path}/a", f"out={tmp_path}/b.safetensors", "to=torch") == 0
    with ref.checkpoint(f"{name}.ckpt") as original, open_tensors(tmp_path / "b.safetensors") as exported:
        assert set(exported) == set(original)
        for key in set(original) - {"colorize"} - {k for k in original if k.endswith("num_batches_tracked")}:
            np.testing.assert_array_equal(exported[key], original[key], err_msg=key)
            assert exported.shape(key) == original.shape(key)
    assert run(f"checkpoint={tmp_path}/b.safetensors", f"out={tmp_path}/c") == 0
    assert_same_import(tmp_path / "a", tmp_path / "c")


def generator_of(config):
    """A generator's variables, made of noise."""
    random, model = np.random.RandomState(0), VQGAN(config)
    shapes = jax.eval_shape(lambda: model.init({"params": jax.random.key(0)}, jnp.zeros((1, 8, 8, 3))))
    return jax.tree.map(lambda x: 0.1 * random.standard_normal(x.shape).astype(np.float32), shapes)


@functools.cache
def actnorm_vqgan():
    """A VQGAN with an ActNorm discriminator that has learned beyond its start."""
    config = VQGANConfig(ref.autoencoder((1, 1), ()), ref.vq(), PatchGANConfig(16, 2, "actnorm", False), "image")
    generator = generator_of(config)["params"]
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    model = PatchGAN(config.discriminator)
    variables = jax.jit(model.init)(jax.random.key(2), images)
    _, started = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, images)
    params = jax.tree.map(lambda x: x + 0.1, variables["params"])
    arrays = {
        "params": {"generator": generator, "discriminator": params},
        "collections": {"discriminator": dict(started)},
    }
    return config, jax.tree.map(np.asarray, arrays), images


def test_actnorm_is_summed_on_export_and_equal_after_import(tmp_path):
    config, arrays, images = actnorm_vqgan()
    export.export_vqgan(tmp_path / "x.safetensors", export.Network(config, arrays))
    run(f"checkpoint={tmp_path}/x.safetensors", f"out={tmp_path}/out")
    tree, record = read_stage(tmp_path / "out")
    assert VQGANConfig.from_config(record["config"]["model"]).discriminator == config.discriminator
    model = PatchGAN(config.discriminator)
    apply = jax.jit(model.apply)
    logits = [
        apply({"params": a["params"]["discriminator"], **a["collections"]["discriminator"]}, images)
        for a in (arrays, tree)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
    stats = tree["collections"]["discriminator"]["batch_stats"]["norm_1"]
    assert stats["started"].dtype == bool and stats["started"]
    assert not tree["params"]["discriminator"]["norm_1"]["scale"].any()
    run(f"checkpoint={tmp_path}/out", f"out={tmp_path}/y.safetensors", "to=torch")
    first, second = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "y.safetensors")
    assert first["loss.discriminator.main.3.initialized"].dtype == np.uint8
    assert_equal(first, second)


@pytest.mark.parametrize("change", [PatchGANConfig(16, 2, "actnorm", True), BlurPoolConfig(32, 32, 1, False)])
def test_a_discriminator_that_the_reference_has_not_stays_out(change, tmp_path):
    config, arrays, _ = actnorm_vqgan()
    whole, without = (export.Network(c, arrays) for c in (config, dataclasses.replace(config, discriminator=change)))
    assert whole.discriminator == config.discriminator and without.discriminator is None
    export.export_vqgan(tmp_path / "x.safetensors", without)
    assert not any(name.startswith("loss.") for name in load_file(tmp_path / "x.safetensors"))
    assert "DummyLoss" in (tmp_path / "x.yaml").read_text()


def test_an_ema_codebook_is_exported_as_a_codebook(tmp_path):
    config = VQGANConfig(ref.autoencoder((1, 1), ()), EMAConfig(64, 16, 0.25, 0.97, 0.1), None, "image")
    variables = generator_of(config)
    arrays = {
        "params": {"generator": variables["params"]},
        "collections": {"generator": {"codebook": variables["codebook"]}},
    }
    export.export_vqgan(tmp_path / "x.safetensors", export.Network(config, arrays))
    images = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3), minval=-1)
    expected = jax.jit(VQGAN(config).apply)(variables, images).reconstruction
    found = pretrained.load_vqgan(tmp_path / "x.safetensors").reconstruct(images)
    np.testing.assert_allclose(found, expected, atol=1e-5)


FIRST = VQGANConfig(AutoencoderConfig(3, 3, 32, 32, (1, 1), 1, 1, (), True, 32, 0.0, 1), ref.vq(), None, "image")
OBJECTS = ObjectTokens("centres", 3, 64, 5, True, ("group",), False)
CONDITIONS = {
    "none": (UnconditionalConfig(), "zcurve", 0),
    "class": (ClassLabelConfig(7), "spiral_out", 0),
    "coordinates": (CoordinatesConfig(64, 2, "raster"), "row_major", 0),
    "objects": (OBJECTS, "row_major", 8),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_transformers_of_every_condition_go_out_and_in(kind, tmp_path):
    condition, order, prefix = CONDITIONS[kind]
    config = TransformerConfig(
        ArchitectureConfig(2, 2, 16, 0, prefix, 0.0, 0.1, 0.0, **GPT2), condition, (4, 4), order, True, 0.0
    )
    model = ImageTransformer(config, Tokenizer(VQGAN(FIRST)))
    random = np.random.RandomState(3)
    params = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), _unboxed(model))
    stages = {"first_stage": export.Network(FIRST, {"params": {"generator": generator_of(FIRST)["params"]}})}
    export.export_transformer(tmp_path / "x.safetensors", model, params, stages)
    found = pretrained.open_transformer(tmp_path / "x.safetensors", key="path")
    block_size = model.condition.length + 15
    assert found.model.config.transformer == ArchitectureConfig(2, 2, 16, block_size, prefix, 0.0, 0.1, 0.0, **GPT2)
    assert found.model.config.condition == condition
    assert (found.model.config.order, found.model.config.grid) == (order, (4, 4))
    assert_equal(found.params, params)
    if order != "row_major":
        with open_tensors(tmp_path / "x.safetensors") as exported:
            forward, backward = (exported[f"permuter.{way}_shuffle_idx"] for way in ("forward", "backward"))
        np.testing.assert_array_equal(forward[backward], np.arange(16))


def _unboxed(model):
    return nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0))))


def test_what_the_reference_cannot_say_is_not_exported(tmp_path):
    config, arrays, _ = actnorm_vqgan()
    for name, value in (("stem", 2), ("decoder_extra_blocks", 0), ("mid_attention", False)):
        changed = {**vars(config.autoencoder), name: value}
        other = VQGANConfig(AutoencoderConfig(**changed), config.quantizer, None, "image")
        with pytest.raises(UserError, match=name):
            export.export_vqgan(tmp_path / "x.safetensors", export.Network(other, arrays))
    architecture = ArchitectureConfig(2, 2, 16, 0, 0, 0.0, 0.0, 0.0, **GPT2)
    own = TransformerConfig(architecture, ClassLabelConfig(7), (4, 4), "row_major", False, 0.0)
    with pytest.raises(UserError, match="shared_vocabulary"):
        export.export_transformer(tmp_path / "x.safetensors", ImageTransformer(own, Tokenizer(VQGAN(FIRST))), {}, {})
    assert not list(tmp_path.iterdir())


def test_memory_stays_far_below_the_files_size(tmp_path, capsys):
    config = TransformerConfig(
        ArchitectureConfig(6, 4, 256, 0, 0, 0.0, 0.0, 0.0, **GPT2), ClassLabelConfig(7), (4, 4), "row_major", True, 0.0
    )
    model = ImageTransformer(config, Tokenizer(VQGAN(FIRST)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), _unboxed(model))
    stages = {"first_stage": export.Network(FIRST, {"params": {"generator": generator_of(FIRST)["params"]}})}
    path = tmp_path / "x.safetensors"
    export.export_transformer(path, model, params, stages)
    run(f"checkpoint={path}", f"out={tmp_path}/warm")  # what tracing keeps is no memory of the import
    tracemalloc.start()
    try:
        run(f"checkpoint={path}", f"out={tmp_path}/out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * path.stat().st_size
