"""What the machine itself gives, beside which the benchmarks put their figures, and the models that several run."""

import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import modern_transformer, modern_vqgan, paper_transformer, paper_vqgan

_PAPER = {"307M": "class_imagenet", "1.4B": "class_imagenet_big"}  # rows of configs/paper_transformer.py
TRANSFORMERS = (*_PAPER, *modern_transformer.SIZES)


def transformer(name: str) -> tuple[ConfigDict, ConfigDict]:
    """Of TRANSFORMERS, or of the rows of configs/paper_transformer.py, the config of the run and `config.model` of its
    first stage."""
    row = _PAPER.get(name, name)
    if row in paper_transformer.ROWS:
        return paper_transformer.get_config(row), paper_vqgan.get_config(paper_transformer.ROWS[row].first).model
    return modern_transformer.get_config(name), modern_vqgan.get_config().model


def best(run: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Seconds of the fastest of several runs, after one that compiles."""
    jax.block_until_ready(run(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_rate(dtype: Any) -> tuple[float, str]:
    """Operations a second of a large matrix product on one device, and what is multiplied."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    return 2 * n**3 / best(jax.jit(jnp.dot), x, x, repeats=7), f"a product of {n} x {n} matrices"


def bandwidth() -> float:
    """Bytes a second that a reduction over a large array reads."""
    size = 2**28 if jax.default_backend() == "cpu" else 2**30  # floats
    x = jnp.ones((size // 1024, 1024), jnp.float32)
    return 4 * size / best(jax.jit(jnp.sum), x, repeats=7)


def machine() -> str:
    """What computed, to read."""
    device = jax.devices()[0]
    name = device.device_kind
    with contextlib.suppress(OSError):
        if device.platform == "cpu":
            models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
            name = f"{models[0].partition(': ')[2]}, {len(models)} cores" if models else platform.machine()
    return f"{name}, jax {jax.__version__}"
