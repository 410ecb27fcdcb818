"""Quantizers under one contract: `(z, *, train, step) -> (z_q, ids, aux)`, `codes(ids)`, `codebook_size`, `dim`.

What a quantizer remembers lives in the collection "codebook", its randomness in the stream "quantizer". Distances,
softmaxes and statistics are float32. VQ: arXiv 2012.09841, equation 4; EMA: arXiv 1711.00937, appendix A.1; Gumbel:
arXiv 1611.01144.
"""

import dataclasses
import math
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vqgan_jax.models.layers import Conv


@struct.dataclass
class Aux:
    """What a quantizer says beside its codes.

    `loss`: weighted sum, a scalar. `metrics`: its named parts. `counts` float32 [q]: how often each code was used in
    this batch. `restart`: None, or (mask bool [q], vectors [q, e]) for a codebook that is a parameter.
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]
    counts: jax.Array
    restart: tuple[jax.Array, jax.Array] | None = None


class Quantizer(Protocol):
    """The contract. `input_dim` is the width of z; `dim` that of a code (they differ for Gumbel alone)."""

    codebook_size: int
    dim: int
    input_dim: int

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        """z [b, h, w, input_dim] -> (z_q [b, h, w, dim], ids int32 [b, h, w], aux)."""

    def codes(self, ids: jax.Array) -> jax.Array:
        """ids int32 [...] -> code vectors [..., dim]."""


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Nearest code, learned by gradient."""

    codebook_size: int
    dim: int
    commitment_weight: float  # pulls z towards its code: 0.25 as published, 1.0 in the reference (its beta bug)
    codebook_weight: float  # pulls the code towards z: 1.0 as published, 0.25 in the reference
    restart_below: float  # a code used under this share of the mean is restarted from the batch; 0 = never
    usage_decay: float  # of the running usage that decides restarts


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """Nearest code, learned by exponential moving averages of what is assigned to it."""

    codebook_size: int
    dim: int
    commitment_weight: float
    decay: float
    restart_below: float


@dataclasses.dataclass(frozen=True)
class GumbelConfig:
    """Gumbel-softmax over a 1x1 convolution's logits; hard and straight-through by option; arg max in evaluation."""

    codebook_size: int
    dim: int
    input_dim: int
    kl_weight: float
    straight_through: bool
    temperature_start: float
    temperature_end: float
    temperature_steps: int  # half a cosine from start to end


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Ids int32 [...] of the codes [q, e] nearest to z [..., e]. The squared norm of z cancels in the arg min."""
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    dots = jnp.einsum("...e,qe->...q", z, codebook, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(codebook**2, axis=1) - 2 * dots, axis=-1).astype(jnp.int32)


def count_codes(ids: jax.Array, codebook_size: int) -> jax.Array:
    """How often each id occurs: float32 [q]."""
    return jnp.zeros(codebook_size, jnp.float32).at[ids.reshape(-1)].add(1.0)


def perplexity(counts: jax.Array) -> jax.Array:
    """exp(entropy) of a histogram [q]: the number of codes in effective use, 1..q."""
    p = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10)))


def _draw_vectors(key: jax.Array, n: int, z: jax.Array) -> jax.Array:
    """n vectors [n, e] drawn from a batch z [..., e], to start or restart codes from."""
    return z.reshape(-1, z.shape[-1])[jax.random.randint(key, (n,), 0, math.prod(z.shape[:-1]))]


class _Sizes:
    """The sizes of the contract, read off a quantizer's `config`."""

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def input_dim(self) -> int:
        return getattr(self.config, "input_dim", self.dim)


class VectorQuantizer(_Sizes, nn.Module):
    """Nearest code; the codebook is a parameter."""

    config: VQConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        self.codebook = self.param("codebook", lambda key: jax.random.uniform(key, (q, e), minval=-1 / q, maxval=1 / q))
        if self.config.restart_below:
            self.usage = self.variable("codebook", "usage", lambda: jnp.ones(q))

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.codebook[ids]

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, z = self.config, z.astype(jnp.float32)
        ids = nearest(jax.lax.stop_gradient(z), jax.lax.stop_gradient(self.codebook))
        z_q = self.codes(ids)
        commitment = jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2)
        codebook = jnp.mean((z_q - jax.lax.stop_gradient(z)) ** 2)
        counts, metrics, restart = count_codes(ids, c.codebook_size), {"commitment": commitment}, None
        if train and c.restart_below and not self.is_initializing():
            usage = c.usage_decay * self.usage.value + (1 - c.usage_decay) * counts / counts.mean()
            mask = usage < c.restart_below * usage.mean()
            vectors = _draw_vectors(self.make_rng("quantizer"), c.codebook_size, jax.lax.stop_gradient(z))
            self.usage.value = jnp.where(mask, 1.0, usage)
            restart, metrics["restarts"] = (mask, vectors), mask.sum().astype(jnp.float32)
        loss = c.commitment_weight * commitment + c.codebook_weight * codebook
        return z + jax.lax.stop_gradient(z_q - z), ids, Aux(loss, metrics, counts, restart)


class EMAVectorQuantizer(_Sizes, nn.Module):
    """Nearest code; the codebook is a running mean. Starts from the first batch; sums are global over a mesh."""

    config: EMAConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        self.book = self.variable("codebook", "codes", lambda: jax.random.normal(self.make_rng("params"), (q, e)))
        self.count = self.variable("codebook", "count", lambda: jnp.ones(q))
        self.sum = self.variable("codebook", "sum", lambda: jnp.zeros((q, e)))
        self.started = self.variable("codebook", "started", lambda: jnp.zeros((), bool))

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.book.value[ids]

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, z = self.config, z.astype(jnp.float32)
        fixed = jax.lax.stop_gradient(z)
        if train and not self.is_initializing():
            key_start, key_restart = jax.random.split(self.make_rng("quantizer"))
            vectors = _draw_vectors(key_start, c.codebook_size, fixed)
            self.book.value = jnp.where(self.started.value, self.book.value, vectors)
            self.sum.value = jnp.where(self.started.value, self.sum.value, vectors)
            self.started.value = jnp.ones((), bool)
        ids = nearest(fixed, self.book.value)
        z_q, counts = self.codes(ids), count_codes(ids, c.codebook_size)
        commitment = jnp.mean((z_q - z) ** 2)
        metrics = {"commitment": commitment}
        if train and not self.is_initializing():
            sums = jnp.zeros_like(self.sum.value).at[ids.reshape(-1)].add(fixed.reshape(-1, c.dim))
            # In units of a code's mean share, so that the start (one each) does not depend on the batch size.
            share = counts.mean()
            count = c.decay * self.count.value + (1 - c.decay) * counts / share
            total = c.decay * self.sum.value + (1 - c.decay) * sums / share
            mask = count < c.restart_below * count.mean()
            vectors = _draw_vectors(key_restart, c.codebook_size, fixed)
            self.count.value = jnp.where(mask, 1.0, count)
            self.sum.value = jnp.where(mask[:, None], vectors, total)
            self.book.value = self.sum.value / jnp.maximum(self.count.value, 1e-5)[:, None]
            metrics["restarts"] = mask.sum().astype(jnp.float32)
        return z + jax.lax.stop_gradient(z_q - z), ids, Aux(c.commitment_weight * commitment, metrics, counts)


class GumbelQuantizer(_Sizes, nn.Module):
    """Gumbel-softmax; deterministic (arg max, no noise) in evaluation, where the reference still adds noise."""

    config: GumbelConfig

    def setup(self) -> None:
        q, e = self.config.codebook_size, self.config.dim
        self.logits_layer = Conv(q, 1, padding=(0, 0), name="logits")
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (q, e))

    def codes(self, ids: jax.Array) -> jax.Array:
        return self.codebook[ids]

    def logits(self, z: jax.Array) -> jax.Array:
        """Scores of every code: z [b, h, w, input_dim] -> float32 [b, h, w, q]."""
        return self.logits_layer(z.astype(jnp.float32))

    def temperature(self, step: jax.Array | int) -> jax.Array:
        """Half a cosine from the start temperature to the end one, constant afterwards."""
        c = self.config
        share = jnp.clip(jnp.asarray(step, jnp.float32) / max(c.temperature_steps, 1), 0, 1)
        return c.temperature_end + 0.5 * (c.temperature_start - c.temperature_end) * (1 + jnp.cos(jnp.pi * share))

    def soft_codes(self, logits: jax.Array, noise: jax.Array, temperature: jax.Array | float) -> jax.Array:
        """Relaxed one-hot [b, h, w, q] of logits and standard Gumbel noise of the same shape."""
        return jax.nn.softmax((logits + noise) / temperature, axis=-1)

    def __call__(self, z: jax.Array, *, train: bool, step: jax.Array | int) -> tuple[jax.Array, jax.Array, Aux]:
        c, logits = self.config, self.logits(z)
        probabilities = jax.nn.softmax(logits, axis=-1)
        kl = jnp.mean(jnp.sum(probabilities * jnp.log(probabilities * c.codebook_size + 1e-10), axis=-1))
        metrics = {"kl": kl}
        if train:
            noise = jax.random.gumbel(self.make_rng("quantizer"), logits.shape)
            metrics["temperature"] = self.temperature(step)
            soft = self.soft_codes(logits, noise, metrics["temperature"])
            ids = jnp.argmax(soft, axis=-1).astype(jnp.int32)
            if c.straight_through:
                soft = soft + jax.lax.stop_gradient(jax.nn.one_hot(ids, c.codebook_size) - soft)
            z_q = jnp.einsum("...q,qe->...e", soft, self.codebook)
        else:
            ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            z_q = self.codes(ids)
        return z_q, ids, Aux(c.kl_weight * kl, metrics, count_codes(ids, c.codebook_size))


QuantizerConfig = VQConfig | EMAConfig | GumbelConfig
CONFIGS: dict[str, type[Any]] = {"vq": VQConfig, "ema": EMAConfig, "gumbel": GumbelConfig}
MODULES = {VQConfig: VectorQuantizer, EMAConfig: EMAVectorQuantizer, GumbelConfig: GumbelQuantizer}


def make_quantizer(config: QuantizerConfig, name: str) -> Quantizer:
    """The module of a quantizer's hyper-parameters, under the given parameter name."""
    return MODULES[type(config)](config, name=name)


def apply_restart(params: dict[str, Any], restart: tuple[jax.Array, jax.Array]) -> dict[str, Any]:
    """Writes restarted codes (mask [q], vectors [q, e]) into a quantizer's parameters."""
    mask, vectors = restart
    return params | {"codebook": jnp.where(mask[:, None], vectors, params["codebook"])}
