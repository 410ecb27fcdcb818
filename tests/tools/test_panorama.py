"""The panorama's driver: the configs of its commands fit each other, and a new map is drawn anew."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from vqgan_jax.config import UserError
from vqgan_jax.data import scenes
from vqgan_jax.images import save_png
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.tools import panorama, steps
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

DRAWING = steps.ROOT / panorama.MAP


class FakeRunner:
    """Writes the panorama that sample.py would."""

    def __init__(self):
        self.calls = []

    def __call__(self, argv, environment):
        self.calls.append(list(argv))
        if argv[1] == "sample.py":
            out = dict(arg.removeprefix("--").partition("=")[::2] for arg in argv[2:])["out"]
            save_png(Path(steps.ROOT, out) / "000000.png", np.full((4, 4, 3), len(self.calls), np.uint8))
        return 0


def config_of(step: steps.Step) -> ConfigDict:
    """The config that a training would see; raises where a flag or a field is unknown."""
    argv = list(step.args)
    argv[1] = argv[1].replace("=", f"={steps.ROOT}/", 1)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(argv)
    return values.config


def test_the_configs_fit_each_other_and_their_crops():
    image, segmentation, transformer = (config_of(step) for step in panorama.TRAINING)
    first, other = (Tokenizer(VQGAN(VQGANConfig.from_config(config.model))) for config in (image, segmentation))
    model = ImageTransformer(TransformerConfig.from_config(transformer.model), first, {"segmentation": other})
    for config in (image, segmentation, transformer):
        model.check_size(config.data.image_size)
        assert config.data.crop == "random" and config.data.resize_to > config.data.image_size
    assert all(image.data[key] == transformer.data[key] for key in ("classes", "resize_to", "train_examples"))
    assert not transformer.cache_codes  # or every picture would be its middle
    folders = {step.args[-1].partition("=")[2] for step in panorama.TRAINING}
    assert {transformer.vqgan, transformer.cond_vqgan} < folders


def test_the_map_is_one_that_the_model_knows():
    with Image.open(DRAWING) as file:
        ids, palette = np.array(file), np.array(file.getpalette()).reshape(-1, 3)
    assert ids.ndim == 2 and ids.shape[1] == 4 * ids.shape[0] and DRAWING.stat().st_size < 50_000
    kinds = len(scenes.SEGMENTATION_CLASSES)
    assert ids.max() < kinds and np.array_equal(palette[:kinds], scenes.SEGMENTATION_PALETTE)
    assert len(np.unique(ids)) == kinds - 1  # sun or moon


def test_all_is_run_once_and_another_map_is_drawn_alone(tmp_path):
    run, drawing = FakeRunner(), tmp_path / "a map {1}.png"
    shutil.copyfile(DRAWING, drawing)
    out = tmp_path / "out"
    for _ in range(2):
        picture = panorama.make_panorama(out, drawing, run=run)
        assert len(run.calls) == 4 and picture == out / "panorama.png"
    with Image.open(picture) as file:
        assert np.array(file)[0, 0, 0] == 4
    assert f"--condition={drawing}" in run.calls[-1] and run.calls[-1][1] == "sample.py"
    Image.fromarray(np.zeros((4, 16), np.uint8)).save(drawing)
    panorama.make_panorama(out, drawing, run=run)
    with Image.open(picture) as file:
        assert len(run.calls) == 5 and np.array(file)[0, 0, 0] == 5
    panorama.make_panorama(out, DRAWING, run=run)
    assert f"--condition={panorama.MAP}" in run.calls[-1]  # as a user would type it from the repository's root
    log = json.loads((out / "commands.json").read_text())
    assert [shlex.split(entry["command"])[2:] for entry in log] == [call[1:] for call in run.calls]


def test_a_map_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="--map: there is no file"):
        panorama.make_panorama(tmp_path, tmp_path / "none.png", run=FakeRunner())
    assert panorama.main([f"--out={tmp_path}", "--map=none.png"], run=FakeRunner()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_flags_of_the_sampler_exist():
    files = ("sample.py", "vqgan_jax/sampling/strategy_flags.py", "vqgan_jax/request/flags.py")
    text = "".join((steps.ROOT / file).read_text() for file in files)
    for arg in panorama.steps_of("map.png", "samples")[-1].args[1:]:
        name = arg.removeprefix("--").partition("=")[0]
        assert f'("{name}"' in text or f'\n        "{name}"' in text, f"sample.py has no --{name}"
