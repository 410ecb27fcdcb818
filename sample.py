"""Samples new images from a trained transformer.

    python sample.py --workdir=runs/transformer --out=samples --number=64 --top_k=100
    python sample.py --workdir=runs/transformer --out=panorama --number=4 --size=64x512

Writes one PNG an image, samples.npz (arr_0: uint8 [n, h, w, 3], and `label` where there is one) and grid.png. A size
beyond the trained one is made with the sliding window. The same seed gives image number i whatever the batch size.
"""

import numpy as np
from absl import flags
from tqdm import tqdm

from vqgan_jax import cli, images, pretrained
from vqgan_jax.config import UserError
from vqgan_jax.sampling.strategies import Strategy

FLAGS = flags.FLAGS


def sample(
    workdir: str,
    out: str,
    *,
    number: int,
    batch: int = 16,
    seed: int = 0,
    strategy: Strategy | None = None,
    classes: list[str] | None = None,
    size: str = "",
    best: bool = True,
) -> np.ndarray:
    """Samples, writes and returns the images, uint8 [n, h, w, 3]."""
    folder = cli.check_workdir(out, "--out")
    batch = min(batch, number)

    # Model
    trained = pretrained.open_transformer(workdir, key="--workdir", best=best)
    model, factor = trained.model, trained.model.first_stage.factor
    grid = parse_size(size, factor) if size else model.config.grid

    # What to sample: image i is of class labels[i]
    names = trained.record.get("classes") or []
    count = len(names) or model.condition.vocab_size  # a data set may have fewer classes than its model
    labels = choose_labels(model.condition.keys, count, names, classes or [], number)

    # Sampling
    made: list[np.ndarray] = []
    batches = trained.samples(labels, grid, seed=seed, batch=batch, strategy=strategy or Strategy())
    for start, pictures in zip(tqdm(range(0, number, batch), desc="sample", unit="batch"), batches, strict=True):
        for index, picture in enumerate(pictures, start):
            images.save_png(folder / f"{index:06d}.png", picture)
        made.append(pictures)
    made = np.concatenate(made)

    # Sheets
    extra = {"label": labels} if "label" in model.condition.keys else {}
    np.savez(folder / "samples.npz", arr_0=made, **extra)
    images.save_png(folder / "grid.png", sheet(made, labels, names if extra else []))
    print(f"{number} images of {made.shape[1]}x{made.shape[2]} in {folder}")
    return made


def parse_size(text: str, factor: int) -> tuple[int, int]:
    """ "64x512" as a grid of codes."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise UserError(f"--size={text}: write HEIGHTxWIDTH in pixels, such as 64x512")
    if any(int(part) % factor for part in parts):
        raise UserError(f"--size={text}: height and width must be multiples of {factor}")
    return int(parts[0]) // factor, int(parts[1]) // factor


def choose_labels(keys: tuple[str, ...], count: int, names: list[str], asked: list[str], number: int) -> np.ndarray:
    """One label a sample, int32 [number]: the classes asked for in turn, or all of them."""
    if "label" not in keys:
        if keys:
            raise UserError(
                f"--workdir: this model needs a condition ({', '.join(keys)}), which sample.py cannot give it yet"
            )
        if asked:
            raise UserError("--classes: this model is unconditional")
        return np.zeros(number, np.int32)
    ids = []
    for text in asked:
        if text not in names and not (text.isdigit() and int(text) < count):
            raise UserError(f"--classes: no class '{text}'; there are 0 to {count - 1}: {', '.join(names)}")
        ids.append(names.index(text) if text in names else int(text))
    return np.resize(np.asarray(ids or range(count), np.int32), number)


def sheet(pictures: np.ndarray, labels: np.ndarray, names: list[str], most: int = 8) -> np.ndarray:
    """A grid, one labelled row a class where classes have names."""
    if not names:
        wide = pictures.shape[2] > 2 * pictures.shape[1]
        return images.grid(pictures[: most**2], columns=1 if wide else None)
    return images.labelled_rows({names[k]: pictures[labels == k][:most] for k in np.unique(labels)})


def define_flags() -> None:
    """The flags of this script."""
    flags.DEFINE_string("workdir", None, "Workdir of train_transformer.py, or an imported transformer.")
    flags.DEFINE_string("out", None, "Folder to write to.")
    flags.DEFINE_integer("number", 16, "How many images.", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "Images sampled at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the run; image i depends on the seed and on i alone.")
    flags.DEFINE_float("temperature", 1.0, "Divides the logits: below 1 is safer, above 1 wilder.", lower_bound=1e-6)
    flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest codes only; 0 = from all.", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest codes that hold this share; 1 = from all.", 0.0, 1.0)
    flags.DEFINE_bool("greedy", False, "Take the likeliest code always.")
    flags.DEFINE_list("classes", [], "Class names or numbers to sample, in turn; all by default.")
    flags.DEFINE_string(
        "size", "", "HEIGHTxWIDTH in pixels, each at least the trained size; the trained size by default."
    )
    flags.DEFINE_bool("best", True, "The best checkpoint by validation NLL; --nobest takes the newest.")


if __name__ == "__main__":
    define_flags()
    cli.run(
        lambda: sample(
            FLAGS.workdir,
            FLAGS.out,
            number=FLAGS.number,
            batch=FLAGS.batch,
            seed=FLAGS.seed,
            strategy=Strategy(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.greedy),
            classes=FLAGS.classes,
            size=FLAGS.size,
            best=FLAGS.best,
        ),
        required=("workdir", "out"),
    )
