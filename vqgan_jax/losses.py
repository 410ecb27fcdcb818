"""Losses of both stages: reconstruction, adversarial, the adaptive weight (arXiv 2012.09841, equation 7), tokens."""

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
    """Cross-entropy in nats of each token: logits [b, t, v], targets int32 [b, t] -> float32 [b, t]."""
    logits = logits.astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if not label_smoothing:
        return nll
    uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1 - label_smoothing) * nll + label_smoothing * uniform
