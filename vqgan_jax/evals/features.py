"""From uint8 pictures to the features that FID and its kin compare, exactly as each published tool prepares them.

Presets: the ImageNet evaluator of arXiv 2105.05233 ("adm"), pytorch-fid, torch-fidelity, clean-fid (arXiv 2104.11222).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any
# Pictures uint8 [n, h, w, 3] and their indices in the set, int [n]. Sizes may differ from item to item.
Images = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A frozen network that describes pictures.

    Attributes:
      name: what it is, for people.
      apply: (variables, prepared float32 [b, size, size, 3]) -> {"pool": [b, d], "spatial": [b, s], "logits": [b, c]}.
      variables: what `apply` takes.
      sha256: of the file of weights; statistics of different networks are never compared.
      size: height and width of its input.
    """

    name: str
    apply: Callable[[Tree, jax.Array], dict[str, jax.Array]]
    variables: Tree
    sha256: str
    size: int = 299

    def dims(self) -> dict[str, int]:
        """How many numbers each output has a picture."""
        picture = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32)
        return {name: x.shape[1] for name, x in jax.eval_shape(self.apply, self.variables, picture).items()}


@dataclasses.dataclass(frozen=True)
class Features:
    """What a network says of n pictures, whose `indices` [n] are those they came with: float32 [n, ...] each."""

    indices: np.ndarray
    pool: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


def _hat(centres: np.ndarray, size: int) -> np.ndarray:
    """Weights of linear interpolation between pixels, the border repeated: [len(centres), size]."""
    distance = np.abs(np.clip(centres, 0, size - 1)[:, None] - np.arange(size))
    return np.maximum(1 - distance, 0)


def tf1_bilinear(size: int, to: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize, which aligns the corners of pixels wrongly: weights [to, size]."""
    return _hat(np.arange(to) * size / to, size)


def torch_bilinear(size: int, to: int) -> np.ndarray:
    """PyTorch's bilinear resize, half-pixel centres and no antialiasing: weights [to, size]."""
    return _hat((np.arange(to) + 0.5) * size / to - 0.5, size)


def pil_bicubic(size: int, to: int) -> np.ndarray:
    """Pillow's bicubic resize, antialiased where it shrinks: weights [to, size]."""
    scale = size / to
    x = np.abs((np.arange(size) + 0.5 - (np.arange(to)[:, None] + 0.5) * scale) / max(scale, 1))
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys's kernel, a = -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Preset:
    """One tool's conventions. No tool adds the last layer's bias to the logits of its Inception Score.

    Attributes:
      name: its key in PRESETS.
      resize: (size, to) -> weights [to, size] along one axis.
      offset, divisor: what the network gets is (value - offset) / divisor, of values 0..255.
      clip: whether resized values are brought back to 0..255 (bicubic weights overshoot).
      split_size: pictures a split of the Inception Score, in the order of the set; None for ten splits of it shuffled.
      reference_features: how many of a reference's pictures precision, recall and KID compare with at most.
    """

    name: str
    resize: Callable[[int, int], np.ndarray]
    offset: float
    divisor: float
    clip: bool = False
    split_size: int | None = None
    reference_features: int = 50_000

    def weights(self, size: int, to: int) -> np.ndarray:
        """The resize's weights along one axis, float32 [to, size]."""
        return _weights(self.resize, size, to)

    def normalise(self, resized: Any) -> Any:
        """Resized values 0..255 to what the network takes, for arrays of either library."""
        return ((resized.clip(0, 255) if self.clip else resized) - self.offset) / self.divisor

    def splits(self, count: int) -> np.ndarray:
        """Which split of the Inception Score each of `count` pictures belongs to, by index: int64 [count]."""
        if self.split_size:
            return np.arange(count) // self.split_size
        split = np.empty(count, np.int64)
        bounds = np.arange(11) * count // 10
        # torch-fidelity's shuffle, so that splits do not follow the order of classes
        split[np.random.RandomState(2020).permutation(count)] = np.repeat(np.arange(10), np.diff(bounds))
        return split


@functools.lru_cache(maxsize=4096)
def _weights(resize: Callable[[int, int], np.ndarray], size: int, to: int) -> np.ndarray:
    return resize(size, to).astype(np.float32)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("adm", tf1_bilinear, 128, 128, split_size=5000, reference_features=10_000),
        Preset("pytorch-fid", torch_bilinear, 127.5, 127.5),
        Preset("torch-fidelity", tf1_bilinear, 128, 128),
        Preset("clean", pil_bicubic, 128, 128, clip=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network under a preset, compiled for the devices of this host: `extract(images)` yields their Features.

    Every host hands in its own pictures; nothing is exchanged. Features come in another order than the pictures where
    sizes differ, and in batches of another size, so go by `indices`.
    """

    net: FeatureNet
    preset: Preset
    run: Callable[[np.ndarray], dict[str, jax.Array]]
    rows: int

    def __call__(self, images: Images) -> Iterator[Features]:
        """Raises ValueError: pictures that are not uint8 [n, h, w, 3]."""
        before = None  # the device computes one batch while the last one is fetched
        for batch, indices in self._batches(images):
            output = self.run(batch)
            if before is not None:
                yield _fetch(*before)
            before = output, indices
        if before is not None:
            yield _fetch(*before)

    def _batches(self, images: Images) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Full batches, padded at the end, with the indices of their real rows. Pictures of the first one's size are
        resized on the device, the rest here: a set of many sizes would compile as often."""
        same, others, shape = _Rows(self.rows), _Rows(self.rows), None
        for pixels, indices in images:
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
                raise ValueError(f"features are of uint8 [n, h, w, 3], not {pixels.dtype} {pixels.shape}")
            shape = shape or pixels.shape[1:]
            if pixels.shape[1:] == shape:
                yield from same.add(pixels, indices)
            else:
                yield from others.add(self._prepare(pixels), indices)
        yield from same.rest()
        yield from others.rest()

    def _prepare(self, pixels: np.ndarray) -> np.ndarray:
        rows, columns = (self.preset.weights(size, self.net.size) for size in pixels.shape[1:3])
        n, h, w, _ = pixels.shape
        tall = np.matmul(rows, pixels.reshape(n, h, w * 3).astype(np.float32)).reshape(n, self.net.size, w, 3)
        return self.preset.normalise(np.matmul(columns, tall))


class _Rows:
    """A queue of rows that leave in batches of one size."""

    def __init__(self, size: int):
        self._size, self._arrays, self._indices, self._count = size, [], [], 0

    def add(self, array: np.ndarray, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Puts rows in; yields every batch that is full."""
        self._arrays.append(array)
        self._indices.append(np.asarray(indices, np.int64))
        self._count += len(array)
        if self._count >= self._size:
            array, indices = np.concatenate(self._arrays), np.concatenate(self._indices)
            whole = len(array) // self._size * self._size
            for start in range(0, whole, self._size):
                yield array[start : start + self._size], indices[start : start + self._size]
            self._arrays, self._indices, self._count = [array[whole:]], [indices[whole:]], len(array) - whole

    def rest(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What is left, its batch filled up with zeros."""
        if self._count:
            array = np.concatenate(self._arrays)
            padding = [(0, self._size - len(array))] + [(0, 0)] * (array.ndim - 1)
            yield np.pad(array, padding), np.concatenate(self._indices)


def _fetch(output: dict[str, jax.Array], indices: np.ndarray) -> Features:
    """The real rows, on the host."""
    output = jax.device_get(output)
    rows = {name: np.asarray(output[name], np.float32)[: len(indices)] for name in ("pool", "spatial", "logits")}
    return Features(indices, **rows)


def make_extractor(net: FeatureNet, preset: Preset, mesh: Mesh, batch: int) -> Extractor:
    """Compiles a network for all devices of the mesh that this host has, each with a copy of it and a share of a batch.

    Args:
      net: the network.
      preset: one of PRESETS.
      mesh: of all hosts.
      batch: pictures at once on this host, rounded up to a multiple of its devices.
    """
    local = mesh.local_mesh
    rows = -(-batch // local.size) * local.size
    sharding = NamedSharding(local, P(local.axis_names))
    variables = jax.device_put(net.variables, NamedSharding(local, P()))
    apply = jax.jit(net.apply)

    @jax.jit
    def prepare(pixels: jax.Array, tall: jax.Array, wide: jax.Array) -> jax.Array:
        pixels = pixels.astype(jnp.float32)
        return preset.normalise(jnp.einsum("bhwc,yh,xw->byxc", pixels, tall, wide, precision=jax.lax.Precision.HIGHEST))

    def run(batch: np.ndarray) -> dict[str, jax.Array]:
        with jax.set_mesh(local):
            prepared = jax.device_put(batch, sharding)
            if batch.dtype == np.uint8:
                prepared = prepare(prepared, *(preset.weights(size, net.size) for size in batch.shape[1:3]))
            return apply(variables, prepared)

    return Extractor(net, preset, run, rows)
