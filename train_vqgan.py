"""Stage 1: train a VQGAN, images to codes and back.

    python train_vqgan.py --config=configs/demo_vqgan.py --workdir=runs/vqgan

Rerun the same command to resume. Override any field: --config.batch_size=16 --config.data.path=/photos.
The workdir holds checkpoints/, metrics.jsonl, tensorboard/, images/, config.json and run/ (a record of each start).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from clu import parameter_overview
from ml_collections import ConfigDict

from vqgan_jax import cli, images, parallel, pretrained, weights
from vqgan_jax.convert import networks
from vqgan_jax.evals.runner import reconstruction_scorer
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig, model_input
from vqgan_jax.scoring import scheduled
from vqgan_jax.train import loop, setup
from vqgan_jax.train.recipe import frozen_networks, vqgan_recipe
from vqgan_jax.train.replay import replay
from vqgan_jax.train.run_record import write_run_record
from vqgan_jax.train.speed import flops_counter
from vqgan_jax.train.state import TrainState

FLAGS = flags.FLAGS


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Runs the whole story and returns the last state."""
    path = cli.check_workdir(workdir)

    # Mesh
    mesh = parallel.make_mesh(config.mesh)
    setup.check_batch(config, mesh)

    # Model
    setup.check_same_model(config, path)
    model_config = VQGANConfig.from_config(config.model)
    model = VQGAN(model_config, setup.dtype_of(config), setup.remat_of(config))

    # Data
    data = setup.open_data(config, (model_config.input_key,), factor=model_config.factor)
    durations = setup.Durations(config, len(data.train))

    # Objective, optimizers and frozen networks
    recipe = vqgan_recipe(config, model, durations)
    frozen = parallel.put_tree(load_frozen(config), mesh)

    # State: restored, or born sharded
    with setup.open_checkpoints(config, path) as checkpoints, jax.set_mesh(mesh):
        state, start = setup.restore_or_init(checkpoints, recipe.init, mesh, config, load_initial)
        if not config.replay:
            write_run_record(path, config)
        if not start.step:
            parallel.say(parameter_overview.get_parameter_overview(state.params, include_stats=False))

        # Step
        step = setup.jit_step(recipe.step, recipe.learning_rate, state)
        plain = vqgan_recipe(config, model.clone(remat=""), durations)
        flops = flops_counter(plain.step, state, frozen)
        if config.replay:
            parallel.say(replay(config.replay, recipe.step, state, frozen, mesh, step=start.step))
            return state

        # Evaluations and pictures
        score = reconstruction_scorer(model, mesh, config.batch_size)
        batches = functools.partial(setup.evaluation_batches, config.batch_size, mesh, data.val, data.val_transform)
        reconstruct = jax.jit(lambda variables, x: model.apply(variables, x).reconstruction)
        shown = shown_batch(config, mesh, data) if config.images_shown else None

        def variables(state: TrainState) -> dict[str, Any]:
            params = state.sampled("generator")
            return {"params": params, **state.collections["generator"]}

        def evaluate(state: TrainState, step: int) -> Mapping[str, float]:
            return score(variables(state), batches(config.eval_examples))

        scheduled_score = scheduled.stage_1(config, mesh, model, data, variables)

        def draw(state: TrainState, step: int) -> Mapping[str, np.ndarray]:
            x = model_input(model_config, shown)
            pictures = np.stack(
                [as_picture(parallel.to_host(x)), as_picture(parallel.to_host(reconstruct(variables(state), x)))], 1
            )
            pictures = pictures[: config.images_shown].reshape(-1, *pictures.shape[2:])
            return {"reconstructions": images.grid(pictures, columns=8)}

        # Loop
        with setup.open_logs(config, path, start) as writer:
            return loop.train(
                state,
                step_fn=lambda state, batch: step(state, batch, frozen),
                batches=setup.training_batches(config, mesh, data.train, data.train_transform, start.examples),
                schedule=durations.schedule(config),
                checkpoints=checkpoints,
                writer=writer,
                record=setup.make_record(config, "vqgan"),
                start_step=start.step,
                start_examples=start.examples,
                workdir=path,
                nonfinite_budget=config.nonfinite_budget,
                examples_per_step=config.batch_size,
                evaluate=evaluate,
                score=scheduled_score,
                draw=draw if config.images_shown else None,
                headline=("nll", "codebook_perplexity"),
                flops=flops,
                profile=setup.profile_range(config),
                watchdog=setup.open_watchdog(config, path),
            )


def load_frozen(config: ConfigDict) -> dict[str, Any]:
    """Variables of the frozen networks that the objective uses."""

    def lpips() -> Any:
        vgg = weights.fetch("vgg16", config.lpips.vgg, flag="--config.lpips.vgg")
        return networks.load_lpips(vgg, weights.fetch("lpips_vgg", config.lpips.heads, flag="--config.lpips.heads"))

    def resnet50() -> Any:
        file = weights.fetch("resnet50", config.resnet50, flag="--config.resnet50")
        return networks.load_resnet("resnet50", file).variables

    def dino() -> Any:
        name = config.model.discriminator.network
        return networks.load_dino(name, weights.fetch(name, config.dino, flag="--config.dino"))

    loaders = {"lpips": lpips, "resnet50": resnet50, "dino": dino}
    return {name: loaders[name]() for name in frozen_networks(config)}


def load_initial(path: str) -> dict[str, Any]:
    """Parameters of another VQGAN run, for `config.init_from`."""
    trained = pretrained.load_trained(path, key="config.init_from", kind="vqgan")
    return {"params": {**trained.params, **trained.ema}, "collections": trained.collections}


def shown_batch(config: ConfigDict, mesh: Any, data: setup.Data) -> dict[str, jax.Array]:
    """The held-out examples that the pictures show."""
    batch = -(-config.images_shown // mesh.size) * mesh.size
    rows = next(iter(setup.evaluation_batches(batch, mesh, data.val, data.val_transform, batch)))
    return parallel.put_batch(rows, mesh, batch)


def as_picture(x: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w, 3 or 1] of what the model sees or makes; label scores as grey levels of the likeliest label."""
    if x.shape[-1] > 3:
        return np.rint(x.argmax(-1)[..., None] * (255 / (x.shape[-1] - 1))).astype(np.uint8)
    return images.to_uint8(x)


if __name__ == "__main__":
    cli.define_training_flags()
    cli.run(lambda: train(FLAGS.config, FLAGS.workdir), required=("config", "workdir"))
