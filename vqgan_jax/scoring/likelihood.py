"""How likely held-out pictures are under a transformer, beside what costs nothing to know."""

import functools
import math
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vqgan_jax.evals.codes import histogram_entropy, table_nll
from vqgan_jax.evals.runner import encode_all, likelihood_scorer
from vqgan_jax.scoring.bench import Bench
from vqgan_jax.train import code_cache, setup
from vqgan_jax.trained_transformer import TrainedTransformer

TABLE_IMAGES = 65536  # training images behind the table of code frequencies, at most


def bits_per_dimension(nll: float, tokens: int, height: int, width: int) -> float:
    """Nats a token as bits a dimension: tokens * nll / (ln 2 * height * width * 3).

    What the codes of a picture cost, spread over its values. It is no bound on the picture itself, which the first
    stage keeps only in part, so compare models of one first stage by it.
    """
    return nll * tokens / (math.log(2) * height * width * 3)


def score(
    trained: TrainedTransformer, workdir: epath.Path, data: setup.Data, config: ConfigDict, bench: Bench, examples: int
) -> dict[str, Any]:
    """The likelihood of the held-out split.

    Args:
      trained: the model.
      workdir: where codes of the training split may lie.
      data: the data set.
      config: which names it.
      bench: devices.
      examples: at most so many, spread out; 0 for all.

    Returns:
      val_nll (nats a token), val_nll_stderr, val_bits (a token), val_bits_per_dim, val_accuracy, val_tokens; table_nll
      and histogram_entropy, what a table of code frequencies and their histogram pay for a token.
    """
    model, frozen, mesh, batch = trained.model, trained.frozen, bench.mesh, bench.batch
    held_out = functools.partial(setup.evaluation_batches, batch, mesh, data.val, data.val_transform, examples)
    found = likelihood_scorer(model, mesh, batch)(trained.params, frozen, held_out())
    result: dict[str, Any] = {f"val_{name}": value for name, value in found.items()}
    height, width = (side * model.first_stage.factor for side in model.config.grid)
    result["val_bits_per_dim"] = bits_per_dimension(found["nll"], len(model.order), height, width)

    # Beside it: a table of how often each code occurs, by class and position, and by nothing
    codes = code_cache.open_ready(config, workdir, model, trained.stages.digest) or data
    rows = setup.evaluation_batches(batch, mesh, codes.train, codes.val_transform, TABLE_IMAGES)
    train = encode_all(model, frozen, rows, mesh, batch, "codes of the training images")
    val = encode_all(model, frozen, held_out(), mesh, batch, "codes of the held-out images")
    size = model.first_stage.codebook_size
    train_codes, val_codes = (x["codes/image"].reshape(len(x["codes/image"]), -1) for x in (train, val))
    labels = (x.get("label") if "label" in model.condition.keys else None for x in (train, val))
    train_labels, val_labels = labels
    result["table_nll"] = table_nll(train_codes, train_labels, val_codes, val_labels, size)
    result["histogram_entropy"] = histogram_entropy(val_codes, size)
    return result
