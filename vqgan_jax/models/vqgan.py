"""The VQGAN's generator: encoder, 1x1, quantizer, 1x1, decoder (arXiv 2012.09841, section 3.1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype

from vqgan_jax.config import UserError, choose, to_dataclass
from vqgan_jax.models import discriminators, quantizers
from vqgan_jax.models.autoencoder import AutoencoderConfig, Decoder, Encoder
from vqgan_jax.models.layers import Conv
from vqgan_jax.models.perturbation import Perturbation, perturbed


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """What makes a VQGAN: a workdir fits a config where these are equal."""

    autoencoder: AutoencoderConfig
    quantizer: quantizers.QuantizerConfig
    discriminator: discriminators.DiscriminatorConfig | None
    input_key: str  # the batch key it reconstructs; "segmentation" goes in as one-hot labels

    @classmethod
    def from_config(cls, model: Mapping[str, Any], key: str = "config.model") -> "VQGANConfig":
        """Builds it from `config.model`. Raises UserError that names the key."""
        quantizer = dict(model["quantizer"])
        kind = choose(f"{key}.quantizer.name", quantizer.pop("name"), quantizers.CONFIGS)
        discriminator = None
        if model["discriminator"]["enabled"]:
            fields = {name: value for name, value in model["discriminator"].items() if name != "enabled"}
            judge = choose(f"{key}.discriminator.name", fields.pop("name"), discriminators.CONFIGS)
            discriminator = to_dataclass(judge, fields, key=f"{key}.discriminator")
            if judge is discriminators.FeatureHeadsConfig and model["autoencoder"]["out_channels"] != 3:
                raise UserError(f"{key}.discriminator.name: 'dino' sees pictures of 3 channels only; take 'blurpool'")
        return cls(
            autoencoder=to_dataclass(AutoencoderConfig, model["autoencoder"], key=f"{key}.autoencoder"),
            quantizer=to_dataclass(kind, quantizer, key=f"{key}.quantizer"),
            discriminator=discriminator,
            input_key=model["input_key"],
        )

    @property
    def factor(self) -> int:
        """Pixels a code along a side."""
        return self.autoencoder.factor


def model_input(config: VQGANConfig, batch: Mapping[str, jax.Array]) -> jax.Array:
    """What the VQGAN reconstructs: float32 [b, h, w, c]; a segmentation as one-hot labels. Of a numpy array a numpy
    array, so that what is too large for the device stays on the host."""
    x = batch[config.input_key]
    if config.input_key == "segmentation":
        xp = x.__array_namespace__()
        return (x[..., None] == xp.arange(config.autoencoder.in_channels)).astype(xp.float32)
    return x


def model_output(config: VQGANConfig, reconstruction: jax.Array) -> jax.Array:
    """The inverse of `model_input`, in the form of the data: the likeliest labels int32 [b, h, w] of a segmentation's
    scores, else float32 [b, h, w, c] in [-1, 1]."""
    if config.input_key == "segmentation":
        return reconstruction.argmax(-1).astype(jnp.int32)
    return jnp.clip(reconstruction, -1, 1)


@struct.dataclass
class VQGANOutput:
    """One pass: reconstruction float32 [b, h, w, c], ids int32 [b, h', w'], what the quantizer says, and the input of
    the decoder's last layer [b, ...], from which the adaptive weight is computed."""

    reconstruction: jax.Array
    ids: jax.Array
    aux: quantizers.Aux
    features: jax.Array


class VQGAN(nn.Module):
    """Images float32 [b, h, w, c] in [-1, 1], sides divisible by `config.factor`, to codes and back."""

    config: VQGANConfig
    dtype: Dtype = jnp.float32
    remat: str = ""  # models/remat.py

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c.autoencoder, self.dtype, self.remat)
        self.decoder = Decoder(c.autoencoder, self.dtype, self.remat)
        self.quantizer = quantizers.make_quantizer(c.quantizer, "quantizer")
        self.pre_quant = Conv(self.quantizer.input_dim, 1, padding=(0, 0), dtype=self.dtype)
        self.post_quant = Conv(c.autoencoder.z_channels, 1, padding=(0, 0), dtype=self.dtype)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        step: jax.Array | int = 0,
        perturbation: Perturbation | None = None,
        fixed_codes: bool = False,
    ) -> VQGANOutput:
        """Encodes, quantizes and decodes; under a perturbation what is decoded are not quite the codes `ids`.
        `fixed_codes`: up to the codes as in evaluation, where the decoder alone trains."""
        encoding = train and not fixed_codes
        z_q, ids, aux = self.quantizer(self.pre_quantized(images, encoding), train=encoding, step=step)
        if perturbation and perturbation.share:
            others = perturbed(self.make_rng("quantizer"), ids, self.codebook(), perturbation, step)
            moved = jax.lax.stop_gradient(self.quantizer.codes(others) - z_q)
            z_q = jnp.where((others != ids)[..., None], z_q + moved, z_q)  # the gradient goes straight through
        reconstruction, features = self.decoder(self.post_quant(z_q), train)
        return VQGANOutput(reconstruction, ids, aux, features)

    def pre_quantized(self, images: jax.Array, train: bool = False) -> jax.Array:
        """What the quantizer sees: float32 [b, h', w', input_dim]."""
        return self.pre_quant(self.encoder(images, train)).astype(jnp.float32)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images to ids int32 [b, h', w']."""
        return self.quantizer(self.pre_quantized(images), train=False, step=0)[1]

    def decode(self, ids: jax.Array) -> jax.Array:
        """Ids int32 [b, h', w'] to images float32 [b, h, w, c], not clipped."""
        return self.decoder(self.post_quant(self.quantizer.codes(ids)))[0]

    def codebook(self) -> jax.Array:
        """All code vectors [q, e]."""
        return self.quantizer.codes(jnp.arange(self.quantizer.codebook_size))
