"""What stage 1 minimises, in steps: `config.loss` as a dataclass, and when each player of the GAN is in play."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from vqgan_jax.models.perturbation import Perturbation
from vqgan_jax.train.augment import parse_policy

DURATIONS = ("adversarial_start", "adversarial_ramp", "discriminator_start")  # among the fields
ANNEALING = ("anneal_start", "anneal_end")  # among those of the perturbation


@dataclasses.dataclass(frozen=True)
class VQGANObjective:
    """What the step minimises. Durations are optimizer steps."""

    reconstruction: Literal["l1", "l2", "bce"]
    pixel_weight: float
    perceptual_weight: float  # LPIPS; 0 = no LPIPS network
    logits_weight: float  # squared error of ResNet-50's logits (VQGAN+, arXiv 2409.16211); 0 = no such network
    quantizer_weight: float
    discriminator_loss: Literal["hinge", "vanilla"]
    adversarial_weight: float  # times the adaptive weight, where that is on
    adversarial_start: int
    adversarial_ramp: int  # steps over which the weight grows from 0; 0 = at once
    discriminator_start: int  # where the discriminator trains before its loss counts; it never starts after it counts
    adaptive: bool
    adaptive_epsilon: float
    adaptive_maximum: float
    schedule: Literal["simultaneous", "alternating"]  # alternating: the discriminator sees the updated generator
    idle_discriminator_updates: bool  # before the start the reference feeds its discriminator's Adam zero gradients
    lecam_weight: float  # 0 = off
    lecam_decay: float  # of the running means of the logits
    perturbation: Perturbation  # of the codes that the decoder gets
    augment: str  # of what the discriminator sees: "color,translation,cutout" or some of them; "" = nothing

    def __post_init__(self) -> None:
        parse_policy(self.augment)

    def adversarial_factor(self, step: jax.Array) -> jax.Array:
        """The share of the adversarial loss that counts for the generator, in [0, 1]."""
        ramp = (step - self.adversarial_start + 1) / max(self.adversarial_ramp, 1)
        return jnp.where(step >= self.adversarial_start, jnp.minimum(ramp, 1.0), 0.0)

    def discriminator_factor(self, step: jax.Array) -> jax.Array:
        """The factor of the discriminator's own loss: 1 once it trains ahead, else that of the generator."""
        ahead = jnp.where(step >= self.discriminator_start, 1.0, 0.0)
        return jnp.maximum(ahead, self.adversarial_factor(step))

    @property
    def discriminator_begins(self) -> int:
        """The first step at which the discriminator trains."""
        return min(self.discriminator_start, self.adversarial_start)
