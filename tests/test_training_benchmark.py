"""benchmarks/train.py: its jobs are those of the configs, and its steps take what they are called with."""

import jax
import pytest

from benchmarks.train import make_job


@pytest.mark.parametrize("name", ["307M", "B", "3B", "class_imagenet"])
def test_every_transformer_has_a_job_that_traces(name):
    config, job = make_job(name, batch=2, dtype="bfloat16", small=True)
    recipe = job.recipe("block")
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    new, metrics = jax.eval_shape(recipe.step, state, job.batch, job.frozen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert "loss" in metrics and job.tokens == config.model.grid[0] * config.model.grid[1]
