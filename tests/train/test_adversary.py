"""The discriminator's side of the step: LeCAM, training ahead, accuracy, frozen features, what a state keeps of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from tests import reference as ref
from tests.train.test_vqgan_step import OBJECTIVE
from vqgan_jax import parallel
from vqgan_jax.config import UserError
from vqgan_jax.models import dino
from vqgan_jax.models.discriminators import BlurPoolConfig, FeatureHeadsConfig, PatchGANConfig
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.train.adversary import Adversary, init_discriminator
from vqgan_jax.train.checkpoints import Checkpoints
from vqgan_jax.train.objective import VQGANObjective
from vqgan_jax.train.recipe import discriminator_optimizer
from vqgan_jax.train.vqgan_step import make_init, make_step

AHEAD = dict(adversarial_start=2, discriminator_start=1, lecam_weight=0.5, lecam_decay=0.15)


def objective(**changes) -> VQGANObjective:
    return VQGANObjective(**OBJECTIVE | AHEAD | changes)


def test_when_each_player_is_in_play():
    o = objective(adversarial_start=4, adversarial_ramp=2, discriminator_start=2)
    steps = jnp.arange(7)
    np.testing.assert_allclose(o.adversarial_factor(steps), [0, 0, 0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(o.discriminator_factor(steps), [0, 0, 1, 1, 1, 1, 1])
    late = dataclasses.replace(o, discriminator_start=6)  # it never starts after its loss counts
    np.testing.assert_allclose(late.discriminator_factor(steps), [0, 0, 0, 0, 0.5, 1, 1])
    with pytest.raises(ValueError, match="unknown policy 'colour'"):
        objective(augment="colour")


def test_lecam_and_the_accuracy_equal_numpy_over_the_steps():
    """The means start where the discriminator does, follow the logits at the smaller early decay, then at their own."""
    config = BlurPoolConfig(32, 32, 1, False)
    variables = init_discriminator(config, jax.random.key(0), 8, 3)
    params = {"discriminator": variables.pop("params")}
    params["discriminator"]["conv_out"]["kernel"] *= 100  # logits that LeCAM can see
    collections = {"discriminator": variables}
    adversary = Adversary(config, objective(), jnp.float32)
    pictures = np.random.default_rng(0).uniform(-1, 1, (4, 2, 2, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def run(collections, images, step):
        key = jax.random.key(0)
        logits = [adversary.logits(params, collections, x, {}, key)[0] for x in images]
        return adversary.loss(params, collections, *images, step, {}, key), logits

    real_mean = fake_mean = np.float64(0)
    for step in range(4):
        (loss, (collections, metrics)), (real, fake) = run(collections, pictures[step], step)
        hinge = (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()) / 2
        lecam = (np.maximum(real - fake_mean, 0) ** 2).mean() + (np.maximum(real_mean - fake, 0) ** 2).mean()
        np.testing.assert_allclose(metrics["lecam"], lecam, rtol=1e-5)
        np.testing.assert_allclose(loss, (hinge + 0.5 * lecam) * (step >= 1), rtol=1e-5)
        np.testing.assert_allclose(metrics["discriminator_loss"], hinge * (step >= 1), rtol=1e-5)
        np.testing.assert_allclose(metrics["discriminator_accuracy"], ((real > 0).mean() + (fake < 0).mean()) / 2)
        if step >= 1:
            decay = min(0.15, step / (step + 9))  # 0.1, then 0.15
            real_mean = decay * real_mean + (1 - decay) * np.mean(real)
            fake_mean = decay * fake_mean + (1 - decay) * np.mean(fake)
        means = collections["discriminator"]["lecam"]["logits"]
        np.testing.assert_allclose([means["real"], means["fake"]], [real_mean, fake_mean], rtol=1e-5)
    assert abs(real_mean) > 1e-3 and lecam > 1e-3


def test_a_discriminator_of_frozen_features(monkeypatch):
    """It sees what DINO makes of the pictures, resized; gradients reach the pictures, and DINO has no parameters of the
    run's."""
    monkeypatch.setitem(dino.DINOS, "tiny", dino.DINOConfig(8, 16, 32, 1, 2))
    config = FeatureHeadsConfig("tiny", (0, 1), 16, 3, "group", True)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    network = dino.DINO(dino.DINOS["tiny"], config.layers)

    @jax.jit
    def run(images):
        frozen = {"dino": network.init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))}
        variables = init_discriminator(config, jax.random.key(2), 8, 3)
        params, collections = {"discriminator": variables.pop("params")}, {"discriminator": variables}
        adversary = Adversary(config, objective(augment="color"), jnp.float32)
        judge = lambda x: adversary.logits(params, collections, x, frozen, jax.random.key(3))  # noqa: E731
        (logits, updated), pull = jax.vjp(judge, images)
        zeros = jax.tree.map(jnp.zeros_like, updated)
        return params, logits, pull((jnp.ones_like(logits), zeros))[0]

    params, logits, gradient = run(images)
    assert logits.shape == (2, 2 * 2 * 2)  # two maps of 2 x 2 patches
    assert set(params["discriminator"]) == {"head_0", "head_1"}
    assert np.all(np.isfinite(gradient)) and np.all(np.abs(gradient).max(axis=(1, 2, 3)) > 0)


def test_the_discriminators_optimizer_is_the_generators_but_for_what_is_said():
    config = common.vqgan()
    assert discriminator_optimizer(config).to_dict() == config.optimizer.to_dict()
    config.discriminator_optimizer = "learning_rate=1e-4,b1=0.0,warmup=2%"
    changed = config.optimizer.to_dict() | dict(learning_rate=1e-4, b1=0.0, warmup="2%")
    assert discriminator_optimizer(config).to_dict() == changed
    for text, message in (("warmpu=1", "did you mean 'warmup'"), ("b1=x", "'b1' takes a value of type float")):
        config.discriminator_optimizer = text
        with pytest.raises(UserError, match=f"config.discriminator_optimizer: .*{message}"):
            discriminator_optimizer(config)


@pytest.mark.slow
@pytest.mark.parametrize("config", [BlurPoolConfig(32, 64, 2, True), PatchGANConfig(32, 2, "batch", True)])
def test_eight_devices_equal_one(config, monkeypatch):
    """Losses, gradients for either player, and all that is remembered: LeCAM's means, the vectors of the spectral norm,
    which are sharded here, and the draws of the augmentation."""
    monkeypatch.setattr(parallel, "MIN_SHARDED_SIZE", 64)
    adversary = Adversary(config, objective(augment="color,translation,cutout"), jnp.float32)
    variables = jax.jit(lambda: init_discriminator(config, jax.random.key(0), 16, 3))()
    params, rest = {"discriminator": variables.pop("params")}, {"discriminator": variables}
    real, fake = np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 16, 3)).astype(np.float32)

    def both(params, collections, real, fake):
        loss = lambda p, x: adversary.loss(p, collections, real, x, 5, {}, jax.random.key(1))  # noqa: E731
        (value, kept), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, fake)
        return value, kept, gradients

    found = []
    for count, sizes in ((1, dict(data=1, fsdp=1, tensor=1)), (8, dict(data=2, fsdp=2, tensor=2))):
        mesh = parallel.make_mesh(sizes, jax.devices()[:count])
        with jax.set_mesh(mesh):
            pictures = parallel.put_batch({"real": real, "fake": fake}, mesh, 8)
            placed = (parallel.put_tree(tree, mesh) for tree in (params, rest))
            found.append(jax.device_get(jax.jit(both)(*placed, **pictures)))
    for one, many in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5 * max(np.abs(one).max(), 1e-2))


MODEL = VQGAN(VQGANConfig(ref.autoencoder((1,), ()), ref.vq(), BlurPoolConfig(32, 32, 1, True), "image"))
EVERYTHING = dict(
    perceptual_weight=0.0,
    reconstruction="l2",
    idle_discriminator_updates=False,
    augment="color,translation,cutout",
    adaptive=False,
)
TX = {"generator": optax.sgd(0.0), "discriminator": optax.sgd(1e-2)}


def everything_step(accumulation: int, schedule: str):
    step = make_step(
        MODEL, objective(**EVERYTHING, schedule=schedule), LPIPS(), TX, ema_decay=0.0, accumulation=accumulation
    )
    return jax.jit(step)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["alternating", "simultaneous"])
def test_all_of_it_in_a_step_of_two_micro_batches(schedule, tmp_path):
    """It trains ahead, keeps the old state of a step that is not finite, and goes on from a checkpoint bit for bit."""
    step = everything_step(2, schedule)
    state = start = jax.jit(make_init(MODEL, TX, ema=False))(jax.random.key(0))
    images = np.random.default_rng(0).uniform(-1, 1, (4, 4, 16, 16, 3)).astype(np.float32)
    moved = []
    for batch in images[:3]:
        old = state
        state, metrics = step(state, {"image": batch}, {})
        assert all(np.isfinite(value) for value in metrics.values()) and 0 <= metrics["discriminator_accuracy"] <= 1
        kernels = (s.params["discriminator"]["conv_in"]["kernel"] for s in (old, state))
        means = (s.collections["discriminator"]["lecam"]["logits"]["real"] for s in (old, state))
        moved.append((not np.array_equal(*kernels), not np.array_equal(*means), float(metrics["adversarial_factor"])))
    assert moved == [(False, False, 0), (True, True, 0), (True, True, 1)]
    jax.tree.map(np.testing.assert_array_equal, state.params["generator"], start.params["generator"])  # of its own rate
    vectors = (s.collections["discriminator"]["batch_stats"]["conv_in"]["u"] for s in (start, state))
    assert not np.array_equal(*vectors)

    bad, metrics = step(state, {"image": images[3] * np.nan}, {})
    assert metrics["skipped"] == 1
    same = (state.params, state.collections), (bad.params, bad.collections)
    jax.tree.map(np.testing.assert_array_equal, *same)

    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(3, state, {"step": 3}, None)
        checkpoints.wait()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored, _ = checkpoints.restore(abstract)
    one, two = (step(s, {"image": images[3]}, {})[0] for s in (state, restored))
    parts = [(s.params, s.collections, s.opt_state) for s in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *parts)
