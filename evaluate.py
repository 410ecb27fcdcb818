"""Scores a trained model on the held-out images of its own data set.

    python evaluate.py --workdir=runs/vqgan --out=runs/vqgan/evaluation.json
    python evaluate.py --workdir=runs/transformer --out=evaluation.json --samples=256

An imported model names no data: add --config=configs/finetune.py:DIR --config.data.path=/photos.

A VQGAN: PSNR, SSIM, L1, codebook usage and perplexity, on EMA weights, after uint8. A transformer: the same for its
first stage, the NLL of held-out codes beside that of a table of code frequencies, and, if it is class-conditional,
how many of its samples a small classifier trained on real images takes for the class asked for. The JSON says what
was scored; reconstructions.png lies next to it.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from vqgan_jax import cli, images, parallel, pretrained
from vqgan_jax.config import UserError
from vqgan_jax.evals.classifier import class_agreement, train_classifier
from vqgan_jax.evals.codes import histogram_entropy, table_nll
from vqgan_jax.evals.runner import encode_all, likelihood_scorer, reconstruction_scorer
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.train import code_cache, setup

FLAGS = flags.FLAGS

CLASSIFIER_IMAGES, CLASSIFIER_STEPS = 4096, 200


def evaluate(
    workdir: str, out: str, *, batch: int, examples: int, samples: int, seed: int, config: ConfigDict | None = None
) -> dict[str, Any]:
    """Scores the workdir, writes and returns the result; `config` names the data where the workdir does not."""
    path, out_path = Path(workdir), Path(out)
    if out_path.is_dir():
        raise UserError(f"--out={out}: is a folder; name the JSON file to write")
    cli.check_workdir(str(out_path.parent), "--out")
    kind = pretrained.kind_of(path, key="--workdir")
    if config is None:
        recorded = path / "config.json"
        if not recorded.exists():
            raise UserError(
                f"--workdir={workdir}: an imported model names no data; give --config=configs/finetune.py:{path}"
            )
        config = ConfigDict(json.loads(recorded.read_text()))
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    batch = -(-batch // mesh.size) * mesh.size
    score = {"transformer": evaluate_transformer, "vqgan": evaluate_vqgan}[kind]
    with jax.set_mesh(mesh):
        result = score(path, config, mesh, out_path.parent, batch=batch, examples=examples, samples=samples, seed=seed)
    result |= {"workdir": workdir, "seed": seed}
    out_path.write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, float)))
    return result


def evaluate_vqgan(path, config, mesh, folder, *, batch, examples, samples, seed) -> dict[str, Any]:
    """The reconstruction scores of a stage-1 workdir."""
    tokenizer, variables, trained = pretrained.load_tokenizer(path, key="--workdir")
    data = setup.open_data(config, (tokenizer.config.input_key,), factor=tokenizer.factor)
    return score_stage(tokenizer.model, variables, data, mesh, folder, batch, examples)


def score_stage(
    model: VQGAN, variables: Any, data: setup.Data, mesh: Any, folder: Path, batch: int, examples: int
) -> dict[str, Any]:
    """Reconstruction scores of the held-out split, and a sheet of pictures above their reconstructions."""
    batches = setup.evaluation_batches(batch, mesh, data.val, data.val_transform, examples)
    scores = reconstruction_scorer(model, mesh, batch)(variables, batches)
    if model.config.input_key == "image":
        shown = next(iter(setup.evaluation_batches(batch, mesh, data.val, data.val_transform, batch)))["image"][:16]
        rebuilt = np.asarray(jax.jit(model.apply)(variables, shown).reconstruction)
        rows = [images.to_uint8(half) for x in (slice(0, 8), slice(8, 16)) for half in (shown[x], rebuilt[x])]
        images.save_png(folder / "reconstructions.png", images.grid(np.concatenate(rows), columns=len(rows[0])))
    return {f"val_{k}" if not k.startswith("codebook") else k: v for k, v in scores.items()}


def evaluate_transformer(path, config, mesh, folder, *, batch, examples, samples, seed) -> dict[str, Any]:
    """The scores of a stage-2 workdir."""
    trained = pretrained.open_transformer(path, key="--workdir")
    model, frozen = trained.model, trained.frozen
    keys = (model.first_stage.config.input_key, *model.condition.keys)
    data = setup.open_data(config, keys, factor=model.first_stage.factor, classes=model.condition.vocab_size)
    result = score_stage(model.first_stage.model, frozen["first_stage"], data, mesh, folder, batch, examples)

    # Likelihood, beside what costs nothing to know
    held_out = functools.partial(setup.evaluation_batches, batch, mesh, data.val, data.val_transform, examples)
    nll = likelihood_scorer(model, mesh, batch)(trained.params, frozen, held_out())
    result |= {f"val_{name}": value for name, value in nll.items()}
    encode = functools.partial(code_cache.encode_source, model, frozen, mesh, batch, data)
    train = code_cache.open_cache(path / "codes.npz", config, trained.stages.digest, encode, keep=False).arrays
    val = encode_all(model, frozen, held_out(), mesh, batch, "encode the held-out images")
    size = model.first_stage.codebook_size
    train_codes, val_codes = (x["codes/image"].reshape(len(x["codes/image"]), -1) for x in (train, val))
    labels = (x.get("label") if "label" in model.condition.keys else None for x in (train, val))
    train_labels, val_labels = labels
    result["table_nll"] = table_nll(train_codes, train_labels, val_codes, val_labels, size)
    result["histogram_entropy"] = histogram_entropy(val_codes, size)

    # Do the samples show the class asked for?
    if samples and "label" in model.condition.keys:
        result |= score_classes(trained, data, samples, batch, seed)
    return result


def score_classes(trained: Any, data: setup.Data, samples: int, batch: int, seed: int) -> dict[str, Any]:
    """Trains a classifier on real images, checks it on held-out ones, and lets it judge samples of every class."""
    model, classes = trained.model, len(data.train.classes)
    pictures, labels = read_images(data.train, data.val_transform, CLASSIFIER_IMAGES)
    classifier = train_classifier(pictures, labels, classes, seed=seed, steps=CLASSIFIER_STEPS)
    accuracy = classifier.accuracy(*read_images(data.val, data.val_transform, 512))
    asked = np.resize(np.arange(classes, dtype=np.int32), samples)
    made = trained.samples(asked, model.config.grid, seed=seed, batch=batch, strategy=Strategy())
    agreement = class_agreement(classifier, np.concatenate(list(made)), asked)
    return {"class_agreement": agreement, "classifier_accuracy": accuracy, "class_samples": samples}


def read_images(source: Any, transform: Any, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` examples of a source, spread out: uint8 pictures as the model sees them, and labels."""
    rng = np.random.default_rng(0)
    indices = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
    rows = [transform(source[int(i)], rng) for i in indices]
    return images.to_uint8(np.stack([row["image"] for row in rows])), np.stack([row["label"] for row in rows])


def define_flags() -> None:
    """The flags of this script."""
    config_flags.DEFINE_config_file("config", None, "Names the data (config.data) of a model that was imported.")
    flags.DEFINE_string("workdir", None, "Workdir of either trainer, or an imported model.")
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_integer("batch", 32, "Images scored at once.", lower_bound=1)
    flags.DEFINE_integer("examples", 0, "Held-out images to score; 0 = all.", lower_bound=0)
    flags.DEFINE_integer("samples", 256, "Images to sample for the class agreement; 0 = none.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the samples and the classifier.")


if __name__ == "__main__":
    define_flags()
    cli.run(
        lambda: evaluate(
            FLAGS.workdir,
            FLAGS.out,
            batch=FLAGS.batch,
            examples=FLAGS.examples,
            samples=FLAGS.samples,
            seed=FLAGS.seed,
            config=FLAGS.config,
        ),
        required=("workdir", "out"),
    )
