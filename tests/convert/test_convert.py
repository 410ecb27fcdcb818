"""The reference's checkpoints come in: strict both ways, checked against their YAML, one line for what does not fit."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import reference as ref
from tests.convert.files import GOOD, assert_equal, mutate, renamed, run, section, without
from vqgan_jax import pretrained
from vqgan_jax.config import UserError
from vqgan_jax.convert import networks
from vqgan_jax.convert.reference import open_checkpoint
from vqgan_jax.convert.stream import Entry, write_safetensors
from vqgan_jax.models.vqgan import VQGANConfig
from vqgan_jax.train.portable import read_stage


@pytest.mark.parametrize("name", GOOD)
def test_each_checkpoint_imports_whole(name, tmp_path, capsys):
    assert run(f"checkpoint={ref.GOLDEN}/{name}.ckpt", f"out={tmp_path}") == 0
    stages, tensors = GOOD[name]
    for stage in stages:
        tree, record = read_stage(tmp_path / stage)  # verifies the hash
        assert tree["params"] and record["imported"]["file"] == f"{name}.ckpt"
        assert len(record["imported"]["sha256"]) == 64
    printed = capsys.readouterr().out
    counts = [line.split("  ") for line in printed.splitlines()[1:] if not line.startswith("wrote")]
    assert sum(int([cell for cell in line if cell][1]) for line in counts) == tensors
    if name == "vqgan_tiny":
        assert record["imported"]["epoch"] == 3 and record["imported"]["global_step"] == 1234
        assert "train_vqgan.py" in printed and "cannot sample" in printed


def test_arrays_are_the_files(tmp_path):
    run(f"checkpoint={ref.GOLDEN}/vqgan_tiny.ckpt", f"out={tmp_path}")
    tree, _ = read_stage(tmp_path)
    tensors = ref.checkpoint("vqgan_tiny.ckpt")
    assert_equal({"params": tree["params"]["generator"]}, ref.vqgan_variables(ref.VQGAN_TINY, tensors))
    discriminator = {"params": tree["params"]["discriminator"], **tree["collections"]["discriminator"]}
    assert_equal(discriminator, ref.discriminator_variables(ref.VQGAN_TINY.discriminator, tensors))
    config = VQGANConfig.from_config(read_stage(tmp_path)[1]["config"]["model"])
    assert config.autoencoder == ref.VQGAN_TINY.autoencoder and config.discriminator == ref.VQGAN_TINY.discriminator
    assert (config.quantizer.commitment_weight, config.quantizer.codebook_weight) == (1.0, 0.25)


def test_a_file_without_yaml_tells_its_architecture():
    with open_checkpoint(ref.GOLDEN / "gumbel_tiny.ckpt") as opened:
        model = VQGANConfig.from_config(opened.stages[""].record["config"]["model"])
    assert (model.quantizer.codebook_size, model.quantizer.dim, model.quantizer.input_dim) == (48, 16, 32)
    assert model.autoencoder.multipliers == (1, 1) and model.discriminator is None
    assert [model.autoencoder.has_attention(level) for level in (0, 1)] == [False, True]


def test_a_malicious_file_is_refused_in_one_line(tmp_path, capsys):
    assert run(f"checkpoint={ref.GOLDEN}/malicious.ckpt", f"out={tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "would call posix.system" in error
    assert not (tmp_path / "out").exists()


def padded(name):
    def change(tensors):
        tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])

    return change


UP, GPT = "decoder.up.0.block.0.conv1.weight", ("transformer_config", "params")
WRONG = [
    ("vqgan_tiny", dict(change=renamed("quant_conv.bias", "quant_conv.beta")), "no tensor 'quant_conv.bias'"),
    ("vqgan_tiny", dict(change=lambda t: t.update({"loss.x": np.zeros(1, np.float32)})), "'loss.x' is no part"),
    ("vqgan_tiny", dict(change=padded("post_quant_conv.bias")), r"'post_quant_conv.bias' has shape \(33,\)"),
    ("vqgan_tiny", dict(change=lambda t: t.update({UP: t[UP][0]})), "'decoder.up.0.block.0.conv1.weight' has shape"),
    ("vqgan_tiny", dict(change=lambda t: t.pop("encoder.conv_in.weight")), "no tensor 'encoder.conv_in.weight'"),
    (
        "vqgan_tiny",
        dict(change=lambda t: t.update({"decoder.conv_in.weight": np.zeros((32, 0, 3, 3))})),
        "none of them 0",
    ),
    ("vqgan_tiny", dict(settings=section("ddconfig", dropout="x")), "ddconfig.dropout: takes a number"),
    ("vqgan_tiny", dict(settings=section("ddconfig", resolution="big")), "ddconfig.resolution: takes a value"),
    ("class_transformer_tiny", dict(settings=section(first_stage_key=["a"])), "first_stage_key: takes"),
    ("class_transformer_tiny", dict(settings=section(permuter_config={"params": {"H": 9, "W": 9}})), "9 x 9 does not"),
    ("vqgan_tiny", dict(settings=section(n_embed=128)), "model.params.n_embed is 128, .* say 64"),
    ("vqgan_tiny", dict(settings=section("ddconfig", ch_mult=[1, 4])), r"ch_mult is \[1, 4\], .* say \[1, 2\]"),
    ("vqgan_tiny", dict(settings=section("ddconfig", attn_resolutions=[32])), r"attention at levels \[0\]"),
    ("vqgan_tiny", dict(settings=section("lossconfig", "params", disc_num_layers=3)), "disc_num_layers is 3"),
    ("vqgan_tiny", dict(settings=section(image_key="dept")), "did you mean 'depth'"),
    ("class_transformer_tiny", dict(settings=without(*GPT, "n_head")), "transformer_config.params.n_head cannot be"),
    ("class_transformer_tiny", dict(settings=section(*GPT, n_head=5)), "n_head is 5"),
    ("class_transformer_tiny", dict(settings=section(*GPT, n_layer=3)), "n_layer is 3, .* say 2"),
    ("class_transformer_tiny", dict(settings=section(*GPT, n_unmasked=4)), "n_unmasked is 4, .* say 0"),
    ("class_transformer_tiny", dict(settings=without("cond_stage_config")), "cond_stage_config cannot be read"),
    ("class_transformer_tiny", dict(settings=without("cond_stage_config", "params", "n_classes")), "n_classes cannot"),
    ("class_transformer_tiny", dict(settings=section("cond_stage_config", "params", n_classes=99)), "has 64 tokens"),
    ("class_transformer_tiny", dict(settings=section(permuter_config={"target": "a.Spiral"})), "SpiralIn"),
    ("depth_transformer_tiny", dict(settings=section("cond_stage_config", "params", n_embed=3)), "cond_stage_config"),
    ("depth_transformer_tiny", dict(settings=without("cond_stage_key")), "cond_stage_key cannot be read"),
]


@pytest.mark.parametrize("name, changes, message", WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_is_refused_by_name(name, changes, message, tmp_path, capsys):
    path = mutate(tmp_path, name, **changes)
    with pytest.raises(UserError, match=message) as raised, open_checkpoint(path):
        pass
    assert "\n" not in str(raised.value)
    assert run(f"checkpoint={path}", f"out={tmp_path}/out") == 2
    assert not (tmp_path / "out").exists()


def test_an_unmasked_prefix_of_one_token_is_causal(tmp_path):
    with open_checkpoint(mutate(tmp_path, "class_transformer_tiny", settings=section(*GPT, n_unmasked=1))) as opened:
        assert opened.stages[""].record["config"]["model"]["transformer"]["prefix"] == 0


def test_a_transformer_without_yaml_asks_for_it(tmp_path):
    shutil.copy(ref.GOLDEN / "class_transformer_tiny.ckpt", tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="--yaml"), open_checkpoint(tmp_path / "x.ckpt"):
        pass
    named = ref.GOLDEN / "class_transformer_tiny.yaml"
    assert run(f"checkpoint={tmp_path}/x.ckpt", f"yaml={named}", f"out={tmp_path}/out") == 0


@pytest.mark.parametrize("text", ["a: [", "- 1", "model: 3", "model: !!python/object/apply:os.mkdir ['FOLDER/made']"])
def test_a_bad_yaml_is_one_line_and_runs_nothing(text, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    assert run(f"checkpoint={ref.GOLDEN}/vqgan_tiny.ckpt", f"yaml={tmp_path}/x.yaml", f"out={tmp_path}/out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_wrong_uses_are_one_line(tmp_path, capsys):
    golden = f"checkpoint={ref.GOLDEN}/vqgan_tiny.ckpt"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for args, message in (
        ((golden, f"out={tmp_path}/run"), "holds a training run"),
        ((golden, f"out={tmp_path}/a", f"lpips_out={tmp_path}/l.safetensors"), "holds no LPIPS"),
        ((f"checkpoint={tmp_path}", f"out={tmp_path}/a"), "add --to=torch"),
        ((golden, f"out={tmp_path}/a.safetensors", "to=torch"), "is a file"),
        ((f"checkpoint={tmp_path}/none", f"out={tmp_path}/a.safetensors", "to=torch"), "no workdir there"),
    ):
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_the_condition_stage_may_be_the_first_stage(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("cond_stage_model.")]:
            del tensors[name]

    changes = section(cond_stage_config="__is_first_stage__", cond_stage_key="lr")
    path = mutate(tmp_path, "depth_transformer_tiny", drop, changes)
    found = pretrained.open_transformer(path, key="path")
    assert found.model.condition.keys == ("low_res",)
    assert_equal(found.frozen["cond/low_res"], found.frozen["first_stage"])


def test_lpips_can_be_taken_out(tmp_path):
    lpips = {}
    for name, shape in _lpips_shapes().items():
        lpips[f"loss.perceptual_loss.{name}"] = np.random.RandomState(0).rand(*shape).astype(np.float32)
    path = mutate(tmp_path, "vqgan_tiny", lambda tensors: tensors.update(lpips))
    out = tmp_path / "lpips.safetensors"
    assert run(f"checkpoint={path}", f"out={tmp_path}/out", f"lpips_out={out}") == 0
    found = networks.load_lpips(out, out)["params"]
    name = "loss.perceptual_loss.net.slice3.12.weight"
    np.testing.assert_array_equal(found["stage_2_conv_1"]["kernel"], lpips[name].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(found["linear_4"], lpips["loss.perceptual_loss.lin4.model.1.weight"].ravel())
    assert "generator" in read_stage(tmp_path / "out")[0]["params"]


def _lpips_shapes():
    widths = {1: (3, 8), 2: (8, 8), 3: (8, 8), 4: (8, 8), 5: (8, 8)}
    shapes = {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
    layers = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
    for stage, (inner, width) in widths.items():
        for k, layer in enumerate(layers[stage]):
            shapes[f"net.slice{stage}.{layer}.weight"] = (width, width if k else inner, 3, 3)
            shapes[f"net.slice{stage}.{layer}.bias"] = (width,)
        shapes[f"lin{stage - 1}.model.1.weight"] = (1, width, 1, 1)
    return shapes


def test_half_precision_files_import_as_float32(tmp_path):
    def halve(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(np.float16) if value.dtype == np.float32 else value

    path = mutate(tmp_path, "vqseg_tiny", halve)
    run(f"checkpoint={path}", f"out={tmp_path}/out")
    bias = ref.checkpoint("vqseg_tiny.ckpt")["decoder.conv_out.bias"]
    found = read_stage(tmp_path / "out")[0]["params"]["generator"]["decoder"]["conv_out"]["bias"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, bias.astype(np.float16).astype(np.float32))


def test_the_writer_reads_one_piece_at_a_time_and_is_whole_or_not_there(tmp_path):
    alive, most = 0, 0

    def pieces():
        nonlocal alive, most
        for layer in range(50):
            alive += 1
            most = max(most, alive)
            yield np.full((4, 4), layer, np.float32)
            alive -= 1

    entries = [
        Entry("a/b", (50, 4, 4), np.dtype(np.float32), pieces),
        Entry("s", (), np.dtype(bool), lambda: [np.ones((), bool)]),
    ]
    digest = write_safetensors(tmp_path / "x.safetensors", entries)
    found = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["a/b"][:, 0, 0], np.arange(50))
    assert found["s"].shape == () and found["s"] and most == 1
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    short = [Entry("a", (3,), np.dtype(np.float32), lambda: [np.zeros(2)])]
    with pytest.raises(ValueError, match="8 bytes where 12 belong"):
        write_safetensors(tmp_path / "y.safetensors", short)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_interrupted_import_leaves_no_stage(tmp_path, monkeypatch):
    run(f"checkpoint={ref.GOLDEN}/vqseg_tiny.ckpt", f"out={tmp_path}")
    assert json.loads((tmp_path / "stage.json").read_text())["sha256"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vqgan_jax.convert.reference.write_safetensors", full)
    assert run(f"checkpoint={ref.GOLDEN}/vqseg_tiny.ckpt", f"out={tmp_path}") == 2
    assert not (tmp_path / "stage.json").exists()
