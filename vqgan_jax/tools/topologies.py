"""Slices of chips by name ("v5e:16x16", two of them "2xv5e:16x16"), as devices to compile for on a machine that has
none of them."""

import contextlib
import math
import os
import re
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc

from vqgan_jax.config import UserError, choose

# What libtpu calls a chip, and how many axes its slices have.
GENERATIONS = {"v4": ("v4", 3), "v5e": ("v5e", 2), "v5p": ("v5", 3), "v6e": ("v6e", 2)}
FORMS = (
    "v5e:4x4, v6e:16x16, v4:2x2x4, v5p:4x4x8 (chips along each axis), 2xv5e:16x16 (two slices), "
    "or cpu:8 (simulated devices)"
)
_FORM = re.compile(r"((?P<slices>[1-9]\d*)x)?(?P<chip>[a-z][a-z0-9]*):(?P<shape>[1-9]\d*(x[1-9]\d*)*)")


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice, or of several that a data center's network joins (Multislice), in their own order.

    `cpu:N` sets the number of simulated devices, so it must come before the first device is used.

    Raises:
      UserError: no topology, one that is not built, or libtpu is not installed.
    """
    match = _FORM.fullmatch(topology)
    if match is None:
        raise UserError(f"--topology={topology}: is none; write {FORMS}")
    shape, slices = tuple(int(n) for n in match["shape"].split("x")), int(match["slices"] or 1)
    if match["chip"] == "cpu":
        if slices > 1:
            raise UserError(f"--topology={topology}: simulated devices form no slices; write {FORMS}")
        return _simulated(topology, math.prod(shape))
    name, axes = choose(f"--topology={topology}", match["chip"], GENERATIONS | {"cpu": ("cpu", 1)})
    if len(shape) != axes:
        raise UserError(f"--topology={topology}: slices of {match['chip']} have {axes} axes; write {FORMS}")
    return _slices(topology, slices, name, shape)


def _simulated(topology: str, count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # devices are in use already: there may be enough
        jax.config.update("jax_num_cpu_devices", count)
    if len(devices := jax.devices("cpu")) < count:
        raise UserError(f"--topology={topology}: there are {len(devices)} devices; set JAX_NUM_CPU_DEVICES={count}")
    return devices[:count]


def _slices(topology: str, slices: int, name: str, shape: tuple[int, ...]) -> list[Any]:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a compiler holds no chip: two may run at once
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    host = tuple(min(2, n) for n in shape[:2]) + (1,)
    more: dict[str, Any] = {"chips_per_host_bounds": host, "num_slices": slices}
    if len(shape) == 3:
        more |= {"chip_config_name": "megacore", "wrap": tuple(n % 4 == 0 for n in shape)}
    try:
        found = get_topology_desc(platform="tpu", topology_name=f"{name}:{'x'.join(map(str, shape))}", **more)
    except Exception as error:  # of the plugin or of its absence: no class of its own
        text = " ".join(str(error).split())
        if "not installed" in text or "libtpu" in text:
            raise UserError(
                "--topology: the TPU compiler is not installed: pip install -r requirements-tpu.txt (or try cpu:8)"
            ) from None
        raise UserError(f"--topology={topology}: cannot be built ({text[:200]}); write {FORMS}") from None
    return list(found.devices)
