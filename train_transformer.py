"""Stage 2: train a transformer on the codes of a trained VQGAN.

    python train_transformer.py --config=configs/demo_transformer.py --config.vqgan=runs/vqgan --workdir=runs/gpt

Rerun the same command to resume. The workdir holds its own copy of the first stage, so it can be moved; beside it
checkpoints/ (the best by validation NLL is kept), metrics.jsonl, tensorboard/, images/, config.json and run/.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from clu import parameter_overview
from ml_collections import ConfigDict

from vqgan_jax import cli, images, parallel, pretrained
from vqgan_jax.evals.runner import likelihood_scorer
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.sampling.sampler import sample_grid
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.scoring import scheduled
from vqgan_jax.train import code_cache, loop, setup
from vqgan_jax.train.recipe import transformer_recipe
from vqgan_jax.train.replay import replay
from vqgan_jax.train.run_record import write_run_record
from vqgan_jax.train.speed import flops_counter
from vqgan_jax.train.state import TrainState
from vqgan_jax.train.transformer_step import REFERENCE
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

FLAGS = flags.FLAGS


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Runs the whole story and returns the last state."""
    path = cli.check_workdir(workdir)

    # Mesh
    mesh = parallel.make_mesh(config.mesh)
    setup.check_batch(config, mesh)

    # Model: the workdir's own copies of the frozen stages, and the transformer
    setup.check_same_model(config, path)
    model_config = TransformerConfig.from_config(config.model)
    dtype = setup.dtype_of(config)
    stages = pretrained.adopt_stages(config, path, dtype)
    model = ImageTransformer(model_config, stages.first, stages.cond, dtype, setup.remat_of(config))
    frozen = parallel.put_tree(stages.frozen, mesh)

    # Data: pictures, or codes made of them once
    keys = (stages.first.config.input_key, *model.condition.keys)
    model.check_size(config.data.image_size)
    open_images = functools.partial(
        setup.open_data, config, keys, factor=stages.first.factor, classes=model.condition.labels
    )
    data = code_cache.open_data(config, path, model, stages.frozen, stages.digest, open_images)
    batches = functools.partial(setup.evaluation_batches, config.batch_size, mesh)
    durations = setup.Durations(config, len(data.train))

    # Objective and optimizer
    recipe = transformer_recipe(config, model, durations)

    # State: restored, or born sharded
    with setup.open_checkpoints(config, path) as checkpoints, jax.set_mesh(mesh):
        state, start = setup.restore_or_init(checkpoints, recipe.init, mesh, config, load_initial)
        if not config.replay:
            write_run_record(path, config)
        if config.loss.cca.weight:
            frozen[REFERENCE] = model.place(pretrained.adopt_reference(config, path), mesh)
        if not start.step:
            parallel.say(parameter_overview.get_parameter_overview(state.params, include_stats=False))

        # Step
        step = setup.jit_step(recipe.step, recipe.learning_rate, state)
        plain = transformer_recipe(config, dataclasses.replace(model, remat=""), durations)
        flops = flops_counter(plain.step, state, frozen)
        if config.replay:
            parallel.say(replay(config.replay, recipe.step, state, frozen, mesh, step=start.step))
            return state

        # Evaluations and pictures
        score = likelihood_scorer(model, mesh, config.batch_size)
        pictures = picture_maker(
            model, config, next(iter(batches(data.val, data.val_transform, config.batch_size))), mesh
        )

        def params(state: TrainState) -> Any:
            return state.sampled("transformer")

        def evaluate(state: TrainState, step: int) -> Mapping[str, float]:
            return score(params(state), frozen, batches(data.val, data.val_transform, config.eval_examples))

        scheduled_score = scheduled.stage_2(config, mesh, model, stages, data, open_images, params)

        def draw(state: TrainState, step: int) -> Mapping[str, np.ndarray]:
            return pictures(params(state), frozen, step)

        # Loop
        with setup.open_logs(config, path, start) as writer:
            return loop.train(
                state,
                step_fn=lambda state, batch: step(state, batch, frozen),
                batches=setup.training_batches(config, mesh, data.train, data.train_transform, start.examples),
                schedule=durations.schedule(config),
                checkpoints=checkpoints,
                writer=writer,
                record=setup.make_record(
                    config,
                    "transformer",
                    stages=stages.digest,
                    classes=list(data.train.classes),
                    tables={key: list(names) for key, names in getattr(data.train, "tables", {}).items()},
                ),
                start_step=start.step,
                start_examples=start.examples,
                workdir=path,
                nonfinite_budget=config.nonfinite_budget,
                examples_per_step=config.batch_size,
                units={"tokens/s": config.batch_size * len(model.order)},
                evaluate=evaluate,
                score=scheduled_score,
                draw=draw if config.images_shown else None,
                headline=("nll", "accuracy"),
                flops=flops,
                profile=setup.profile_range(config),
                watchdog=setup.open_watchdog(config, path),
            )


def picture_maker(model: ImageTransformer, config: ConfigDict, rows: Mapping[str, np.ndarray], mesh: Any) -> Any:
    """Returns `draw(params, frozen, step)`: samples under the conditions of held-out examples, completions of their
    upper halves, and their reconstructions."""
    n = min(config.images_shown, config.batch_size)
    batch = parallel.put_batch(rows, mesh, config.batch_size)
    strategy = Strategy(**config.sampling)

    @jax.jit
    def run(params: Any, frozen: Any, batch: Any, step: jax.Array) -> dict[str, jax.Array]:
        batch = {name: x[:n] for name, x in batch.items()}
        codes, condition = model.codes(frozen, batch), model.condition.tokens(frozen, batch)
        half = codes.shape[1] // 2
        grid = model.to_grid(codes)
        given = (grid, model.to_grid(jnp.broadcast_to(jnp.arange(codes.shape[1]) < half, codes.shape)))
        sample = functools.partial(sample_grid, model, split_layers(params, model.dtype), condition)
        keys = row_keys(step, jnp.arange(n))
        grids = {
            "samples": sample(keys, strategy),
            "completions": sample(keys, strategy, given, leading=half),
            "reconstructions": grid,
        }
        return {name: model.decode(frozen, ids) for name, ids in grids.items()}

    def draw(params: Any, frozen: Any, step: int) -> dict[str, np.ndarray]:
        made = run(params, frozen, batch, jnp.asarray(step))
        return {name: images.grid(images.to_uint8(parallel.to_host(x))) for name, x in made.items()}

    return draw


def load_initial(path: str) -> dict[str, Any]:
    """Parameters of another transformer run, for `config.init_from`."""
    trained = pretrained.load_trained(path, key="config.init_from", kind="transformer")
    return {"params": {**trained.params, **trained.ema}, "collections": trained.collections}


if __name__ == "__main__":
    cli.define_training_flags()
    cli.run(lambda: train(FLAGS.config, FLAGS.workdir), required=("config", "workdir"))
