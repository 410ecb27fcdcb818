"""The mesh, the one table of logical axis names, state shardings, and which rows of a batch a host holds.

`jax.jit` with shardings over a mesh is what `pjit` became. Axes of the mesh: `data` (copies of the model), `fsdp` (the
batch and the parameters), `tensor` (heads, MLP and vocabulary).
"""

import collections
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vqgan_jax.config import UserError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis. An unknown name raises KeyError: a typo must not silently mean "not sharded".
AXES: dict[str, Any] = {
    "batch": BATCH_AXES,
    "length": None,
    "layers": None,
    "width": "fsdp",  # of a transformer's parameters
    "activation": None,  # the same width, of activations
    "heads": "tensor",  # heads and head dimension, folded
    "mlp": "tensor",
    "vocab": "tensor",
    "position": None,
}
MIN_SHARDED_SIZE = 2**12  # parameters without logical names (convolutions) smaller than this are replicated


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of a config: `{"data": -1, "fsdp": 1, "tensor": 1}`, where one size may be -1 (what is left).

    On several slices (TPU Multislice) or nodes of GPUs the first batch axis that they divide runs over them.

    Raises:
      UserError: sizes that do not multiply to the number of devices, or do not fit the chips' network.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[name] for name in MESH_AXES]
    known = math.prod(s for s in shape if s != -1)
    asked = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(s == 0 or s < -1 for s in shape):
        raise UserError(f"config.mesh: sizes are positive and at most one is -1, got {asked}")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh: {asked} does not fit {len(devices)} devices; "
            "the product of data, fsdp and tensor must be the number of devices (one may be -1)"
        )
    if len({slice_of(device) for device in devices}) == 1:
        try:
            return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
        except NotImplementedError as error:  # of a TPU's torus
            raise UserError(f"config.mesh: {asked} cannot be laid onto these chips, choose others ({error})") from None
    return Mesh(_over_slices(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def slice_of(device: jax.Device) -> int:
    """The slice of a TPU, the node of a GPU; 0 where JAX knows of neither."""
    return getattr(device, "slice_index", 0)


def _over_slices(shape: list[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices of several slices, or nodes of GPUs, [data, fsdp, tensor]: `data`, or else `fsdp`, runs over the slow
    network between them, the rest stays inside. Where neither divides, or nodes differ in size, GPUs are taken node by
    node, so that an axis spans no more nodes than it must.

    Raises:
      UserError: TPUs where neither axis divides over the slices, or what is left does not fit the chips' network.
    """
    sizes = collections.Counter(map(slice_of, devices))
    slices, even = len(sizes), len(set(sizes.values())) == 1
    for axis in range(len(BATCH_AXES)):
        if even and shape[axis] % slices == 0:
            between = [slices if k == axis else 1 for k in range(3)]
            inside = [size // parts for size, parts in zip(shape, between, strict=True)]
            split = devices[0].device_kind == "TPU v5 lite"  # as jax.make_mesh lays two axes on one of the torus
            try:
                return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=split)
            except NotImplementedError as error:
                raise UserError(f"config.mesh: {inside} in a slice cannot be laid onto its chips ({error})") from None
    if devices[0].platform == "gpu":
        return np.array(sorted(devices, key=lambda device: (slice_of(device), device.id))).reshape(shape)
    raise UserError(f"config.mesh: the devices are {slices} slices; make data (or fsdp) a multiple of {slices}")


def check_batch(batch: int, mesh: Mesh, key: str = "config.batch_size") -> None:
    """Raises UserError unless `batch` divides over the mesh's data and fsdp axes."""
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if batch % parts:
        raise UserError(f"{key}: {batch} examples do not divide over {parts} devices (data x fsdp); use a multiple")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose leading axis is the batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def host_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Rows of a global batch that this host's devices hold, ascending: int64 [rows].

    Not a function of the process index: hosts that share a data shard (`tensor` across hosts) load the same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices.values()]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, global_batch: int) -> dict[str, jax.Array]:
    """Places this host's rows [rows, ...] as global arrays [global_batch, ...], sharded over the batch axes."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (global_batch, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def check_hosts_agree(batch: Mapping[str, jax.Array], mesh: Mesh) -> None:
    """Raises UserError, on every host, unless all hosts that hold the same rows of a batch hold them alike.

    JAX takes what each host hands it: where a model axis spans hosts, those that read other data (a file missing on
    one, another version of a folder) would train on different batches without a word.
    """
    shards = math.prod(mesh.shape[name] for name in BATCH_AXES)
    mine = np.zeros((shards, 9), np.uint32)  # of each data shard: whether it is here, and the digest of its rows
    for shard in range(shards):
        digest, here = hashlib.sha256(), False
        for name, array in sorted(batch.items()):
            start = shard * (array.shape[0] // shards)
            rows = [s.data for s in array.addressable_shards if (s.index[0].start or 0) == start]
            for copy in rows[:1]:
                here = True
                digest.update(f"{name} {copy.dtype} {copy.shape}".encode() + np.asarray(copy).tobytes())
        mine[shard] = [here, *np.frombuffer(digest.digest(), np.uint32)]
    hosts = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, *mine.shape)
    for shard in range(shards):
        holders = [host for host in range(len(hosts)) if hosts[host, shard, 0]]
        if len(np.unique(hosts[holders, shard], axis=0)) > 1:
            raise UserError(
                f"config.data: hosts {', '.join(map(str, holders))} share data shard {shard} of {shards} but read "
                "different examples for it; give all hosts the same files, config and seed"
            )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's sharding by logical names, one a dimension (None = unsharded); no-op without a mesh.

    A dimension that its axes do not divide is left to the compiler.

    Raises:
      KeyError: a name that is not in the table.
      ValueError: as many names as dimensions are needed.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names for an array of shape {x.shape}")
    spec, mesh = to_mesh_axes(names), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _that_divide(spec, x.shape, mesh, otherwise=P.UNCONSTRAINED))


def to_mesh_axes(names: tuple[str | None, ...]) -> P:
    """Looks logical names up in the table."""
    return P(*(None if name is None else AXES[name] for name in names))


def shard_by_size(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Shards the largest dimension that `fsdp` divides, for parameters without logical names (convolutions)."""
    parts = mesh.shape["fsdp"]
    if parts == 1 or math.prod(shape) < MIN_SHARDED_SIZE:
        return P()
    candidates = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if not candidates:
        return P()
    best = max(candidates, key=lambda axis: (shape[axis], axis))
    return P(*("fsdp" if axis == best else None for axis in range(len(shape))))


def state_shardings(abstract: Any, mesh: Mesh) -> Any:
    """Shardings of a state whose leaves may be boxed with logical names (`nn.with_logical_partitioning`).

    Args:
      abstract: `jax.eval_shape` of the state's initialiser, boxes included.
      mesh: the mesh.

    Returns:
      The unboxed tree of NamedSharding: by name where there is a box, else by size.
    """

    def shard(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, _that_divide(to_mesh_axes(leaf.names), leaf.value.shape, mesh))
        return NamedSharding(mesh, shard_by_size(leaf.shape, mesh))

    return jax.tree.map(shard, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def _that_divide(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, otherwise: Any = None) -> P:
    """The axes of a spec whose parts divide their dimension; a vocabulary of 1025 is not sharded over two."""

    def parts(axes: Any) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(mesh.shape[name] for name in names)

    return P(*(axes if size % parts(axes) == 0 else otherwise for axes, size in zip(spec, shape, strict=True)))


def init_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Runs `init(*args)` in one jit whose outputs are born sharded, and unboxed."""
    shardings = state_shardings(jax.eval_shape(init, *args), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(lambda *a: nn.unbox(init(*a)), out_shardings=shardings)(*args)


def abstract_sharded(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """The ShapeDtypeStructs, with shardings, of what `init_sharded` makes: what a checkpoint is restored into."""
    boxed = jax.eval_shape(init, *args)
    shardings = state_shardings(boxed, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)


def platform() -> str:
    """What a program traced now is for ("cpu", "gpu", "tpu"): the mesh in context, which may be a slice that this
    machine has not, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def scan_unroll(length: int) -> int:
    """How far to unroll a scan over layers or micro-batches: wholly on CPU, where convolutions inside a loop run many
    times slower, else not at all."""
    return length if platform() == "cpu" else 1


def to_host(x: jax.Array) -> np.ndarray:
    """A global array as numpy on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def of_first_host(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first host, which alone calls it: plain data (JSON), the same on all hosts."""
    if jax.process_count() == 1:
        return make()
    text = np.frombuffer(json.dumps(make()).encode() if jax.process_index() == 0 else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    whole = text if text.size else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(whole)).astype(np.uint8).tobytes())


def put_tree(tree: Any, mesh: Mesh) -> Any:
    """Places frozen parameters, equal on all hosts, sharded by size."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, shard_by_size(x.shape, mesh))), tree)


def local_rows(array: Any) -> np.ndarray:
    """The rows of an array sharded over the batch that this host holds, replicas once, in order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[row]) for row in sorted(shards)])


def say(text: str) -> None:
    """Prints a line, on the first host alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array of either library."""
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype)


def compile_if_it_fits(lowered: Any) -> Any | None:
    """The compiled program; None where the compiler of a TPU refuses one that exceeds the device's memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not exceeds_memory(error):
            raise
        return None


def exceeds_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the compiler refused a program, or a device an allocation, for want of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def device_bytes(compiled: Any) -> int:
    """Bytes that a compiled program takes on each device: arguments, results and workspace."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
