"""Codes made once: what they hold, how they are read, resumed and refused, and that training on them is the same."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from ml_collections import ConfigDict

import train_transformer
from configs import common, finetune
from tests.processes import free_address
from vqgan_jax import conditioning, pretrained, storage
from vqgan_jax.config import UserError
from vqgan_jax.data import records
from vqgan_jax.data.pipeline import pipeline
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.models.vqgan import model_input
from vqgan_jax.tools.convert import import_checkpoint
from vqgan_jax.tools.encode import encode
from vqgan_jax.train import code_cache, encoding, setup
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TRAIN, VAL, SHARD = 11, 5, 4


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Imported models `class` and `depth`, a cache of scenes, and shards of a few examples."""
    folder = tmp_path_factory.mktemp("codes")
    os.environ["VQGAN_JAX_CACHE"] = str(folder / "cache")
    for name in ("class", "depth"):
        import_checkpoint(str(GOLDEN / f"{name}_transformer_tiny.ckpt"), None, str(folder / name))
    size, encoding.SHARD_EXAMPLES = encoding.SHARD_EXAMPLES, SHARD
    yield folder
    encoding.SHARD_EXAMPLES = size
    del os.environ["VQGAN_JAX_CACHE"]


CONDITIONS = {
    "class": dict(name="class", classes=8),
    "none": dict(name="none"),
    "depth": dict(name="image", input_key="depth"),
    "coordinates": dict(name="coordinates", codes=64, factor=4, scheme="joint"),
    "joint": dict(name="joint", kind=dict(name="class", classes=8), map=dict(name="image", input_key="depth")),
    "objects": dict(name="objects", kind="boxes", max_objects=6, vocab=128, classes=8, crop=False, flags=(), trim=True),
}


def make_config(folder: Path, condition: str = "class", **data) -> ConfigDict:
    """A transformer on 8x8 codes of scenes of 32 pixels; `data` changes fields of config.data."""
    config = finetune.get_config(str(folder / ("depth" if condition in ("depth", "joint") else "class")))
    config.model.condition = ConfigDict(CONDITIONS[condition])
    config.init_from, config.seed, config.batch_size = "", 3, 8
    config.model.grid = (8, 8)
    config.data = common.data("scenes")
    changes = dict(train_examples=TRAIN, val_examples=VAL, image_size=32, crop="center", flip=False)
    config.data.update(changes | data)
    return config


def open_model(config: ConfigDict):
    """(model, stages, pictures), as the tool opens them."""
    stages = pretrained.open_named_stages(config, jnp.float32)
    model = ImageTransformer(TransformerConfig.from_config(config.model), stages.first, stages.cond)
    keys = (stages.first.config.input_key, *model.condition.keys)
    data = setup.open_data(config, keys, factor=stages.first.factor, classes=model.condition.vocab_size)
    return model, stages, data


def read(folder: Path, split: str) -> list[dict]:
    source = records.Records(folder, split, kind=records.CODES)
    return [source[i] for i in range(len(source))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def direct(model, stages, rows: list[dict]) -> dict[str, np.ndarray]:
    """Codes of batch rows, by the models themselves."""
    batch = {key: jnp.asarray(np.stack([row[key] for row in rows])) for key in rows[0]}
    tokenizer = model.first_stage
    made = {
        "codes/image": tokenizer.encode(stages.frozen["first_stage"], model_input(tokenizer.config, batch)),
    }
    for part in model.condition.parts:
        if isinstance(part, conditioning.EncodedImage):
            made[part.codes_key] = part.tokens(stages.frozen, batch).reshape(-1, 8, 8)
    return jax.tree.map(np.asarray, made)


@pytest.mark.parametrize("condition", ["class", "joint"])
def test_codes_are_those_of_the_pictures_in_their_order_and_of_their_mirror_images(folder, tmp_path, condition):
    config = make_config(folder, condition)
    encode(config, str(tmp_path / "out"), views="center_flip", batch=8)
    model, stages, data = open_model(config)
    for split, source in (("train", data.train), ("val", data.val)):
        rows = [data.val_transform(source[i], np.random.default_rng(0)) for i in range(len(source))]
        mirrored = [{k: x[:, ::-1] if np.ndim(x) == 3 else x for k, x in row.items()} for row in rows]
        found = read(tmp_path / "out", split)
        assert len(found) == len(source)
        for view, wanted in enumerate((rows, mirrored) if split == "train" else (rows,)):
            for key, ids in direct(model, stages, wanted).items():
                np.testing.assert_array_equal(np.stack([example[key][view] for example in found]), ids)
        if "label" in model.condition.keys:
            assert [list(example["label"]) for example in found] == [
                [row["label"]] * (2 if split == "train" else 1) for row in rows
            ]
        assert all(len(example["codes/image"]) == (2 if split == "train" else 1) for example in found)
    manifest = records.read_manifest(tmp_path / "out", kind=records.CODES)
    assert manifest["stages"] == stages.digest and manifest["views"] == "center_flip"
    assert manifest["codebook_sizes"]["codes/image"] == 64 and manifest["grid"] == [8, 8]
    assert [shard["count"] for shard in manifest["splits"]["train"]["shards"]] == [4, 4, 3]
    assert records.verify(tmp_path / "out") == 5
    assert not (tmp_path / "out" / "entries").exists() and not (tmp_path / "out" / records.UNFINISHED).exists()
    assert found[0]["codes/image"].dtype == np.uint8


def test_random_views_are_a_function_of_seed_view_and_example_alone(folder, tmp_path, monkeypatch):
    """Not of shards, batches, threads or how many views there are."""
    config = make_config(folder, "coordinates", crop="random_resized", flip=True)
    encode(config, str(tmp_path / "a"), views="3", batch=8)
    monkeypatch.setattr(encoding, "SHARD_EXAMPLES", 7)
    config.data.threads = 1
    encode(config, str(tmp_path / "b"), views="3", batch=32)
    for mine, other in zip(read(tmp_path / "a", "train"), read(tmp_path / "b", "train"), strict=True):
        for key in mine:
            np.testing.assert_array_equal(mine[key], other[key], err_msg=key)
        starts = {(float(y[0]), float(x[0])) for y, x in zip(mine["coords/y"], mine["coords/x"], strict=True)}
        assert len(starts) == 3
    config.seed = 4
    encode(config, str(tmp_path / "c"), views="3", batch=8)
    encode(config, str(tmp_path / "d"), views="2", batch=8)
    for mine, other in zip(read(tmp_path / "a", "train"), read(tmp_path / "c", "train"), strict=True):
        assert (mine["coords/y"] != other["coords/y"]).any()
    for three, two in zip(read(tmp_path / "c", "train"), read(tmp_path / "d", "train"), strict=True):
        np.testing.assert_array_equal(three["coords/y"][:2], two["coords/y"])
    for mine, other in zip(read(tmp_path / "a", "val"), read(tmp_path / "c", "val"), strict=True):
        np.testing.assert_array_equal(mine["codes/image"], other["codes/image"])  # the centre, whatever the seed


@pytest.mark.parametrize("condition", ["coordinates", "objects"])
def test_what_describes_a_picture_goes_through_the_same_view(folder, tmp_path, condition):
    """Boxes and coordinates come back exactly as the transform makes them, mirrored with the picture."""
    config = make_config(folder, condition)
    encode(config, str(tmp_path), views="center_flip", batch=8)
    model, stages, data = open_model(config)
    opened = code_cache.open_codes(tmp_path, model, stages.digest)
    keys, transforms = model.condition.keys, (data.val_transform, encoding.Mirrored(data.val_transform))
    for i, view in itertools.product(range(TRAIN), range(2)):
        wanted = transforms[view](data.train[i], np.random.default_rng(0))
        for key in keys:
            found = encoding.unpack(opened.train[i], key, view)
            assert found.dtype == wanted[key].dtype
            np.testing.assert_array_equal(found, wanted[key], err_msg=key)
    if condition == "objects":  # coordinates are those of the mirrored picture
        assert any((opened.train[i]["boxes"][0] != opened.train[i]["boxes"][1]).any() for i in range(TRAIN))


def test_an_epoch_has_each_example_once_in_a_view_drawn_by_the_seed(folder, tmp_path):
    config = make_config(folder, "coordinates", crop="random_resized", flip=True)
    encode(config, str(tmp_path), views="4", batch=8)
    model, stages, _ = open_model(config)
    data = code_cache.open_codes(tmp_path, model, stages.digest)
    views = {  # (example, view) by the corner of its crop
        encoding.unpack(data.train[i], "coords", view)[0, 0].tobytes(): (i, view)
        for i, view in itertools.product(range(TRAIN), range(4))
    }
    assert len(views) == 4 * TRAIN

    def epochs(seed: int, batch: int) -> list[tuple[int, int]]:
        options = dict(threads=2, processes=0, max_corrupt_share=0.0, start=0, seed=seed, rows=np.arange(batch))
        with pipeline(data.train, global_batch=batch, transform=data.train_transform, **options) as batches:
            rows = itertools.chain.from_iterable(next(batches)["coords"] for _ in range(10 * TRAIN // batch))
            return [views[row[0, 0].tobytes()] for row in rows]

    drawn = epochs(0, TRAIN)
    for epoch in range(10):
        assert sorted(i for i, _ in drawn[epoch * TRAIN :][:TRAIN]) == list(range(TRAIN))
    assert {view for _, view in drawn} == set(range(4)) and len(set(drawn)) > 3 * TRAIN
    assert epochs(0, 10) == drawn and epochs(1, 10) != drawn
    row = data.val_transform(data.val[0], None)
    assert row["codes/image"].dtype == np.int32 and row["coords"].shape == (32, 32, 2)


class Broken(Exception): ...


def test_a_job_that_broke_off_goes_on_at_the_next_shard_and_ends_the_same(folder, tmp_path, monkeypatch):
    config = make_config(folder, "depth", crop="random_resized")
    encode(config, str(tmp_path / "whole"), views="2", batch=8)
    written, write = [], records.write_shard

    def spy(path, examples):
        if len(written) == 2:
            list(itertools.islice(examples, 1))
            raise Broken
        written.append(Path(path).name)
        return write(path, examples)

    monkeypatch.setattr(records, "write_shard", spy)
    with pytest.raises(Broken):
        encode(config, str(tmp_path / "a"), views="2", batch=8)
    with pytest.raises(UserError, match="is unfinished"):
        records.Records(tmp_path / "a", "train", kind=records.CODES)
    other = config.copy_and_resolve_references()
    other.seed = 4
    with pytest.raises(UserError, match="a: holds other codes: seed: 4 here, 3 there"):
        encode(other, str(tmp_path / "a"), views="2")
    monkeypatch.setattr(records, "write_shard", lambda p, e: written.append(Path(p).name) or write(p, e))
    encode(config, str(tmp_path / "a"), views="2", batch=8)
    assert len(written) == len(set(written)) == 5
    assert files(tmp_path / "a") == files(tmp_path / "whole")
    monkeypatch.setattr(encoding, "_Encoder", None)  # what is done is not done again
    encode(config, str(tmp_path / "a"), views="2", batch=8)


class Damaged:
    """A source of which some examples cannot be read."""

    def __init__(self, source, unreadable):
        self.source, self.unreadable, self.classes = source, unreadable, source.classes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise CorruptExample(f"{index}.png", "broken")
        return self.source[index]


def damage(monkeypatch, unreadable):
    opened = setup.open_source
    monkeypatch.setattr(
        setup, "open_source", lambda data, split: Damaged(opened(data, split), unreadable if split == "train" else {0})
    )


def test_unreadable_examples_are_left_out_and_named(folder, tmp_path, monkeypatch, caplog):
    config = make_config(folder, max_corrupt_share=0.5)
    encode(config, str(tmp_path / "whole"), batch=8)
    damage(monkeypatch, {1, 8, 9, 10})  # the last shard as a whole
    caplog.set_level(logging.WARNING)
    encode(config, str(tmp_path / "some"), batch=8)
    whole, some = read(tmp_path / "whole", "train"), read(tmp_path / "some", "train")
    for index, found in zip([0, 2, 3, 4, 5, 6, 7], some, strict=True):
        np.testing.assert_array_equal(found["codes/image"], whole[index]["codes/image"])
        np.testing.assert_array_equal(found["label"], whole[index]["label"])
    assert len(read(tmp_path / "some", "val")) == VAL - 1
    for index in (0, 1, 8, 9, 10):
        assert any(f"{index}.png cannot be read (broken): left out" in r.getMessage() for r in caplog.records)


def test_too_many_unreadable_examples_are_refused(folder, tmp_path, monkeypatch):
    damage(monkeypatch, {1, 2})
    with pytest.raises(UserError, match="2 of 11 examples of the split 'train' .*config.data.max_corrupt_share") as e:
        encode(make_config(folder, max_corrupt_share=0.1), str(tmp_path / "a"), batch=8)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="is unfinished"):
        records.Records(tmp_path / "a", "train", kind=records.CODES)


def test_codes_of_something_else_are_refused_in_one_line(folder, tmp_path):
    config = make_config(folder)
    encode(config, str(tmp_path), batch=8)
    model, stages, _ = open_model(config)
    assert len(code_cache.open_codes(tmp_path, model, stages.digest).train) == TRAIN

    def refused(config: ConfigDict, where=tmp_path, **digest) -> str:
        model, stages, _ = open_model(config)
        with pytest.raises(UserError) as error:
            code_cache.open_codes(where, model, stages.digest | digest)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "made by another VQGAN" in refused(config, first_stage="0" * 64)
    assert f"config.codes={tmp_path}: has no 'codes/cond/depth'" in refused(make_config(folder, "depth"))
    assert "has no 'boxes'" in refused(make_config(folder, "objects"))
    other = make_config(folder)
    other.data.image_size, other.model.grid = 16, (4, 4)
    assert "holds 8x8 codes a picture, config.model.grid is 4x4" in refused(other)
    assert "no such file" in refused(config, tmp_path / "nothing")
    records.write_manifest(tmp_path / "images", {"kind": records.IMAGES, "splits": {}, "classes": [], "keys": []})
    assert "holds images, where codes are wanted" in refused(config, tmp_path / "images")
    fewer = make_config(folder)
    fewer.model.condition.classes = 3
    model = ImageTransformer(TransformerConfig.from_config(fewer.model), stages.first)
    with pytest.raises(UserError, match="config.model.condition.classes: the model has 3, .* has 8"):
        code_cache.open_codes(tmp_path, model, stages.digest)


def test_a_condition_of_another_vqgan_is_refused(folder, tmp_path):
    config = make_config(folder, "depth")
    encode(config, str(tmp_path), batch=8)
    model, stages, _ = open_model(config)
    with pytest.raises(UserError, match="made by another VQGAN .* than config.cond_vqgan"):
        code_cache.open_codes(tmp_path, model, stages.digest | {"cond_stage": "0" * 64})


def test_boxes_relative_to_something_else_are_refused(folder, tmp_path):
    """A condition that is told the crop takes boxes of the whole picture; the others take those of what is seen."""
    whole = make_config(folder, "objects")
    whole.model.condition.crop = True
    encode(whole, str(tmp_path), batch=8)
    model, stages, _ = open_model(make_config(folder, "objects"))
    with pytest.raises(UserError, match="boxes are relative to the whole picture, .* takes what is seen"):
        code_cache.open_codes(tmp_path, model, stages.digest)
    model, stages, _ = open_model(whole)
    assert "crop_box" in code_cache.open_codes(tmp_path, model, stages.digest).train[0]


@pytest.mark.parametrize("views", ["centre", "0", "-1", "1.5"])
def test_unknown_views_are_refused(folder, tmp_path, views):
    with pytest.raises(UserError, match=f"--views={views}: write center, center_flip, or a number"):
        encode(make_config(folder), str(tmp_path / "a"), views=views)


def test_a_bucket_holds_codes(folder, bucket):
    config = make_config(folder)
    encode(config, f"{bucket}/codes", batch=8)
    encode(config, f"{bucket}/codes", batch=8)
    model, stages, data = open_model(config)
    opened = code_cache.open_codes(f"{bucket}/codes", model, stages.digest)
    labels = [int(opened.train_transform(opened.train[i], np.random.default_rng(0))["label"]) for i in range(TRAIN)]
    assert labels == [data.train[i]["label"] for i in range(TRAIN)]
    names = sorted(path.name for path in storage.files(f"{bucket}/codes"))
    assert names == ["manifest.json", *(f"train-0000{k}-of-00003.arrayrecord" for k in range(3))] + [
        f"val-0000{k}-of-00002.arrayrecord" for k in range(2)
    ]


def training_config(folder: Path, condition: str, **changes) -> ConfigDict:
    config = make_config(folder, condition)
    config.steps, config.eval_examples, config.images_shown = "2", 0, 0
    config.log_every, config.eval_every, config.save_every, config.images_every = "1", "2", "0", "0"
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width, gpt.block_size, gpt.residual_dropout = 1, 2, 32, 0, 0.0
    config.optimizer.warmup = "0"
    for name, value in changes.items():
        config[name] = value
    return config


def losses(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k in ("step", "nll", "accuracy", "val/nll")} for line in lines]


@pytest.mark.parametrize(
    "condition",
    ["class", "depth", *(pytest.param(c, marks=pytest.mark.slow) for c in ("none", "coordinates", "objects"))],
)
def test_training_on_codes_equals_training_on_pictures(folder, tmp_path, condition):
    """With centre crops, both from a folder made before (the pictures are gone) and from the workdir's own."""
    encode(make_config(folder, condition), str(tmp_path / "codes"), batch=8)
    train_transformer.train(training_config(folder, condition), str(tmp_path / "pictures"))
    wanted = losses(tmp_path / "pictures")
    gone = training_config(folder, condition, codes=str(tmp_path / "codes"))
    gone.data.source, gone.data.path = "folder", "/nowhere"
    cached = training_config(folder, condition, cache_codes=True)
    for name, config in (("gone", gone), ("cached", cached)):
        train_transformer.train(config, str(tmp_path / name))
        for found, line in zip(losses(tmp_path / name), wanted, strict=True):
            assert found == pytest.approx(line, rel=1e-5, abs=1e-6)
    assert (tmp_path / "cached" / "codes" / "manifest.json").exists() and not (tmp_path / "gone" / "codes").exists()


def test_a_workdir_makes_its_codes_anew_only_where_it_must(folder, tmp_path, monkeypatch):
    config = make_config(folder)
    config.cache_codes = True
    model, stages, data = open_model(config)

    def opened(config: ConfigDict):
        return code_cache.open_data(config, tmp_path, model, stages.frozen, stages.digest, lambda: data)

    assert len(opened(config).train[0]["label"]) == 1
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    config.data.threads, config.batch_size = 1, 16
    opened(config)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    config.data.flip = True
    assert len(opened(config).train[0]["label"]) == 2
    assert code_cache.open_ready(config, tmp_path, model, stages.digest) is not None
    assert code_cache.open_ready(config, tmp_path / "nothing", model, stages.digest) is None
    config.cache_codes = False
    assert opened(config) is data


SCRIPT = """
import os, signal, sys
import jax
if len(sys.argv) > 3:
    settings = dict(coordinator_bind_address=sys.argv[3], cluster_detection_method="deactivate")
    jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[4]), **settings)
from pathlib import Path
from tests.train.test_code_cache import make_config
from vqgan_jax.data import records
from vqgan_jax.tools.encode import encode
from vqgan_jax.train import encoding
encoding.SHARD_EXAMPLES = 4
write = records.write_shard
def write_or_die(path, examples):
    if "train-00001" in str(path) and os.environ.get("DIE"):
        next(iter(examples))
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, examples)
records.write_shard = write_or_die
config = make_config(Path(sys.argv[1]))
config.remap = bool(os.environ.get("REMAP"))
encode(config, sys.argv[2], views="center_flip", batch=8)
print("shards on", jax.process_index(), "of", jax.process_count())
"""


def process(*args: str, **env: str) -> subprocess.Popen:
    settings = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"} | env
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *args],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_and_on_two_hosts_the_codes_are_those_of_one_undisturbed_process(folder, tmp_path):
    alone = process(str(folder), str(tmp_path / "alone"))
    assert alone.wait(timeout=200) == 0, alone.stderr.read()
    killed = process(str(folder), str(tmp_path / "killed"), DIE="1")
    assert killed.wait(timeout=200) == -signal.SIGKILL, killed.stderr.read()
    resumed = process(str(folder), str(tmp_path / "killed"))
    assert resumed.wait(timeout=200) == 0, resumed.stderr.read()
    address = free_address()
    hosts = [process(str(folder), str(tmp_path / "hosts"), address, str(rank)) for rank in (0, 1)]
    outputs = [host.communicate(timeout=200) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert "shards on 1 of 2" in outputs[1][0]
    assert files(tmp_path / "alone") == files(tmp_path / "killed") == files(tmp_path / "hosts")
