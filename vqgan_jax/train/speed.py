"""What a trainer logs of its speed beside rates: the share of the chips' peak, their memory, the wait for data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vqgan_jax.parallel import shape_of
from vqgan_jax.train import roofline


def flops_counter(step: Callable[..., Any], state: Any, frozen: Any) -> Callable[[Mapping[str, jax.Array]], float]:
    """Returns `batch -> FLOPs of step(state, batch, frozen)` over all devices; nothing runs, no array is kept.

    Args:
      step: of a model without remat, for what is computed again does not count.
      state, frozen: the arrays or their ShapeDtypeStructs.
    """
    state, frozen = jax.tree.map(shape_of, (state, frozen))

    return lambda batch: roofline.count_flops(roofline.trace_plain(step, state, dict(batch), frozen))


def utilisation(flops: Callable[[], float]) -> dict[str, float]:
    """A step's share of what all chips do in a second at their bfloat16 peak: `mfu`, once divided by the step's
    seconds. Nothing on devices whose peak is not known (a CPU), where nothing is counted either."""
    chip = roofline.chip_of(jax.devices()[0].device_kind)
    return {"mfu": flops() / (chip.peak_flops * jax.device_count())} if chip else {}


def memory_in_use() -> dict[str, float]:
    """GiB in use, and at most so far, on the fullest of this host's devices; nothing where a device does not say."""
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    known = {ours: [s[name] for s in stats if name in s] for ours, name in names.items()}
    return {name: max(values) / 2**30 for name, values in known.items() if values}


def of_steps(rates: Mapping[str, float], seconds: Sequence[float], waits: Sequence[float]) -> dict[str, float]:
    """Scalars of an interval.

    Args:
      rates: amounts a step, given a second in the result.
      seconds: of each step.
      waits: of these, how many went by waiting for data.
    """
    if not seconds:
        return {}
    mean, wait = float(np.mean(seconds)), float(np.mean(waits))
    speed = {name: amount / mean for name, amount in rates.items()}
    speed |= {"step_seconds": mean, "step_seconds_p99": float(np.percentile(seconds, 99))}
    return speed | {"data_wait_seconds": wait, "data_wait_share": wait / mean} | memory_in_use()
