"""Fine-tuning: configs/finetune.py on imported models and runs of ours, and which arrays a run starts from."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import train_vqgan
from configs import common, finetune
from tests.test_config import ROOT, leaves, overridden
from vqgan_jax.config import UserError, plain
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.pretrained import load_trained
from vqgan_jax.tools.convert import import_checkpoint
from vqgan_jax.train import setup, vqgan_step
from vqgan_jax.train.state import TrainState
from vqgan_jax.transformer import TransformerConfig

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """A folder with the imported models `vqgan`, `class`, `depth` and `segmentation`; a comma in its name is legal."""
    folder = tmp_path_factory.mktemp("imported,here")
    for name, stem in (
        ("vqgan", "vqgan_tiny"),
        ("class", "class_transformer_tiny"),
        ("depth", "depth_transformer_tiny"),
        ("segmentation", "vqseg_tiny"),
    ):
        import_checkpoint(str(GOLDEN / f"{stem}.ckpt"), None, str(folder / name))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))


def recorded_model(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())["record"]["config"]["model"]


def test_the_config_of_an_imported_vqgan(imported):
    config = finetune.get_config(str(imported / "vqgan"))
    assert plain(config.model) == recorded_model(imported / "vqgan")
    assert config.model.autoencoder.multipliers == (1, 2)  # a tuple, so that it can be overridden
    assert VQGANConfig.from_config(config.model).discriminator is not None
    assert config.init_from == str(imported / "vqgan") and config.init_exclude == ()
    assert config.data.source == "folder" and config.data.image_size == 32
    assert config.loss.adversarial_start == "0"
    assert not config.optimizer.scale_by_batch and config.ema_decay == 0.999


def test_a_vqgan_without_a_discriminator_can_be_given_a_fresh_one(imported):
    config = finetune.get_config(str(imported / "class" / "first_stage"))
    assert VQGANConfig.from_config(config.model).discriminator is None
    assert config.loss.adversarial_start == common.vqgan_loss().adversarial_start
    config.model.discriminator.enabled = True
    assert VQGANConfig.from_config(config.model).discriminator.layers == 3


def test_a_segmentation_is_reconstructed_by_cross_entropy(imported):
    config = finetune.get_config(str(imported / "segmentation"))
    assert config.loss.reconstruction == "bce" and config.checkpoint.best_metric == "val/bce"


@pytest.mark.parametrize("name", ["class", "depth"])
def test_the_config_of_an_imported_transformer(imported, name):
    folder = imported / name
    config = finetune.get_config(f"{folder},runlocal")
    assert plain(config.model) == recorded_model(folder)
    TransformerConfig.from_config(config.model)
    assert config.steps == "2" and config.data.source == "scenes"
    assert config.init_from == str(folder) and config.vqgan == str(folder / "first_stage")
    assert config.cond_vqgan == (str(folder / "cond_stage") if name == "depth" else "")
    first = recorded_model(folder / "first_stage")["autoencoder"]
    factor = 2 ** (len(first["multipliers"]) - 1)
    assert config.data.image_size == config.model.grid[0] * factor
    assert "input_key" not in config.model and "label_smoothing" in config.loss


def test_contrasting_leaves_out_dropout_and_the_best_likelihood(imported, tmp_path):
    model = recorded_model(imported / "class")
    model["transformer"]["residual_dropout"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    (tmp_path / "first_stage").symlink_to(imported / "class" / "first_stage")
    config = finetune.get_config(f"{tmp_path},cca,runlocal")
    assert config.init_from == str(tmp_path) and config.loss.cca.weight == 300 and config.steps == "2"
    assert config.checkpoint.keep_best == 0 and config.model.transformer.residual_dropout == 0
    assert finetune.get_config(str(imported / "class")).loss.cca.weight == 0
    with pytest.raises(UserError, match="holds a VQGAN"):
        finetune.get_config(f"{imported / 'vqgan'},cca")


def test_pictures_have_the_form_of_the_grid_and_boxes_for_every_object(imported, tmp_path):
    model = recorded_model(imported / "class")
    layout = dict(kind="boxes", max_objects=30, vocab=1024, classes=5, crop=True, flags=[], trim=True)
    record = model | {"grid": [3, 2], "condition": {"name": "objects", **layout}}
    (tmp_path / "config.json").write_text(json.dumps({"model": record}))
    (tmp_path / "first_stage").symlink_to(imported / "class" / "first_stage")
    config = finetune.get_config(str(tmp_path))
    height, width = config.data.image_size
    assert 2 * height == 3 * width and config.data.max_boxes == 30
    assert finetune.get_config(str(imported / "class")).data.max_boxes == common.data().max_boxes


@pytest.mark.parametrize("name", ["vqgan", "class"])
def test_every_leaf_can_be_overridden_from_the_command_line(imported, name, monkeypatch):
    path = f"{ROOT}/configs/finetune.py:{imported / name}"
    argv, expected = ["prog", f"--config={path}"], {}
    for key, value in leaves(finetune.get_config(str(imported / name))):
        expected[key], text = overridden(value)
        argv.append(f"--config.{key}={text}")
    monkeypatch.setattr("sys.argv", argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    values(argv)
    assert len(expected) > 40 and dict(leaves(values.config)) == expected


def test_mistakes_name_the_argument(tmp_path):
    for arg in (None, "", "runlocal", ",runlocal"):
        with pytest.raises(UserError, match="name the model's folder after a colon"):
            finetune.get_config(arg)
    with pytest.raises(UserError, match="/nowhere: no model there .no stage.json and no config.json."):
        finetune.get_config("/nowhere")
    with pytest.raises(UserError, match=r"is a file; .* --checkpoint=.*vqgan_tiny.ckpt"):
        finetune.get_config(str(GOLDEN / "vqgan_tiny.ckpt"))
    for name, text in (("stage.json", "{"), ("stage.json", "{}"), ("config.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}: is no record of a model"):
            finetune.get_config(str(tmp_path))
        (tmp_path / name).unlink()


@pytest.mark.slow
def test_two_steps_from_an_imported_vqgan_whose_workdir_is_tuned_on(imported, tmp_path, cache):
    def small(config: ConfigDict) -> ConfigDict:
        config.loss.perceptual_weight = 0.0  # LPIPS would be downloaded
        config.data.image_size, config.images_shown = 32, 8
        return config

    config = small(finetune.get_config(f"{imported / 'vqgan'},runlocal"))
    state = train_vqgan.train(config, str(tmp_path / "tuned"))
    assert int(state.step) == 2
    theirs = load_trained(imported / "vqgan", key="k", kind="vqgan")
    for network in ("generator", "discriminator"):
        moved = [
            np.abs(np.asarray(a) - b).max()
            for a, b in zip(*map(jax.tree.leaves, (state.params[network], theirs.params[network])), strict=True)
        ]
        assert 0 < max(moved) < 1e-4, network  # two steps of 1e-5 away from the file
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "adaptive_weight" in line] == [1, 2]
    assert min(line["adversarial_factor"] for line in lines if "adversarial_factor" in line) > 0

    # A workdir of ours is a DIR as well.
    again = small(finetune.get_config(f"{tmp_path / 'tuned'},runlocal"))
    assert plain(again.model) == plain(config.model) and again.init_from == str(tmp_path / "tuned")


@pytest.fixture(scope="module")
def start(imported) -> tuple[TrainState, dict]:
    """A fresh state of the imported model, and the arrays of the file."""
    trained = load_trained(imported / "vqgan", key="k", kind="vqgan")
    # The file's discriminator is untrained; move its statistics away from their start.
    loaded = {"params": trained.params, "collections": jax.tree.map(lambda x: x + 1, trained.collections)}
    model = VQGAN(VQGANConfig.from_config(finetune.read_model(imported / "vqgan")), jnp.float32)
    init = vqgan_step.make_init(model, dict.fromkeys(trained.params, optax.adam(1e-3)), ema=True)
    return jax.jit(init)(jax.random.key(1)), loaded


def origin(new: TrainState, fresh: TrainState, loaded: dict, *path: str) -> str:
    """Whether a leaf is that of the fresh state or of the file, which differ."""
    kind, *rest = path
    leaf, old, file = getattr(new, kind), getattr(fresh, kind), loaded["params" if kind == "ema" else kind]
    for name in rest:
        leaf, old, file = leaf[name], old[name], file[name]
    assert not np.array_equal(old, file)
    return "fresh" if np.array_equal(leaf, old) else "file" if np.array_equal(leaf, file) else "neither"


KERNEL = ("generator", "decoder", "conv_out", "kernel")
OTHER = ("generator", "decoder", "conv_in", "kernel")
DISCRIMINATOR = ("discriminator", "conv_out", "kernel")


def test_what_is_excluded_stays_fresh_and_the_rest_does_not(start):
    fresh, loaded = start
    new = setup.start_from(fresh, loaded, "DIR", ("discriminator", "generator/decoder/conv_out/"))
    where = {path: origin(new, fresh, loaded, "params", *path) for path in (KERNEL, OTHER, DISCRIMINATOR)}
    assert where == {KERNEL: "fresh", OTHER: "file", DISCRIMINATOR: "fresh"}
    assert origin(new, fresh, loaded, "ema", *KERNEL) == "fresh"
    assert origin(new, fresh, loaded, "ema", *OTHER) == "file"
    jax.tree.map(np.testing.assert_array_equal, new.collections, fresh.collections)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, fresh.opt_state)
    ema, params = (tree["generator"]["decoder"]["conv_in"]["kernel"] for tree in (new.ema, new.params))
    assert ema is not params  # both are donated


def test_without_exclusions_everything_is_the_files(start):
    fresh, loaded = start
    new = setup.start_from(fresh, loaded, "DIR")
    jax.tree.map(np.testing.assert_array_equal, new.params, loaded["params"])
    found, expected = (tree["discriminator"]["batch_stats"] for tree in (new.collections, loaded["collections"]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_modules_name_covers_its_statistics(start):
    fresh, loaded = start
    new = setup.start_from(fresh, loaded, "DIR", ("discriminator/norm_1",))
    mean = ("collections", "discriminator", "batch_stats")
    assert origin(new, fresh, loaded, *mean, "norm_1", "mean") == "fresh"
    assert origin(new, fresh, loaded, *mean, "norm_2", "mean") == "file"
    assert origin(new, fresh, loaded, "params", "discriminator", "norm_1", "scale") == "fresh"


def test_what_a_discriminator_remembers_may_be_there_or_not(start):
    """LeCAM's means and the vectors of spectral norms: neither adding nor leaving them out asks for a fresh network."""
    fresh, loaded = start
    ours = loaded["collections"]["discriminator"]
    without = {name: tree for name, tree in ours.items() if name != "lecam"}
    more = without | {"batch_stats": ours["batch_stats"] | {"conv_in": {"u": np.ones(4)}}}
    assert "lecam" in fresh.collections["discriminator"]
    for there in (without, more):
        there = loaded | {"collections": loaded["collections"] | {"discriminator": there}}
        new = setup.start_from(fresh, there, "DIR")
        assert origin(new, fresh, loaded, "params", *DISCRIMINATOR) == "file"
        assert jax.tree.structure(new.collections) == jax.tree.structure(fresh.collections)
        assert new.collections["discriminator"]["lecam"]["logits"]["real"] == 0


@pytest.mark.parametrize(
    "exclude, message",
    [
        (("discriminater",), "'discriminater' is neither here nor in DIR, did you mean 'discriminator'"),
        (("generator/decodr/conv_out",), "'generator/decodr' is neither .* did you mean 'generator/decoder'"),
        (("generator/decoder/conv",), "'generator/decoder/conv' is neither"),
        (("discriminator", "generator/decoder/conv_out/kernel/x"), "conv_out/kernel/x' is neither"),
        (("",), "init_exclude: '' is neither .*: discriminator, generator"),
        ((7,), "init_exclude: '7' is neither"),
    ],
)
def test_an_exclusion_that_matches_nothing_is_an_error(start, exclude, message):
    with pytest.raises(UserError, match=message):
        setup.start_from(*start, "DIR", exclude)


def test_another_shape_names_the_leaf_and_its_exclusion_mends_it(start):
    fresh, loaded = start
    generator = dict(loaded["params"]["generator"], quantizer={"codebook": np.zeros((128, 16), np.float32)})
    changed = loaded | {"params": {"generator": generator}}
    with pytest.raises(UserError) as error:
        setup.start_from(fresh, changed, "DIR")
    assert str(error.value) == (
        "config.init_from=DIR: generator/quantizer/codebook has shape (128, 16) there and has shape (64, 16) here; "
        "mend config.model, or start it fresh with --config.init_exclude='(\"generator/quantizer/codebook\",)'"
    )
    new = setup.start_from(fresh, changed, "DIR", ("generator/quantizer/codebook",))
    assert origin(new, fresh, loaded, "params", "generator", "quantizer", "codebook") == "fresh"
    assert origin(new, fresh, loaded, "params", *OTHER) == "file"

    for network, message in (
        (generator | {"quantizer": {}}, "generator/quantizer/codebook is absent there and has shape .64, 16. here"),
        (loaded["params"]["generator"] | {"extra": np.zeros(3)}, "generator/extra has shape .3,. there and is absent"),
    ):
        with pytest.raises(UserError, match=message):
            setup.start_from(fresh, loaded | {"params": {"generator": network}}, "DIR")
    new = setup.start_from(fresh, loaded | {"params": {"generator": network}}, "DIR", ("generator/extra",))
    assert "extra" not in new.params["generator"]


def test_an_exclusion_without_init_from_is_an_error(tmp_path, cache, imported):
    config = finetune.get_config(f"{imported / 'vqgan'},runlocal")
    config.loss.perceptual_weight, config.init_from, config.init_exclude = 0.0, "", ("discriminator",)
    with pytest.raises(UserError, match="config.init_exclude: there is nothing to exclude from"):
        train_vqgan.train(config, str(tmp_path / "w"))
