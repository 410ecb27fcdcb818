"""Runs a refused batch again and names the operation that first gave a NaN: `config.replay` of both trainers."""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import vqgan_jax
from vqgan_jax import parallel, storage
from vqgan_jax.config import UserError

_SOURCE = Path(vqgan_jax.__file__).resolve().parent


def replay(
    file: str,
    step_fn: Callable[[Any, Mapping[str, jax.Array], Any], tuple[Any, Mapping[str, jax.Array]]],
    state: Any,
    frozen: Any,
    mesh: Mesh,
    *,
    step: int,
) -> str:
    """One step on a dumped batch from the state of a checkpoint, on one process; nothing is saved.

    Args:
      file: nonfinite/step_*.npz of a workdir: the batch by key.
      step_fn: the whole step, not jitted.
      state: of the newest checkpoint, which may be some steps older than the batch, or younger.
      frozen: what the step takes beside it.
      mesh: of the state.
      step: of the state; said in the answer.

    Returns:
      What was found, one line: the operation, its place in this package and the metrics that are not finite.

    Raises:
      UserError: the file cannot be read, or does not fit the model.
    """
    if jax.process_count() > 1:
        raise UserError("config.replay: takes one process; start it without --distributed")
    try:
        with storage.path(file).open("rb") as opened, np.load(opened) as arrays:
            rows = dict(arrays)
    except (OSError, ValueError) as error:
        raise UserError(f"config.replay={file}: cannot be read ({error}); name a file of WORKDIR/nonfinite") from None
    size = len(next(iter(rows.values())))
    batch = parallel.put_batch(rows, mesh, size)
    try:
        _, metrics = jax.jit(step_fn)(state, batch, frozen)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.replay={file}: does not fit this model ({str(error).splitlines()[0]})") from None
    bad = [name for name, value in jax.device_get(dict(metrics)).items() if not np.isfinite(value)]
    if not bad:
        return f"from the state of step {step} this batch is finite throughout"
    if broken := [name for name, array in rows.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]:
        return f"the batch itself is not finite: {', '.join(broken)}"
    with jax.debug_nans(True):
        try:
            jax.block_until_ready(jax.jit(step_fn)(state, batch, frozen))
        except FloatingPointError as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
            last = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
            file = Path(last.filename)
            place = f"{file.relative_to(_SOURCE.parent) if ours else file}:{last.lineno}: {last.line}"
            reason = str(error).split(". ")[0].splitlines()[0]
            return f"from the state of step {step}: {reason}, first in {place} (not finite: {', '.join(bad)})"
    return f"from the state of step {step}: infinite without a NaN (not finite: {', '.join(bad)})"


def _is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(_SOURCE) and Path(filename) != Path(__file__).resolve()
