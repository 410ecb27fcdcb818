"""configs/modern_vqgan.py: every argument makes a model and a step, at the cost that the docstring states."""

import re
import urllib.request

import flax.linen as nn
import jax
import numpy as np
import pytest

import train_vqgan
from configs import modern_vqgan, speedrun_vqgan
from vqgan_jax.config import UserError
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.train import roofline
from vqgan_jax.train.recipe import frozen_networks, vqgan_recipe
from vqgan_jax.train.setup import Durations


def teraflops(config) -> float:
    """TFLOP an image of the traced train step."""
    config.batch_size = 1
    recipe = vqgan_recipe(config, VQGAN(VQGANConfig.from_config(config.model)), Durations(config, 1_281_167))
    state = jax.eval_shape(lambda key: nn.unbox(recipe.init(key)), jax.random.key(0))
    frozen = {name: jax.eval_shape(init, jax.random.key(0)) for name, init in frozen_networks(config).items()}
    size = config.data.image_size
    batch = {"image": jax.ShapeDtypeStruct((1, size, size, 3), np.float32)}
    return roofline.count_flops(roofline.trace_plain(recipe.step, state, batch, frozen)) / 1e12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arg", "networks", "name"),
    [
        pytest.param("", {"resnet50"}, "(train/roofline.py):", id="default"),
        ("perceptual=lpips", {"lpips"}, "lpips"),
        ("discriminator=dino", {"resnet50", "dino"}, "dino"),
        ("blocks=4,perturb", {"resnet50"}, "blocks=4"),
    ],
)
def test_each_form_costs_what_the_docstring_says(arg, networks, name):
    config = modern_vqgan.get_config(arg)
    assert set(frozen_networks(config)) == networks
    model = VQGANConfig.from_config(config.model)
    assert model.factor == 16 and model.quantizer.codebook_size == 16384 and not model.autoencoder.attention_resolutions
    stated = float(re.search(re.escape(name) + r" (\d\.\d+)", modern_vqgan.__doc__.replace("\n", " "))[1])
    assert abs(teraflops(config) - stated) < 0.006


def test_the_speedrun_differs_in_the_recipe_alone():
    for form in ("cpu", "gpu"):
        ours = modern_vqgan.get_config(f"speedrun,form={form}")
        theirs = speedrun_vqgan.get_config(f"form={form}")
        assert not frozen_networks(ours)
        for key in ("steps", "batch_size", "data", "dtype"):
            assert ours[key] == theirs[key]
        for key in ("channels", "multipliers", "stem", "resolution", "blocks"):
            assert ours.model.autoencoder[key] == theirs.model.autoencoder[key]
        assert ours.model.quantizer.codebook_size == theirs.model.quantizer.codebook_size
        assert ours.optimizer.learning_rate == theirs.optimizer.learning_rate
    for arg, text in (("perceptual=vgg", "perceptual.*there are"), ("speedrn", "did you mean 'speedrun'")):
        with pytest.raises(UserError, match=text):
            modern_vqgan.get_config(arg)


@pytest.mark.parametrize(
    ("arg", "flag", "address"),
    [("", "--config.resnet50=FILE", "resnet50-0676ba61.pth"), ("discriminator=dino,perceptual=lpips", "", "")],
)
def test_weights_that_cannot_be_had_are_one_line(arg, flag, address, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path))
    config = modern_vqgan.get_config(arg)
    if not flag:  # LPIPS is asked first; without it the discriminator's network
        config.loss.perceptual_weight, flag, address = 0.0, "--config.dino=FILE", "dino_deitsmall16_pretrain.pth"
    with pytest.raises(UserError) as caught:
        train_vqgan.load_frozen(config)
    assert flag in str(caught.value) and address in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("arg", ["speedrun,discriminator=dino", "speedrun,perceptual=lpips", "form=gpu"])
def test_an_argument_of_the_other_size_is_an_error(arg):
    with pytest.raises(UserError, match=arg.rpartition(",")[2].partition("=")[0]):
        modern_vqgan.get_config(arg)


@pytest.mark.parametrize(
    "arg",
    [
        "runlocal",
        pytest.param("perturb,blocks=1,runlocal", marks=pytest.mark.slow),
        pytest.param("discriminator=dino,runlocal", marks=pytest.mark.slow),
    ],
)
def test_runlocal_is_small_and_asks_for_nothing(arg):
    config = modern_vqgan.get_config(arg)
    assert not frozen_networks(config) and config.data.source == "scenes" and config.steps == "2"
    assert config.fid_every == "0" and teraflops(config) < 0.01
