"""Knowing before launching: slices by name, the arithmetic of the roofline, and the real programs on eight devices."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import demo_transformer, demo_vqgan, paper_transformer, paper_vqgan
from vqgan_jax import parallel
from vqgan_jax.config import UserError
from vqgan_jax.data.sources import open_source
from vqgan_jax.data.transforms import Transform
from vqgan_jax.tools import aot, programs, topologies
from vqgan_jax.tools.compiling import Compiled, largest_buffers
from vqgan_jax.train import roofline
from vqgan_jax.train.roofline import Bound, Cost, Traffic, bound_of, chip_of

ROOT = Path(__file__).parents[2]
TPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    assert len(jax.devices()) == 8  # in use from here on
    folder = tmp_path_factory.getbasetemp() / "aot_cache"  # one for all tests of this file
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(folder))
    return folder / "aot"


def tiny_transformer(**changes):
    config = demo_transformer.get_config()
    config.batch_size, config.cache_codes, config.steps, config.mesh.fsdp = 16, True, "100", 2
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width = 1, 2, 32
    config.update(changes)
    return config


def first_stage():
    """The demo's, of the least layers."""
    model = demo_vqgan.get_config().model
    model.autoencoder.blocks, model.autoencoder.decoder_extra_blocks = 1, 0
    model.autoencoder.attention_resolutions, model.autoencoder.mid_attention = (), False
    return [model]


@pytest.mark.parametrize(
    "name, mend",
    [
        ("v5e", "write v5e:4x4"),
        ("v9:4x4", "unknown name 'v9'"),
        ("v5e:2x2x2", "slices of v5e have 2 axes"),
        ("v5p:4x4", "slices of v5p have 3 axes"),
        ("v5e:0x4", "is none"),
        ("cpu:512", "set JAX_NUM_CPU_DEVICES=512"),
        ("2xcpu:4", "simulated devices form no slices"),
        ("2x:4x4", "write v5e:4x4"),
        ("2xv9:4x4", "unknown name 'v9'"),
    ],
)
def test_what_is_no_topology_is_said_in_one_line(name, mend):
    with pytest.raises(UserError) as error:
        topologies.devices_of(name)
    assert mend in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(TPU, reason="libtpu is installed")
def test_without_the_compiler_its_requirements_are_named():
    with pytest.raises(UserError, match="requirements-tpu.txt"):
        topologies.devices_of("v5e:2x2")


def test_chips_by_the_name_that_jax_gives():
    names = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e", "TPU v4": "TPU v4"}
    names |= {"NVIDIA H100 80GB HBM3": "NVIDIA H100", "NVIDIA A100-SXM4-80GB": "NVIDIA A100", "NVIDIA L4": "NVIDIA L4"}
    assert {kind: chip_of(kind).name for kind in names} == names
    assert chip_of("cpu") is None and chip_of("NVIDIA L40") is None


def cost(**changes):
    fields = dict(flops=197e12, memory_moved=819e9 / 2, collectives={"all-reduce": Traffic(3, 4e9)})
    fields |= dict(between_slices={"all-reduce": Traffic(1, 25e9 / 8 / 10)})
    sizes = dict(arguments=2**30, outputs=0, temporaries=2**30, code=0, unknown_loops=0)
    return Cost(**{**fields, **sizes, **changes})


def program(images=64, **changes):
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    fields = dict(function=None, args=(), mesh=mesh, images=images, steps=3600, needed=None, beside={})
    return programs.Program(**{**fields, **changes})


def test_the_roofline_is_its_longest_part():
    chip = roofline.CHIPS["TPU v5e"]
    bound = bound_of(cost(), chip)
    assert (bound.compute, bound.memory, bound.links, bound.network) == pytest.approx((1.0, 0.5, 0.02, 0.1))
    assert (bound.seconds, bound.by) == (bound.compute, "compute")
    assert Bound(0.1, 0.2, 0.3, 0.0).by == "links" and Bound(0.1, 0.2, 0.3, 0.4).by == "network"
    assert bound_of(cost(), roofline.CHIPS["TPU v4"]).network == 0  # not published: bounds nothing


def test_figures_of_a_run():
    compiled = Compiled(cost(), "", {}, needed_flops=8 * 0.5 * 197e12, seconds=1.0)
    found = aot.figures(program(), compiled, 8, roofline.CHIPS["TPU v5e"])
    assert found["fits"] and found["images_per_second"] == pytest.approx(64)
    assert found["mfu"] == pytest.approx(0.5)  # half of the work is done twice
    assert found["chip_hours"] == pytest.approx(8)  # 3600 steps of a second
    found = aot.figures(program(), compiled, 16, roofline.CHIPS["TPU v5e"])  # a program of one host, two hosts
    assert found["images_per_second"] == pytest.approx(128)


def test_what_does_not_fit_says_what_to_do():
    config = tiny_transformer(batch_size=64)
    chip = roofline.CHIPS["TPU v5e"]

    def said(compiled, tensor=1, **more):
        mesh = {"fsdp": 1, "tensor": tensor}
        found = aot.figures(program(), compiled, 8, chip) | {"topology": "t", "what": "train", "mesh": mesh} | more
        return "\n".join(" ".join(line) for line in aot.lines(found, config))

    large = said(Compiled(cost(temporaries=20 * 2**30), "", {}, 1.0, 1.0))
    assert "DOES NOT FIT 5.25 GiB too much" in large
    assert "mend --config.remat=block" in large and "mend --config.accumulation=2" in large
    assert "mesh.fsdp" not in large  # the state is small
    for tensor, fsdp in ((1, 8), (2, 4), (4, 2)):
        large = said(Compiled(cost(temporaries=20 * 2**30), "", {}, 1.0, 1.0), tensor, state_bytes=4 * 2**30)
        assert f"mend --config.mesh.fsdp={fsdp} --config.mesh.data=-1" in large
    refused = said(Compiled(None, "the compiler needs 24.00GiB", {}, 1.0, 1.0))
    assert "DOES NOT FIT the compiler needs 24.00GiB" in refused and "FITS" not in refused.replace("DOES NOT FIT", "")
    fits = said(Compiled(cost(), "", {}, 1.0, 1.0))
    assert "FITS" in fits and "DCN a chip sends to other slices: all-reduce 1 x, 0.312 GB" in fits
    assert "DCN" not in said(Compiled(cost(between_slices={}), "", {}, 1.0, 1.0))


def test_an_activation_that_grows_with_the_devices_is_named():
    """The same batch a device: what is sharded stays, what is pinned to no axis is whole on each device."""

    def buffers(count, spec):
        mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:count])

        def f(x):
            with jax.named_scope("hidden"):
                y = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, spec))
            return jnp.cos(y[::-1])

        x = jax.ShapeDtypeStruct((128 * count, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
        return largest_buffers(jax.jit(f).lower(x).compile().as_text())

    grown = aot.growing(buffers(2, P()), buffers(8, P()), floor=1000)
    assert grown and grown[0]["to"] == 4 * grown[0]["from"] == 8 * 128 * 64 * 4
    assert "hidden" in " ".join(buffer["made_by"] for buffer in grown)
    assert aot.growing(buffers(2, P("data")), buffers(8, P("data")), floor=10**5) == []


def test_growth_of_a_buffer_that_was_too_small_to_be_kept():
    before = {"attention": (4000, "f32[1000]"), "norm": (1000, "f32[250]")}

    def grown(name, size, shape, floor=500):
        found = aot.growing(before, before | {name: (size, shape)}, floor)
        return [(buffer["made_by"], buffer["from"], buffer["to"]) for buffer in found]

    assert grown("metric", 64000, "f32[64,250]") == [("metric", 1000, 64000)]  # by 64 at least
    assert grown("metric", 64000, "f32[64,250]", floor=63000) == []
    assert grown("metric", 1200, "f32[300]", floor=100) == []  # it may have had 1000
    assert grown("gradient", 4000, "f32[1000]") == []  # fused on fewer chips, or here
    assert grown("gradient", 5000, "f32[1000], f32[250]") == []  # two, which were apart
    assert grown("gradient", 68000, "f32[1000], f32[64,250]") == [("gradient", 1000, 68000)]
    assert grown("norm", 4000, "f32[1000]") == [("norm", 1000, 4000)]  # a known name: whatever its shape


@pytest.mark.parametrize("size", [32, (32, 64)])
def test_the_abstract_batch_is_what_the_pipeline_makes(size):
    config = demo_vqgan.get_config()
    config.data.val_examples = 2
    with config.data.ignore_type():
        config.data.image_size = size
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    keys = ("image", "label", "segmentation", "depth", "coords", "boxes", "box_classes", "crop_box")
    source = open_source(config.data, "val")
    row = Transform.from_config(config.data, keys=keys, classes=len(source.classes), train=True)(
        source[0], np.random.default_rng(0)
    )
    abstract = programs.batch_of(config, keys, 8, mesh)
    assert {k: (x.shape[1:], x.dtype) for k, x in abstract.items()} == {k: (x.shape, x.dtype) for k, x in row.items()}


@pytest.fixture(scope="module")
def compiled_step(tmp_path_factory):
    """The train step of a tiny transformer on eight devices, through the tool: its figures."""
    folder = tmp_path_factory.getbasetemp() / "aot_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQGAN_JAX_CACHE", str(folder))
        return aot.report(tiny_transformer(), "cpu:8", stages=first_stage())


def test_a_train_step_without_data_or_weights(compiled_step):
    found = compiled_step
    assert (found["chips"], found["images"], found["steps"], found["mesh"]["fsdp"]) == (8, 16, 100, 2)
    assert found["flops"] >= 0.95 * found["needed_flops"] > 0
    assert found["collectives"]["all-reduce"]["sent"] > 0
    assert found["arguments"] > 0 and found["temporaries"] > 0 and found["unknown_loops"] == 0
    assert found["beside_bytes"] > 0  # of cached codes the encoder is not in the program, but on the device


def test_what_was_compiled_is_found_again(compiled_step, cache, monkeypatch, capsys):
    before = set(cache.iterdir())
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("compiled again"))
    assert aot.report(tiny_transformer(), "cpu:8", stages=first_stage()) == compiled_step
    assert set(cache.iterdir()) == before and "collectives  a chip sends" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_grows_with_the_devices(compiled_step, capsys):
    """The same batch a device on half of them."""
    found = aot.report(tiny_transformer(), "cpu:8", stages=first_stage(), smaller="cpu:4")
    assert found["growth"] == [] and found["temporaries"] == compiled_step["temporaries"]
    assert "no activation grows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "what, smaller, batch, mend",
    [
        ("train", "cpu:8", 16, "has 8 chips; name a slice with fewer than 8"),
        ("train", "cpu:4", 3, "config.batch_size a multiple of 2"),
        ("sample", "cpu:4", 16, "compares train steps, not --what=sample"),
        ("encode", "cpu:4", 16, "compares train steps, not --what=encode"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_compiled(what, smaller, batch, mend, monkeypatch):
    monkeypatch.setattr(aot, "build", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(UserError, match=f"^--scaling={smaller}: .*{mend}"):
        aot.report(tiny_transformer(batch_size=batch), "cpu:8", what=what, smaller=smaller)


def test_a_smaller_slice_has_the_same_batch_a_chip():
    config = tiny_transformer(batch_size=24)
    smaller, devices = aot.on_fewer(config, "cpu:2", 8, "train")
    assert (smaller.batch_size, len(devices), config.batch_size) == (6, 2, 24)


def test_stages_are_asked_for_and_must_fit():
    config = paper_transformer.get_config("ade20k")
    with pytest.raises(UserError, match="--first=configs/paper_vqgan.py:ROW"):
        aot.stage_models(config, None, None)
    with pytest.raises(UserError, match="--cond"):
        aot.stage_models(config, paper_vqgan.get_config("ade20k"), None)
    assert aot.stage_models(paper_vqgan.get_config("ade20k"), None, None) == []


@pytest.mark.slow
def test_the_stages_of_an_encoded_condition():
    config = paper_transformer.get_config("ade20k")
    models = aot.stage_models(config, paper_vqgan.get_config("ade20k"), paper_vqgan.get_config("ade20k_segmentation"))
    model, frozen = programs.build_transformer(config, models)
    assert set(frozen) == {"first_stage", "cond/segmentation"} and model.first_stage.codebook_size == 4096
    with pytest.raises(UserError, match="config.model.grid"):
        programs.build_transformer(config, [paper_vqgan.get_config("imagenet_f8").model, *models[1:]])


@pytest.mark.slow
def test_the_largest_transformer_is_abstract():
    mesh = parallel.make_mesh({"data": -1, "fsdp": 8, "tensor": 1})
    config = paper_transformer.get_config("class_imagenet_big")
    stages = [paper_vqgan.get_config("imagenet_f16_16384").model]
    made = programs.train_program(config, mesh, examples=1, stages=stages)
    state = made.args[0]
    assert 1.3e9 < sum(x.size for x in jax.tree.leaves(state.params)) < 1.5e9
    assert set(made.args[1]) == {"image", "label"} and set(made.args[2]) == {"first_stage"}
    # Parameters, two moments and EMA in float32, over eight devices but for the norms.
    assert programs.bytes_a_device(state) < 1.02 * 4 * 4 * 1.42e9 / 8


def run(*words, **env):
    return subprocess.run(
        [sys.executable, "-m", "vqgan_jax.tools.aot", *words],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=400,
    )


LOADED = """
import pickle, sys
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 4)
from jax.experimental import serialize_executable
from configs import demo_vqgan
from tests.tools.test_aot import tiny_transformer
from vqgan_jax import parallel
from vqgan_jax.tools import programs
step = serialize_executable.deserialize_and_load(*pickle.load(open(sys.argv[1], "rb")))
config = tiny_transformer()
stages = [demo_vqgan.get_config().model]
made = programs.train_program(config, parallel.make_mesh(config.mesh), examples=1, stages=stages)
zeros = lambda tree: jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), tree)
key = jax.device_put(jax.random.key(0), made.args[0].key.sharding)
state, metrics = step(zeros(made.args[0].replace(key=None)).replace(key=key), *zeros(made.args[1:]))
print(int(state.step), float(metrics["loss"]))
"""


@pytest.mark.slow
def test_a_saved_step_is_loaded_and_runs_elsewhere(tmp_path):
    saved, shape = tmp_path / "step", ["layers=1", "heads=2", "width=32"]
    words = ["--config=configs/demo_transformer.py", "--first=configs/demo_vqgan.py", "--config.cache_codes"]
    words += [f"--config.model.transformer.{field}" for field in shape]
    words += ["--config.batch_size=16", "--config.steps=100", "--config.mesh.fsdp=2"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PJRT_"))}
    plain |= {"JAX_PLATFORMS": "cpu", "VQGAN_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    options = dict(cwd=ROOT, env=plain, capture_output=True, text=True, timeout=400)
    done = subprocess.run(
        [sys.executable, "-m", "vqgan_jax.tools.aot", *words, "--topology=cpu:4", f"--save={saved}"], **options
    )
    assert done.returncode == 0 and "JAX loads it on this machine" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-c", LOADED, str(saved)], **options)
    assert done.returncode == 0, done.stderr
    step, loss = done.stdout.split()
    assert step == "1" and 0 < float(loss) < 20


@pytest.mark.slow
def test_the_command(tmp_path):
    config = ["--config=configs/demo_transformer.py", "--first=configs/demo_vqgan.py"]
    small = ["--config.model.transformer.layers=1", "--config.model.transformer.width=32"]
    words = ["--topology=cpu:4", "--what=sample", f"--json={tmp_path / 'found.json'}"]
    done = run(*config, *small, *words, VQGAN_JAX_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["images"] == 32
    done = run(*config, "--topology=v5e")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cpu:8" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="needs libtpu: requirements-tpu.txt")
def test_a_slice_of_tpus():
    found = aot.report(tiny_transformer(dtype="bfloat16"), "v5e:2x4", stages=first_stage(), smaller="v5e:2x2")
    assert found["chip"] == "TPU v5e" and found["fits"] and found["growth"] == []
    assert found["flops"] == pytest.approx(found["needed_flops"], rel=0.2)
    assert 0 < found["mfu"] < 1


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="needs libtpu: requirements-tpu.txt")
def test_two_slices_of_tpus():
    """`data` runs over both: gradients go between them, weights are gathered inside."""
    found = aot.report(tiny_transformer(dtype="bfloat16"), "2xv5e:2x2", stages=first_stage())
    assert (found["chips"], found["mesh"]["fsdp"]) == (8, 2)
    assert found["between_slices"]["all-reduce"]["sent"] > 0 and found["roofline"]["network"] > 0
    assert "all-gather" not in found["between_slices"] and "all-gather" in found["collectives"]


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="needs libtpu: requirements-tpu.txt")
def test_a_small_vqgan_on_a_slice_of_tpus():
    config = demo_vqgan.get_config()
    ae = config.model.autoencoder
    ae.channels, ae.multipliers, ae.resolution, config.data.image_size = 32, (1, 2), 32, 32
    config.batch_size, config.dtype = 8, "bfloat16"
    found = aot.report(config, "v5e:2x2")
    assert found["fits"] and found["flops"] == pytest.approx(found["needed_flops"], rel=0.2)
