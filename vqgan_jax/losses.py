"""Losses of both stages: reconstruction, adversarial, the adaptive weight (arXiv 2012.09841, equation 7), tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def hinge_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Hinge loss of the discriminator's logits, a scalar."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def vanilla_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Cross-entropy (log-GAN) loss of the discriminator's logits, a scalar."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator, "vanilla": vanilla_discriminator}


def generator_loss(fake: jax.Array) -> jax.Array:
    """What the generator minimises against either discriminator loss: minus the mean logit."""
    return -jnp.mean(fake)


def lecam(real: jax.Array, fake: jax.Array, mean_real: jax.Array, mean_fake: jax.Array) -> jax.Array:
    """LeCAM's regulariser of the discriminator's logits, a scalar (arXiv 2104.03310): real ones above the running mean
    of fake ones and fake ones below that of real ones cost their squared distance."""
    above, below = jax.nn.relu(real - mean_fake), jax.nn.relu(mean_real - fake)
    return jnp.mean(above**2) + jnp.mean(below**2)


def adaptive_weight(
    reconstruction_norm: jax.Array, adversarial_norm: jax.Array, epsilon: float, maximum: float
) -> jax.Array:
    """Ratio of the two gradient norms at the decoder's last layer, in [0, maximum] (equation 7). Never NaN or infinite
    for finite norms: `epsilon` is positive (1e-6 in the paper, 1e-4 in the reference's code)."""
    return jnp.clip(reconstruction_norm / (adversarial_norm + epsilon), 0, maximum)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over pixels and classes of the binary cross-entropy of logits [b, h, w, c] and one-hot labels."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))


def token_nll(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy in nats of each token: logits [b, t, v], targets int32 [b, t] -> float32 [b, t]. Of tokens in
    groups, logits [b, t, g, v] and targets [b, t, g], the sum over the groups."""
    logits = logits.astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if label_smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        nll = (1 - label_smoothing) * nll + label_smoothing * uniform
    return over_groups(nll, jnp.sum)


def over_groups(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Values of tokens from those of their groups [b, t, g]; those of tokens [b, t] as they are."""
    return reduce(x, axis=-1) if x.ndim == 3 else x


def z_loss(logits: jax.Array) -> jax.Array:
    """Square of log Z of each token's softmax, which keeps logits from drifting (PaLM, arXiv 2204.02311); shapes as
    `token_nll`."""
    return over_groups(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1), jnp.sum) ** 2


def condition_contrast(
    gain: jax.Array, wrong_gain: jax.Array, same: jax.Array, weight: float, beta: float
) -> jax.Array:
    """Condition contrastive alignment (CCA, arXiv 2410.09347) as its code scales it, a scalar.

    Args:
      gain: log-likelihood of each picture under its condition, minus that of the reference model, in nats [b].
      wrong_gain: the same under the condition of another picture [b].
      same: where that condition is no other one [b], the null condition among them: it counts as right.
      weight: of what a wrong condition must lose, lambda; the whole is divided by it where it is above 1.
      beta: of the gains.
    """
    right = jax.nn.softplus(-beta * gain)
    wrong = jnp.where(same, jax.nn.softplus(-beta * wrong_gain), weight * jax.nn.softplus(beta * wrong_gain))
    return jnp.mean(right + wrong) / max(weight, 1.0)
