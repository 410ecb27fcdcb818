"""The discriminator's side of stage 1: what it sees, its loss, and what it remembers between steps.

LeCAM (arXiv 2104.03310) holds its logits near running means of the other side's, DiffAug (2006.10738) changes what
both players see alike, and a discriminator of frozen features (StyleGAN-T, 2301.09515) sees these in their place.
"""

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vqgan_jax import losses
from vqgan_jax.models.dino import DINO, DINOS
from vqgan_jax.models.discriminators import DiscriminatorConfig, FeatureHeadsConfig, example_input, make_discriminator
from vqgan_jax.train.augment import augment, parse_policy
from vqgan_jax.train.objective import VQGANObjective
from vqgan_jax.train.state import Metrics, Tree


def init_discriminator(config: DiscriminatorConfig, key: jax.Array, size: int, channels: int) -> Tree:
    """Variables of a fresh discriminator of pictures [b, size, size, channels]: "params", what else its module keeps,
    and LeCAM's running means of its logits, also where that is off, so that a run can switch it on."""
    means = {"lecam": {"logits": {"real": jnp.zeros(()), "fake": jnp.zeros(())}}}
    return make_discriminator(config).init(key, example_input(config, size, channels)) | means


class Adversary:
    """The discriminator as the step uses it. Its parameters and collections stand under "discriminator" in the state's
    trees; `frozen["dino"]` holds the variables of the network that it sees through, where it has one."""

    def __init__(self, config: DiscriminatorConfig, objective: VQGANObjective, dtype: Dtype, accumulation: int = 1):
        self.objective, self._accumulation = objective, accumulation
        self._policy = parse_policy(objective.augment)
        self._module = make_discriminator(config, dtype)
        self._features, self._size = None, 0
        if isinstance(config, FeatureHeadsConfig):
            self._features, self._size = DINO(DINOS[config.network], config.layers, dtype=dtype), config.size

    def logits(
        self, params: Tree, collections: Tree, images: jax.Array, frozen: Tree, key: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """Logits float32 [b, ...] of a training pass over images [b, h, w, c] in [-1, 1], and the new collections."""
        seen = self._seen(augment(images, key, self._policy), frozen)
        ours = collections["discriminator"]
        variables = {"params": params["discriminator"], **ours}
        logits, updated = self._module.apply(variables, seen, train=True, mutable=["batch_stats"])
        return logits, collections | {"discriminator": ours | updated}

    def loss(
        self,
        params: Tree,
        collections: Tree,
        real: jax.Array,
        fake: jax.Array,
        step: jax.Array,
        frozen: Tree,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """What the discriminator minimises on pictures and reconstructions [b, h, w, c], new collections, metrics."""
        o = self.objective
        real_logits, collections = self.logits(params, collections, real, frozen, key)
        fake_logits, collections = self.logits(params, collections, fake, frozen, key)
        factor = o.discriminator_factor(step)
        loss = factor * losses.DISCRIMINATOR_LOSSES[o.discriminator_loss](real_logits, fake_logits)
        metrics = {
            "logits_real": real_logits.mean(),
            "logits_fake": fake_logits.mean(),
            "discriminator_loss": loss,
            "discriminator_accuracy": (jnp.mean(real_logits > 0) + jnp.mean(fake_logits < 0)) / 2,
        }
        if o.lecam_weight:
            ours = collections["discriminator"]
            means = ours["lecam"]["logits"]
            metrics["lecam"] = losses.lecam(real_logits, fake_logits, means["real"], means["fake"])
            loss = loss + factor * o.lecam_weight * metrics["lecam"]
            new = {"real": metrics["logits_real"], "fake": metrics["logits_fake"]}
            decay = jnp.where(factor > 0, self._decay(step), 1.0)
            means = jax.tree.map(lambda old, new: decay * old + (1 - decay) * jax.lax.stop_gradient(new), means, new)
            collections = collections | {"discriminator": ours | {"lecam": {"logits": means}}}
        return loss, (collections, metrics)

    def _decay(self, step: jax.Array) -> jax.Array:
        """Of LeCAM's means, by micro-batch; smaller early on, as that of the parameters' averages is."""
        trained = jnp.maximum(step - self.objective.discriminator_begins, 0)
        return jnp.minimum(self.objective.lecam_decay, (1 + trained) / (10 + trained)) ** (1 / self._accumulation)

    def _seen(self, images: jax.Array, frozen: Tree) -> jax.Array | list[jax.Array]:
        if self._features is None:
            return images
        if self._size:
            b, _, _, c = images.shape
            images = jax.image.resize(images, (b, self._size, self._size, c), "bilinear")
        return self._features.apply(frozen["dino"], images)
