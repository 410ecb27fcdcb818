"""Every task on the embedded scenes: its commands, its config, and all of it end to end on tiny models."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

import sample
import train_transformer
import train_vqgan
from configs import demo_transformer, demo_vqgan, quantizers
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.request.flags import Asked
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.scoring import judges
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.tools import steps, task_scores, tasks
from vqgan_jax.tools.task_scores import Figure, Shown
from vqgan_jax.tools.task_sheet import WIDTH, draw_sheet
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

INPUTS = tuple(demo_vqgan.CHANNELS)


def test_the_configs_fit_each_other():
    """Every condition of the demo has a model on the demo's stages, whose sizes are those of the data."""
    config = {key: demo_vqgan.get_config(f"input={key}") for key in INPUTS}
    stages = {key: Tokenizer(VQGAN(VQGANConfig.from_config(c.model))) for key, c in config.items()}
    first = stages.pop("image")
    assert set(stages) == set(demo_transformer.ENCODED)
    for name in demo_transformer.CONDITIONS:
        config = demo_transformer.get_config(f"condition={name}")
        model = ImageTransformer(TransformerConfig.from_config(config.model), first, stages)
        model.check_size(config.data.image_size)
        assert model.gpt.block_size == model.condition.length + 63 and model.layout.head_size == 256
        local = demo_transformer.get_config(f"condition={name},runlocal")
        assert local.steps == "2" and local.data.train_examples == 32


def test_the_tasks_cover_every_condition_and_each_thing_is_made_once():
    assert len(tasks.TASKS) == 11  # the paper's ten, the last of them twice: completion and inpainting
    asked_for = {task.condition for task in tasks.TASKS.values()}
    assert asked_for == {name for name in demo_transformer.CONDITIONS if "_" not in name or name == "low_res"}
    made = tasks.steps_of(list(tasks.TASKS))
    folders = [arg for step in made for arg in step.args if arg.startswith(("--workdir={out}", "--out="))]
    trained = [step.args[-1] for step in made if step.args[0].startswith("train")]
    assert len(set(trained)) == len(trained) == 6 + 9 and len(set(folders)) == 15 + 11
    where = {step.args[-1].partition("=")[2]: k for k, step in enumerate(made) if step.args[0].startswith("train")}
    for k, step in enumerate(made):  # what a command reads was made before it
        reads = [
            arg.partition("=")[2] for arg in step.args if arg.startswith(("--config.vqgan", "--config.cond_vqgan"))
        ]
        reads += [arg.partition("=")[2] for arg in step.args[1:2] if step.args[0] == "sample.py"]
        assert all(where[path] < k for text in reads for path in text.split(","))
    assert len(tasks.steps_of(["segmentation"])) == 4 and len(tasks.steps_of(["depth"])) == 6


def test_the_commands_ask_for_what_is_scored():
    for name, task in tasks.TASKS.items():
        (step,) = (s for s in tasks.steps_of([name]) if s.args[0] == "sample.py")
        flags = dict(arg.removeprefix("--").partition("=")[::2] for arg in step.args[1:])
        asked = {key: str(value) for key, value in tasks._asked(task).items()}
        assert {key: flags.get(key, "1") for key in asked} == asked
        known = "".join((steps.ROOT / file).read_text() for file in ("sample.py", "vqgan_jax/request/flags.py"))
        known += (steps.ROOT / "vqgan_jax/sampling/strategy_flags.py").read_text()
        assert all(f'"{flag}"' in known for flag in flags)


class Opened:
    """Stands for the samples of a task."""

    def shown(self, title, figure, enlarged):
        cells = [np.full((64 * enlarged, 64 * enlarged, 3), 100, np.uint8)] * 3
        figures = {figure.name: 0.75, f"{figure.name}_shuffled": 0.25, "val/nll": 3.5}
        return Shown(title, figure, figures, [cells] * 9)


def test_only_what_is_asked_for_is_run_and_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "open_task", lambda *args: Opened())
    ran = []

    def run(argv, environment):
        ran.append(argv[1])
        return 3 if len(ran) == 3 else 0

    arguments = [f"--out={tmp_path}", "--only=class,depth"]
    assert tasks.main(arguments, run=run) == 3 and len(ran) == 3
    assert tasks.main(arguments, run=run) == 0
    # The third failed once; two more transformers are what the others start from.
    order = ["train_vqgan.py"] * 4 + ["train_transformer.py"] * 4 + ["sample.py"] * 2
    assert ran == order
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["class"]["class_agreement"] == 0.75 and summary.keys() == {"class", "depth", "seconds"}
    assert "| depth to image |" in (tmp_path / "table.md").read_text() and (tmp_path / "sheet.png").exists()
    assert "75.0 % show their class (shuffled 25.0 %)" in capsys.readouterr().out
    assert tasks.main([f"--out={tmp_path}", "--only=depht"], run=run) == 2
    assert "did you mean 'depth'" in capsys.readouterr().err


def test_a_sheet_has_as_many_groups_as_fit():
    one = Opened().shown("a", Figure("class_agreement", "b"), 1)
    large = Opened().shown("c", Figure("class_agreement", "d"), 2)
    sheet = draw_sheet([one, large])
    assert sheet.shape == (14 + 64 + 8 + 14 + 128 + 8, WIDTH, 3)
    grey = (sheet == 100).all(-1)
    assert grey[14 + 32].sum() == 4 * 3 * 64 and grey[14 + 64 + 8 + 14 + 64].sum() == 2 * 3 * 128


# The rest trains: tiny models, two steps each, on one first stage.


def tiny(config: ConfigDict) -> ConfigDict:
    config.steps, config.batch_size, config.eval_examples, config.images_shown = "2", 8, 8, 0
    config.log_every, config.eval_every, config.save_every, config.images_every = "2", "2", "2", "0"
    config.data.train_examples, config.data.val_examples, config.data.image_size = 16, 16, 16
    config.data.resize_to = min(config.data.resize_to, 32)
    config.optimizer.warmup, config.optimizer.hold = "0", "0"
    return config


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    """`path(input)` of a VQGAN, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("stages")

    def path(key: str) -> str:
        if not (folder / key).exists():
            config = tiny(demo_vqgan.get_config(f"input={key}"))
            ae = config.model.autoencoder
            ae.resolution, ae.stem, ae.channels, ae.multipliers = 16, 4, 32, (1,)
            ae.z_channels, ae.mid_attention = 32, False
            config.model.quantizer = quantizers.ema(16, 8)
            train_vqgan.train(config, str(folder / key))
        return str(folder / key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQGAN_JAX_CACHE", str(folder / "cache"))
        yield path


# Several conditions at once.
JOINT = {
    "class_segmentation": tasks.Task(
        "joint", "class_segmentation", Figure("class_agreement", ""), inputs=("segmentation",)
    ),
    "objects_coordinates": tasks.Task("joint", "objects_coordinates", Figure("boxes_found", "")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*tasks.TASKS, *JOINT])
def test_a_task_end_to_end(name, vqgan, tmp_path, monkeypatch):
    """Train, sample, draw, invert (grid.png draws what tokens say) and score, as the tool does."""
    task = (tasks.TASKS | JOINT)[name]
    config = tiny(demo_transformer.get_config(f"condition={task.condition}"))
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width, config.model.grid = 1, 2, 32, (4, 4)
    config.vqgan, config.cond_vqgan = vqgan("image"), ",".join(map(vqgan, task.inputs))
    if "coordinates" in task.condition:
        condition = config.model.condition
        (condition.place if condition.name == "joint" else condition).factor = 4
    train_transformer.train(config, str(tmp_path / "gpt"))

    asked, size = Asked(number=8, each=task.each, **dict(task.given)), task.size // 4
    sample.sample(
        str(tmp_path / "gpt"),
        str(tmp_path / "out"),
        asked,
        strategy=Strategy(),
        size=f"{size}x{size}",
        mesh={"data": -1, "fsdp": 1, "tensor": 1},
        **dict(batch=8, seed=0, stride=0, decode="exact", memory=0, every=0, best=True, dtype="float32"),
    )
    assert (tmp_path / "out" / "grid.png").exists()

    for key, value in (("CLASSIFIER_IMAGES", 16), ("CLASSIFIER_STEPS", 2), ("HELD_OUT_IMAGES", 16)):
        monkeypatch.setattr(judges, key, value)
    monkeypatch.setattr(task_scores, "READ", 64)
    fields = dict(number=8, each=task.each, **dict(task.given))
    scored = task_scores.open_task(tmp_path / "gpt", tmp_path / "out", fields, size)
    shown = scored.shown(task.title, task.figure, 1)
    assert np.isfinite(shown.figures[task.figure.name]) and task.figure.meaning in shown.caption
    assert sum(len(group) for group in shown.groups) >= 8
    assert all(cell.shape == (size, size, 3) for group in shown.groups for cell in group[-1:])
