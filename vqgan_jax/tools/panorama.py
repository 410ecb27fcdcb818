"""A panorama of 4096 x 1024 pixels from a drawn map, made on a CPU: two VQGANs and a transformer trained on crops of
larger landscapes, then the sliding window. STEPS is the whole; docs/large_images.md says what came of it."""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.tools.steps import ROOT, SHARPER, Runner, Step, Steps, exit_code, run_child

MAP = "docs/panorama_map.png"
PICTURE = "panorama.png"

# Windows of 8 x 8 codes, 16 pixels a code, out of scenes as high as the panorama: things are as large as there.
# Of noon alone, so that the codebook holds shapes rather than the colours of all times.
CROPS = ("--config.data.image_size=128", "--config.data.crop=random")
AS_LARGE = (
    "--config.data.classes=noon_lake,noon_meadow",
    "--config.data.resize_to=1024",
    "--config.data.train_examples=256",
    "--config.data.val_examples=32",
)
# Maps of scenes half as high: more in a crop, which of the others is too often one class alone to learn from.
SMALLER = (
    "--config.data.resize_to=512",
    "--config.data.train_examples=512",
    "--config.data.val_examples=128",
)
AUTOENCODER = (
    "--config.model.autoencoder.resolution=128",
    "--config.model.autoencoder.stem=8",
    "--config.model.autoencoder.mid_attention=False",  # which would see the whole panorama
)
RARELY = (
    "--config.eval_every=50%",
    "--config.save_every=50%",
    "--config.images_every=50%",
    "--config.eval_examples=32",
)

TRAINING = (
    Step(
        "train the VQGAN",
        (
            "train_vqgan.py",
            "--config=configs/demo_vqgan.py",
            *CROPS,
            *AS_LARGE,
            *AUTOENCODER,
            "--config.model.autoencoder.channels=96",
            "--config.model.quantizer.codebook_size=512",
            "--config.loss.reconstruction=l1",
            "--config.optimizer.learning_rate=1.5e-3",
            "--config.optimizer.hold=30%",
            "--config.steps=1400",
            *RARELY,
            "--workdir={out}/vqgan",
        ),
        seconds=210,
    ),
    Step(
        "train the VQGAN of segmentation",
        (
            "train_vqgan.py",
            "--config=configs/demo_vqgan.py:input=segmentation",
            *CROPS,
            *SMALLER,
            *AUTOENCODER,
            "--config.model.autoencoder.channels=64",
            "--config.steps=500",
            *RARELY,
            "--workdir={out}/segmentation",
        ),
        seconds=105,
    ),
    Step(
        "train the transformer",
        (
            "train_transformer.py",
            "--config=configs/demo_transformer.py:condition=segmentation_coordinates",
            "--config.vqgan={out}/vqgan",
            "--config.cond_vqgan={out}/segmentation",
            *CROPS,
            *AS_LARGE,
            # The scalar is as good as the row alone: joint places of pictures so wide were never trained on.
            "--config.model.condition.place.scheme=raster",
            "--config.model.condition.place.codes=64",
            "--config.model.condition.place.factor=16",
            "--config.model.transformer.positions=rope",
            "--config.model.transformer.target_positions=True",
            "--config.steps=900",
            *RARELY,
            "--workdir={out}/transformer",
        ),
        seconds=440,
    ),
)


def steps_of(drawing: str, folder: str) -> tuple[Step, ...]:
    """The commands for the map that they name `drawing`; its panorama goes to `folder` of the whole."""
    picture = f"{folder}/000000.png"
    words = [text.replace("{", "{{").replace("}", "}}") for text in (folder, drawing)]  # they are formatted
    sample = (
        "sample.py",
        "--workdir={out}/transformer",
        f"--out={{out}}/{words[0]}",
        f"--condition={words[1]}",
        "--size=1024x4096",
        "--stride=4",
        "--decode=tiles",
        *SHARPER,
    )
    return *TRAINING, Step("draw the panorama", sample, 40, shown=(picture, picture))


def make_panorama(
    out: str | Path, drawing: str | Path, *, run: Runner, clock: Callable[[], float] = time.monotonic
) -> Path:
    """Runs what has not run yet, and copies the panorama to `out`/panorama.png.

    Args:
      out: folder of all; the commands name it relative to the repository where it lies inside.
      drawing: the map, a PNG of ids into `scenes.SEGMENTATION_CLASSES`, four times as wide as high.
      run: runs one command from the repository's root.
      clock: seconds that only grow.

    Returns:
      where the picture is.

    Raises:
      ChildFailed: a command failed.
      UserError: no map, no checkout to run, a folder that cannot be written, or a command did not write what it should.
    """
    path = Path(drawing).resolve()
    if not path.is_file():
        raise UserError(f"--map: there is no file {drawing}")
    named = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    commands = steps_of(named, f"{path.stem}_{storage.sha256(path)[:8]}")  # a map that was changed is another one
    tool = f"vqgan_jax.tools.panorama --map={shlex.quote(str(drawing))}"
    steps = Steps(out, commands, tool=tool, run=run, clock=clock)
    steps.run_all(skip_finished=True)
    picture = steps.folder / PICTURE
    shutil.copyfile(steps.folder / commands[-1].shown[0], picture)
    print(f"{Path(out) / PICTURE}: look at it ({steps.elapsed} in all)", flush=True)
    return picture


def main(argv: Sequence[str] | None = None, *, run: Runner = run_child) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vqgan_jax.tools.panorama",
        description="Trains two VQGANs and a transformer on crops of landscapes and draws a panorama of 4096 x 1024 "
        "pixels from a map: about 13 minutes on two CPU cores. Stopped, the same command goes on; with another map "
        "it draws anew.",
        epilog="example: python -m vqgan_jax.tools.panorama --out=runs/panorama",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for everything that is written")
    parser.add_argument("--map", default=str(ROOT / MAP), metavar="FILE", help=f"indexed PNG of ids, as {MAP}")
    args = parser.parse_args(argv)
    return exit_code("panorama", lambda: make_panorama(args.out, args.map, run=run))


if __name__ == "__main__":
    sys.exit(main())
