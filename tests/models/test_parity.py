"""Our modules compute what the reference computes: activations and losses to 1e-4 of their scale, ids exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests import reference as ref
from vqgan_jax import losses
from vqgan_jax.convert import names
from vqgan_jax.models.discriminators import PatchGAN, PatchGANConfig
from vqgan_jax.models.gpt import GPT
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN


def close(ours, theirs, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance * ref.scale(theirs))


@pytest.mark.parametrize(
    "config, file, arrays, case",
    [
        (ref.VQGAN_TINY, "vqgan_tiny.ckpt", "vqgan_tiny.npz", "square"),
        (ref.VQGAN_TINY, "vqgan_tiny.ckpt", "vqgan_tiny.npz", "rect"),
        (ref.VQSEG_TINY, "vqseg_tiny.ckpt", "vqseg_tiny.npz", "seg"),
    ],
)
def test_autoencoder(config, file, arrays, case):
    golden, model = ref.golden(arrays), VQGAN(config)
    variables = ref.vqgan_variables(config, ref.checkpoint(file))
    images = golden[f"{case}/image"]
    output = jax.jit(model.apply)(variables, images)
    pre_quant = model.apply(variables, images, method="pre_quantized")
    close(pre_quant, golden[f"{case}/pre_quant"])
    np.testing.assert_array_equal(output.ids, golden[f"{case}/indices"])
    close(output.aux.loss, golden[f"{case}/quant_loss"])
    close(output.reconstruction, golden[f"{case}/reconstruction"])
    close(model.apply(variables, output.ids, method="decode"), golden[f"{case}/reconstruction"])
    if case == "seg":
        np.testing.assert_array_equal(images.argmax(-1), golden["seg/labels"])
        close(losses.binary_cross_entropy(output.reconstruction, images), golden["seg/bce_loss"])


def test_gumbel_quantizer():
    golden, model = ref.golden("gumbel_tiny.npz"), VQGAN(ref.GUMBEL_TINY)
    variables = ref.vqgan_variables(ref.GUMBEL_TINY, ref.checkpoint("gumbel_tiny.ckpt"), quantizer="gumbel")
    bound = model.bind(variables)
    z = bound.pre_quantized(golden["image"])
    close(z, golden["pre_quant"])
    logits = bound.quantizer.logits(z)
    close(logits, golden["logits"])
    output = bound(golden["image"])
    close(output.aux.loss, golden["kl"])
    np.testing.assert_array_equal(output.ids, golden["indices_argmax"])
    close(output.reconstruction, golden["reconstruction_argmax"])
    soft = bound.quantizer.soft_codes(logits, golden["gumbel_noise"], 0.7)
    close(soft, golden["soft_tau0.7"])
    close(jnp.einsum("bhwq,qe->bhwe", soft, bound.codebook()), golden["soft_quantized_tau0.7"])


@pytest.mark.parametrize("case", ["lpips", "lpips_rect"])
def test_lpips(case):
    golden = ref.golden("vqgan_tiny.npz")
    distance = jax.jit(LPIPS().apply)(ref.lpips_variables(), golden[f"{case}/a"], golden[f"{case}/b"])
    close(distance, golden[f"{case}/value"])


def test_discriminator_in_both_modes():
    golden, config = ref.golden("vqgan_tiny.npz"), ref.VQGAN_TINY.discriminator
    variables = ref.discriminator_variables(config, ref.checkpoint("vqgan_tiny.ckpt"))
    model = PatchGAN(config)
    close(model.apply(variables, golden["disc/image"]), golden["disc/logits_eval"])
    logits, updated = model.apply(variables, golden["disc/image"], train=True, mutable=["batch_stats"])
    close(logits, golden["disc/logits_train"])
    close(updated["batch_stats"]["norm_1"]["mean"], golden["disc/running_mean_after"])
    close(updated["batch_stats"]["norm_1"]["variance"], golden["disc/running_var_after"])


def test_actnorm_discriminator_starts_from_its_first_batch():
    golden = ref.golden("actnorm_discriminator.npz")
    config = PatchGANConfig(16, 2, "actnorm", False)
    model = PatchGAN(config)
    variables = model.init(jax.random.key(0), golden["first_image"])
    tensors = {name.removeprefix("param/"): value for name, value in golden.items() if name.startswith("param/")}
    flat = {}
    for path, value in flatten_dict(variables["params"], sep="/").items():
        key = names.discriminator_key(path, 2, "main.")
        norm = path.startswith("norm")  # a fresh ActNorm: its start comes from the batch
        flat[path] = np.zeros_like(value) if norm else names.to_ours(tensors[key.name], key.layout)
    variables = {"params": unflatten_dict(flat, sep="/"), "batch_stats": variables["batch_stats"]}
    logits, started = model.apply(variables, golden["first_image"], train=True, mutable=["batch_stats"])
    close(logits, golden["first_logits_train"])
    for k, layer in ((1, 3), (2, 6)):
        stats = started["batch_stats"][f"norm_{k}"]
        close(stats["location"], golden[f"after_first/main.{layer}.loc"].reshape(-1))
        close(stats["scale"], golden[f"after_first/main.{layer}.scale"].reshape(-1))
    variables = variables | started
    logits, again = model.apply(variables, golden["second_image"], train=True, mutable=["batch_stats"])
    close(logits, golden["second_logits_train"])
    assert jax.tree.all(jax.tree.map(np.array_equal, started["batch_stats"], again["batch_stats"]))
    close(model.apply(variables, golden["second_image"]), golden["second_logits_eval"])


def test_class_transformer_logits_and_loss():
    golden, tensors = ref.golden("class_transformer_tiny.npz"), ref.checkpoint("class_transformer_tiny.ckpt")
    params = ref.gpt_params(ref.CLASS_GPT_TINY, tensors, "transformer.")
    first = ref.vqgan_variables(ref.FIRST_STAGE_TINY, tensors, "first_stage_model.")
    ids = VQGAN(ref.FIRST_STAGE_TINY).apply(first, golden["image"], method="encode").reshape(3, -1)
    np.testing.assert_array_equal(ids, golden["tokens"])
    inputs = jnp.concatenate([golden["cond_tokens"], ids], axis=1)[:, :-1]
    positions = jnp.arange(64)[None]
    logits, _ = jax.jit(GPT(ref.CLASS_GPT_TINY).apply)({"params": params}, inputs, positions_bt=positions)
    close(logits, golden["logits"])
    close(losses.token_nll(logits, ids).mean(), golden["loss"])


def test_bidirectional_prefix():
    golden = ref.golden("gpt_unmasked_prefix.npz")
    tensors = {name.removeprefix("param/"): value for name, value in golden.items() if name.startswith("param/")}
    config = ref.gpt_config(40, 40, 24, 2, 2, 16, 8, 0.0, 0.0, 0.0)
    params, tokens = ref.gpt_params(config, tensors), golden["tokens"]
    positions = jnp.arange(24)[None]
    logits, _ = GPT(config).apply({"params": params}, tokens, positions_bt=positions, attend="prefix")
    close(logits, golden["logits"])
    causal, _ = GPT(config).apply({"params": params}, tokens, positions_bt=positions, attend="causal")
    assert np.abs(causal - golden["logits"]).max() > 1e-2
