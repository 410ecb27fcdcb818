"""The golden fixtures as our models see them: configurations, variables, and weights by the fixtures' seed rule."""

import json
import math
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqgan_jax.config import GPT2
from vqgan_jax.convert import names
from vqgan_jax.convert.stream import Entry, write_safetensors
from vqgan_jax.models.autoencoder import AutoencoderConfig
from vqgan_jax.models.discriminators import PatchGAN, PatchGANConfig
from vqgan_jax.models.gpt import GPT, GPTConfig
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.quantizers import GumbelConfig, VQConfig
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.torch_files import open_tensors

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one fixture."""
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


def autoencoder(multipliers=(1, 2), attention=(16,), channels=3) -> AutoencoderConfig:
    """The fixtures' encoder and decoder."""
    return AutoencoderConfig(channels, channels, 32, 32, multipliers, 1, 1, attention, True, 32, 0.0, 1)


def gpt_config(*sizes, coordinates=(), condition=1, **changes) -> GPTConfig:
    """GPT-2 of these sizes, the first fields of its config in their order, where `changes` say nothing else."""
    fields = {name: value for name, value in GPT2.items() if name != "positions"}
    return GPTConfig(*sizes, coordinates=coordinates, condition=condition, **fields | changes)


def vq(codes: int = 64, restart_below: float = 0.0) -> VQConfig:
    """The reference's quantizer: its beta stands on the codebook's side."""
    return VQConfig(codes, 16, 1.0, 0.25, restart_below, 0.9, False, "uniform")


VQGAN_TINY = VQGANConfig(autoencoder(), vq(), PatchGANConfig(16, 2, "batch", False), "image")
VQSEG_TINY = VQGANConfig(autoencoder((1, 1), channels=7), vq(32), None, "segmentation")
GUMBEL_TINY = VQGANConfig(autoencoder((1, 1)), GumbelConfig(48, 16, 32, 1e-2, False, 0.7, 0.7, "1"), None, "image")
FIRST_STAGE_TINY = VQGANConfig(autoencoder((1, 1, 1), (8,)), vq(), None, "image")
DEPTH_STAGE_TINY = VQGANConfig(autoencoder((1, 1, 1), (8,), 1), vq(), None, "depth")
CLASS_GPT_TINY = gpt_config(64, 64, 64, 2, 4, 32, 0, 0.0, 0.0, 0.0)


def shapes(init, *args, collection="params", **kwargs) -> dict[str, tuple[int, ...]]:
    """Our flat paths and shapes of one collection, without computing anything."""
    tree = nn.unbox(jax.eval_shape(lambda: init(*args, **kwargs)))
    return {path: leaf.shape for path, leaf in flatten_dict(tree[collection], sep="/").items()}


def vqgan_variables(config: VQGANConfig, tensors, prefix: str = "", quantizer: str = "vq") -> dict:
    """The generator's variables out of a checkpoint."""
    size = config.autoencoder.resolution
    images = jnp.zeros((1, size, size, config.autoencoder.in_channels))
    sizes = shapes(VQGAN(config).init, {"params": jax.random.key(0)}, images)

    def key(path):
        found = names.generator_key(path, quantizer)
        return names.Key(prefix + found.name, found.layout)

    return {"params": names.read_tree(tensors, sizes, key, "test")}


def discriminator_variables(config: PatchGANConfig, tensors) -> dict:
    """Parameters and running statistics of the PatchGAN out of a checkpoint."""
    init, images = PatchGAN(config).init, jnp.zeros((1, 32, 32, 3))
    return {
        collection: names.read_tree(
            tensors,
            shapes(init, jax.random.key(0), images, collection=collection),
            lambda path: names.discriminator_key(path, config.layers),
            "test",
        )
        for collection in ("params", "batch_stats")
    }


def seeded(name: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    """The fixtures' rule for weights that are too large to store."""
    r = np.random.RandomState(zlib.crc32((salt + name).encode()))
    if name.endswith("bias"):
        return (0.05 * r.standard_normal(shape)).astype(np.float32)
    fan = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    return (r.standard_normal(shape) * np.sqrt(2 / fan)).astype(np.float32)


def lpips_variables() -> dict:
    """LPIPS at full width with weights by the seed rule."""
    images = jnp.zeros((1, 32, 32, 3))
    sizes = shapes(LPIPS().init, jax.random.key(0), images, images)
    flat = {}
    for path, shape in sizes.items():
        key = names.lpips_key(path)
        reference_shape = names.to_reference(np.empty(shape, np.float32), key.layout).shape
        array = names.to_ours(seeded(key.name, reference_shape, "lpips/"), key.layout)
        flat[path] = np.abs(array) if path.startswith("linear") else array
    return {"params": unflatten_dict(flat, sep="/")}


def gpt_params(config: GPTConfig, tensors, prefix: str = "") -> dict:
    """The stacked parameters of the transformer out of a checkpoint."""
    ids = jnp.zeros((1, 2), jnp.int32)
    sizes = shapes(GPT(config).init, jax.random.key(0), ids, positions_bt=ids)
    key = lambda path, layer=None: names.gpt_key(path, layer, prefix)  # noqa: E731
    return jax.tree.map(jnp.asarray, names.read_tree(tensors, sizes, key, "test"))


def checkpoint(name: str):
    """A golden checkpoint's tensors."""
    return open_tensors(GOLDEN / name)


def scale(array: np.ndarray) -> float:
    """The size of an array's values, for tolerances relative to it."""
    return float(np.abs(array).max())


def inception_state() -> dict[str, np.ndarray]:
    """The FID's Inception with weights by the seed rule, under the published names."""
    state = {}
    for name, shape in json.loads((GOLDEN / "inception_shapes.json").read_text()).items():
        array = seeded(name, tuple(shape), "inception/")
        if name.endswith("running_var"):
            array = np.abs(array) * np.float32(0.5) + np.float32(0.5)
        elif name.endswith("running_mean"):
            array = np.float32(0.1) * np.clip(array, -1, 1)
        elif name.endswith("bn.weight"):
            array = 1 + np.float32(0.1) * np.sign(array) * np.minimum(np.abs(array), 1)
        state[name] = array
    return state


def write_state(path: Path, state: dict[str, np.ndarray]) -> str:
    """Writes tensors as a .safetensors file; returns its SHA-256."""
    return write_safetensors(path, [Entry(n, x.shape, x.dtype, lambda x=x: [x]) for n, x in state.items()])
