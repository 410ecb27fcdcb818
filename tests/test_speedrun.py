"""The speedrun: every piece changes its config into a model, tables and records, and one very small run of it all."""

import json

import numpy as np
import pytest
from PIL import Image

import train_transformer
import train_vqgan
from benchmarks import speedrun, speedrun_recipes, speedrun_record, speedrun_table
from benchmarks.speedrun_recipes import PIECES, change, find
from configs import speedrun_transformer, speedrun_vqgan
from vqgan_jax.config import UserError, differences, plain
from vqgan_jax.models.vqgan import VQGANConfig
from vqgan_jax.transformer import TransformerConfig

CONFIGS = {"tokenizer": (speedrun_vqgan, VQGANConfig), "transformer": (speedrun_transformer, TransformerConfig)}
NAMES = [(kind, name) for kind, pieces in PIECES.items() for name in pieces]


@pytest.mark.parametrize("form", speedrun_recipes.FORMS)
@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_every_piece_makes_another_model_or_run(kind, name, form):
    module, model = CONFIGS[kind]
    piece = PIECES[kind][name]
    before, after = module.get_config(f"form={form}"), piece.config(module, form)
    model.from_config(after.model)
    assert bool(differences(plain(before), plain(after))) == (name != "reference")
    assert (after.steps, after.batch_size) == (before.steps, before.batch_size)


def test_recipes_are_pairs_of_pieces():
    assert find("modern") == ("modern", "modern")
    assert find("fsq") == ("fsq", "reference")
    assert find("fsq/llama") == ("fsq", "llama")
    for name, near in (("modrn", "modern"), ("fsq/lama", "llama")):
        with pytest.raises(UserError, match=f"did you mean '{near}'"):
            find(name)
    with pytest.raises(UserError, match="config.optimizer.b3: unknown key"):
        change(speedrun_vqgan.get_config(), {"optimizer.b3": 1.0})


ROW = dict(
    name="modern", data="scenes", psnr=25.123, l1=0.05, rfid_proxy=1.5, codebook_usage=0.975, codebook_perplexity=900.4,
    nll=4.0, bits=5.77, gfid_proxy=3.25, agreement=0.5, accuracy=0.9, steps_1=400, steps_2=500, ms_1=80.0, flops_1=6e9,
    flops_2=12e9, minutes=3.0, date="2026-11-22", machine="a CPU", command="python -m benchmarks.speedrun",
)  # fmt: skip


def test_lines_are_added_below_the_table_of_whole_recipes(tmp_path):
    file = tmp_path / "RESULTS.md"
    head = speedrun_table.table(speedrun_table.COLUMNS, [])
    file.write_text(f"# A\n\n| other |\n\n{speedrun_table.PART}\n\n{head}\n\n### Pieces\n\n| a |\n")
    for name in ("one", "two"):
        speedrun_table.record(file, [speedrun_table.line_of(ROW | {"name": name})])
    rows = file.read_text().split("\n")
    first = rows.index(head.split("\n")[1]) + 1
    assert [row.split(" | ")[1] for row in rows[first : first + 2]] == ["one", "two"]
    assert rows[first + 2 :] == ["", "### Pieces", "", "| a |", ""] and rows[:3] == ["# A", "", "| other |"]
    assert " 25.12 | 0.0500 | 1.5 | 97.5% | 900 | 4.000 | " in rows[first] and " 6 | 12 | " in rows[first]
    file.write_text("# A\n")
    with pytest.raises(UserError, match="has no table"):
        speedrun_table.record(file, ["| x |"])


def test_the_results_have_the_table_that_lines_are_added_to(tmp_path):
    copy = tmp_path / "RESULTS.md"
    text = speedrun_table.RESULTS.read_text()
    copy.write_text(text)
    speedrun_table.record(copy, ["| new |"])
    assert copy.read_text().replace("| new |\n", "") == text
    assert speedrun_table.table(speedrun_table.COLUMNS, []) in text


def test_a_recorded_command_names_no_place_of_this_machine(monkeypatch):
    ran = []
    monkeypatch.setattr(speedrun, "run", lambda args, command: ran.append(command))
    for words in (["--data=/my/disk/tiny.zip", "--out=/my/runs"], ["--data", "/my/disk/tiny.zip", "--out", "/my/runs"]):
        words += ["--record", "--steps=1,2", "--equal_flops", "--lpips=/my/vgg.pth,/my/lin.pth", "--form=cpu"]
        assert speedrun.main(words) == 0
    expected = "python -m benchmarks.speedrun --data=tiny.zip --steps=1,2 --equal_flops --lpips=vgg.pth,lin.pth"
    assert ran == [expected] * 2


class Unopened(speedrun.Speedrun):
    """A speedrun without data, of which folders are named alone."""

    def __init__(self, out):
        self.out = out

    def _identity(self):
        return {"name": "tiny"}


def test_a_stage_is_kept_by_its_own_data_and_the_files_of_lpips(tmp_path):
    run, (one, other) = Unopened(tmp_path), (tmp_path / "a.pth", tmp_path / "b.pth")
    one.write_bytes(b"1")
    other.write_bytes(b"2")

    def folder(path="", flip=True, vgg="", seed=0):
        config = speedrun_vqgan.get_config()
        config.data.path, config.data.flip, config.lpips.vgg, config.seed = path, flip, str(vgg), seed
        return run.folder_of("tokenizer", config)

    assert folder() == folder(path="/elsewhere")
    assert len({folder(), folder(flip=False), folder(vgg=one), folder(vgg=other), folder(seed=1)}) == 5
    one.rename(tmp_path / "c.pth")
    assert folder(vgg=tmp_path / "c.pth") != folder(vgg=other)


def test_what_another_source_did_is_said_and_kept_with_its_date(tmp_path, capsys):
    run = Unopened(tmp_path)
    run._once(tmp_path / "stage", "trained", lambda: None)
    run._once(tmp_path / "stage", "trained", lambda: 1 / 0)  # it is done
    assert speedrun_record.trained_by(tmp_path / "stage")["date"] == speedrun_record.stamp()["date"]
    assert capsys.readouterr().out == ""
    file = tmp_path / "stage" / speedrun_record.SECONDS
    done = speedrun_record.read_json(file)["trained"] | {"date": "then", "revision": "abc"}
    file.write_text(json.dumps({"trained": done}))
    run._once(tmp_path / "stage", "trained", lambda: 1 / 0)
    assert "of revision abc, not of this one" in capsys.readouterr().out
    assert speedrun_record.trained_by(tmp_path / "stage")["date"] == "then"


class Counted(speedrun.Speedrun):
    """A speedrun whose stages cost FLOPs and nothing else."""

    def __init__(self, flops):
        self.flops, self.ran = flops, []

    def tokenizer_config(self, name, steps=0):
        return name, steps or 100

    def tokenizer_figures(self, config):
        self.ran.append(config)
        return {"flops": self.flops[config[0]], "steps": config[1]}


def test_pieces_with_other_flops_run_again_at_as_many_in_all():
    counted = Counted({"a": 10.0, "b": 10.2, "c": 40.0})
    rows = counted.pieces("tokenizer", ["a", "b", "c"], "", equal_flops=True)
    assert counted.ran == [("a", 100), ("b", 100), ("c", 100), ("c", 25)]
    assert [row["name"] for row in rows] == ["a", "b", "c", "c, equal FLOPs"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipes=modrn"], "did you mean 'modern'"),
        (["--pieces=refrence"], "did you mean 'reference'"),
        (["--steps=10", "--pieces=reference"], "--steps"),
        (["--lpips=one", "--pieces=reference"], "--lpips"),
        (["--lpips=/no/vgg.pth,/no/lin.pth", "--pieces=reference"], "there is no file /no/vgg.pth"),
        (["--form=tpu", "--pieces=reference"], "--form"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, capsys):
    assert speedrun.main(["--data=scenes", f"--out={tmp_path}", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of two classes of plain pictures, and models that are smaller still."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 8)):
        for k, name in enumerate(("dark", "light")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = 40 + 150 * k + rng.integers(0, 40, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    get_vqgan, get_transformer = speedrun_vqgan.get_config, speedrun_transformer.get_config

    def vqgan(arg):
        config = get_vqgan(arg)
        ae, model = config.model.autoencoder, config.model
        ae.channels, ae.z_channels, model.discriminator.channels = 32, 32, 8
        ae.attention_resolutions, ae.mid_attention = (), False
        model.quantizer.codebook_size, model.quantizer.dim = 16, 32
        return config

    def transformer(arg):
        config = get_transformer(arg)
        gpt = config.model.transformer
        gpt.layers, gpt.heads, gpt.width, config.batch_size = 1, 2, 32, 8
        return config

    monkeypatch.setattr(speedrun_vqgan, "get_config", vqgan)
    monkeypatch.setattr(speedrun_transformer, "get_config", transformer)
    monkeypatch.setattr(speedrun, "CLASSIFIER", (8, 8))
    monkeypatch.setattr(speedrun, "BATCH", 16)
    monkeypatch.setitem(speedrun_recipes.FORMS, "cpu", speedrun_recipes.Form(4, 16, 16))
    results = tmp_path / "RESULTS.md"
    results.write_text(f"{speedrun_table.PART}\n\n{speedrun_table.table(speedrun_table.COLUMNS, [])}\n")
    monkeypatch.setattr(speedrun, "RESULTS", results)
    return tmp_path


@pytest.mark.slow
def test_a_small_run_gives_all_figures_and_runs_nothing_twice(small, monkeypatch, capsys):
    words = [f"--data={small / 'data'}", f"--out={small / 'out'}", "--steps=2,2", "--record"]
    assert speedrun.main([*words, "--recipes=reference"]) == 0
    line = (small / "RESULTS.md").read_text().split("\n")[4]
    cells = dict(zip((c.name for c in speedrun_table.COLUMNS), line.strip("| ").split(" | "), strict=True))
    figures = {
        name: float(cells[name].rstrip("%")) for name in ("psnr", "rfid_proxy", "nll", "gfid_proxy", "agreement")
    }
    assert all(np.isfinite(x) and x > 0 for x in figures.values()), figures
    assert cells["data"] == "data" and cells["steps_1"] == "2" and "--recipes=reference" in cells["command"]
    sheets = {path.name.split("-")[0] for path in (small / "out").rglob("*.png")}
    assert {"samples", "reconstructions.png"} <= sheets

    def trained_again(config, workdir):
        raise AssertionError(workdir)

    monkeypatch.setattr(train_vqgan, "train", trained_again)
    monkeypatch.setattr(train_transformer, "train", trained_again)
    assert speedrun.main([*words, "--recipes=reference", "--pieces=reference"]) == 0
    again = (small / "RESULTS.md").read_text().split("\n")[5]
    assert again.split(" | ")[3:16] == line.split(" | ")[3:16]
    with pytest.raises(AssertionError, match="transformer-"):  # another transformer on the same tokenizer and codes
        speedrun.main([*words, "--recipes=reference/cosine"])
    encoded = [path for path in (small / "out").rglob(speedrun_record.SECONDS) if "codes-" in path.read_text()]
    assert len(encoded) == 1
