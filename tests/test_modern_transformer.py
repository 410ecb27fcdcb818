"""configs/modern_transformer.py: LlamaGen's sizes to a parameter, and every argument makes a model and a step."""

import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import modern_transformer, modern_vqgan, speedrun_transformer, speedrun_vqgan
from vqgan_jax.config import UserError
from vqgan_jax.sampling.strategies import Strategy, guidance_scale
from vqgan_jax.tools.programs import build_transformer
from vqgan_jax.train.recipe import transformer_recipe
from vqgan_jax.train.setup import Durations

IMAGENET = 1_281_167


@functools.cache
def first_stage():
    return modern_vqgan.get_config("imagenet").model


def parameters(config) -> int:
    model, _ = build_transformer(config, [first_stage()])
    shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0))))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", modern_transformer.SIZES)
def test_the_sizes_are_llamagens_to_a_parameter(name):
    size = modern_transformer.SIZES[name]
    config = modern_transformer.get_config(name)
    places, norms = 257 * size.width, 2 * (size.width // size.heads) * size.layers
    assert parameters(config) == size.parameters + places + norms
    gpt = config.model.transformer
    gpt.target_positions, gpt.qk_norm = False, False
    assert parameters(config) == size.parameters
    gpt.adaln = True
    assert parameters(config) == size.parameters + size.layers * 6 * size.width * (size.width + 1)


def test_both_blocks_of_the_speedrun_are_as_large():
    for form in ("cpu", "gpu"):
        llama, gpt2 = (modern_transformer.get_config(f"{block}speedrun,form={form}") for block in ("", "gpt2,"))
        assert (llama.model.transformer.block, gpt2.model.transformer.block) == ("llama", "gpt2")
        plain = speedrun_transformer.get_config(f"form={form}")
        for config in (llama, gpt2):
            for key in ("steps", "batch_size", "data", "dtype"):
                assert config[key] == plain[key]
            assert config.optimizer.learning_rate == plain.optimizer.learning_rate
            with config.data.ignore_type():
                config.data.image_size = 128  # 8 x 8 codes of this first stage
        ours, theirs = parameters(llama), parameters(gpt2)
        assert abs(ours / theirs - 1) < 0.01


@pytest.mark.parametrize("arg", ["L", "B,adaln", "gpt2,speedrun"])
def test_every_argument_makes_a_step_and_settings_of_the_sampler(arg):
    config = modern_transformer.get_config(arg)
    stage = speedrun_vqgan.get_config().model if "speedrun" in arg else first_stage()
    model, _ = build_transformer(config, [stage])
    config.batch_size = 2
    recipe = transformer_recipe(config, model, Durations(config, IMAGENET))
    state = jax.eval_shape(lambda key: nn.unbox(recipe.init(key)), jax.random.key(0))
    codes = jax.ShapeDtypeStruct((2, *model.config.grid), np.int32)
    batch = {"codes/image": codes, "label": jax.ShapeDtypeStruct((2,), np.int32)}
    _, metrics = jax.eval_shape(recipe.step, state, batch, {})
    assert "permuted" in metrics
    strategy = Strategy(**config.sampling)
    assert strategy.guided and strategy.kind == "plain"
    model.null_condition  # noqa: B018  (raises where guidance was not trained)
    assert float(guidance_scale(strategy, 0, 256)) == 1 < float(guidance_scale(strategy, 255, 256))


def test_typos_are_named_and_a_cpu_runs_two_steps():
    with pytest.raises(UserError, match="did you mean 'XXL'"):
        modern_transformer.get_config("XXXL")
    config = modern_transformer.get_config("XL,runlocal")
    assert config.steps == "2" and config.mesh.fsdp == 1 and config.model.transformer.width == 32
