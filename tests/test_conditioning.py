"""Every kind of condition: its tokens and what they say, as a person sees it; several at once; configs; a new kind."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import common
from tests import reference as ref
from vqgan_jax import conditioning
from vqgan_jax.conditioning import (
    KINDS,
    Coordinates,
    CoordinatesConfig,
    Objects,
    batch_keys,
    condition_config,
    encoded_keys,
    make_condition,
)
from vqgan_jax.config import UserError, plain
from vqgan_jax.coordinates import pixel_coordinates
from vqgan_jax.data import scenes
from vqgan_jax.data.transforms import Transform
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.object_tokens import ObjectTokens
from vqgan_jax.sampling.sampler import sample_grid
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer, by_input_key
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

ROOT = Path(__file__).parent.parent
GRID, FACTOR, ROWS = (8, 8), 4, 3
LEVELS = 16  # of each picture's codes


class Blocks(Tokenizer):
    """A VQGAN's stand-in that is read without training: a code is the mean of its block, or its commonest label."""

    def encode(self, variables, images):
        b, h, w, c = images.shape
        means = images.reshape(b, h // FACTOR, FACTOR, w // FACTOR, FACTOR, c).mean((2, 4))
        if self.config.input_key == "segmentation":
            return means.argmax(-1)
        return jnp.round((means.mean(-1) + 1) / 2 * (LEVELS - 1)).astype(jnp.int32)

    def decode(self, variables, ids):
        channels = self.config.autoencoder.in_channels
        if self.config.input_key == "segmentation":
            pixels = jax.nn.one_hot(ids, channels)
        else:
            pixels = jnp.repeat((ids / (LEVELS - 1) * 2 - 1)[..., None], channels, -1)
        return pixels.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)


def stage(key: str, channels: int) -> Blocks:
    config = VQGANConfig(ref.autoencoder((1, 1, 1), (8,), channels), ref.vq(LEVELS), None, key)
    return Blocks(VQGAN(config))


CHANNELS = {"segmentation": len(scenes.SEGMENTATION_CLASSES), "depth": 1, "edges": 1, "low_res": 3, "keypoints": 3}
STAGES = by_input_key(stage(key, channels) for key, channels in CHANNELS.items())
FROZEN = {f"cond/{key}": {} for key in STAGES}
OBJECTS = dict(name="objects", max_objects=8, vocab=1100, classes=len(scenes.BOX_CLASSES), flags=(), trim=True)
SINGLE = {
    "class": dict(name="class", classes=8),
    **{key: dict(name="image", input_key=key) for key in CHANNELS},
    "coordinates": dict(name="coordinates", codes=64, factor=FACTOR, scheme="joint"),
    "boxes": dict(OBJECTS, kind="boxes", crop=False),
    "centres": dict(OBJECTS, kind="centres", crop=True),
}
JOINTS = {
    "class + segmentation": ("class", "segmentation"),
    "boxes + coordinates": ("boxes", "coordinates"),
    "depth + edges + centres": ("depth", "edges", "centres"),
}
NAMES = {"label": scenes.CLASSES, "box_classes": scenes.BOX_CLASSES}


def joint(name: str) -> dict:
    """Named so that the parts keep the order of JOINTS."""
    return {"name": "joint", **{f"part{k}": SINGLE[part] for k, part in enumerate(JOINTS[name])}}


def build(fields: dict, grid=GRID) -> conditioning.Condition:
    return make_condition(condition_config(fields, "config.model.condition"), grid, STAGES)


ALL = {**{name: build(fields) for name, fields in SINGLE.items()}, **{name: build(joint(name)) for name in JOINTS}}


@functools.cache
def rows(condition: conditioning.Condition, size: int = GRID[0] * FACTOR) -> dict[str, np.ndarray]:
    """What the condition reads of three scenes; of one with boxes cut at its sides."""
    transform = Transform(condition.keys, size, "box", "center", (0.5, 1.0), False, 8, len(scenes.CLASSES), 0, 8)
    made = [transform(scenes.render(0, 20 + i, size, size), np.random.default_rng(0)) for i in range(ROWS)]
    return {key: np.stack([row[key] for row in made]) for key in condition.keys}


def on_device(batch):
    return {key: jnp.asarray(value) for key, value in batch.items()}


def on_host(batch):
    return {key: np.asarray(value) for key, value in batch.items()}


@pytest.mark.parametrize("name", ALL)
def test_tokens_say_what_the_condition_says(name):
    condition = ALL[name]
    batch = on_device(rows(condition))
    tokens = condition.tokens(FROZEN, batch)
    assert tokens.shape == (ROWS, condition.length) and tokens.dtype == jnp.int32
    assert 0 <= tokens.min() and tokens.max() < condition.vocab_size
    said = condition.invert(FROZEN, tokens)
    assert set(condition.keys) <= set(said)
    for key in condition.keys:
        assert said[key].dtype == batch[key].dtype, key
        if key not in ("boxes", "box_classes", "box_flags"):  # as many as there are slots
            assert said[key].shape == batch[key].shape, key
    np.testing.assert_array_equal(condition.tokens(FROZEN, said), tokens)
    if "segmentation" in said:
        assert (said["segmentation"] == batch["segmentation"]).mean() > 0.8
    if "coords" in said:
        assert np.abs(said["coords"] - batch["coords"]).max() <= 0.5 / GRID[0] + 1e-6
    if "label" in said:
        np.testing.assert_array_equal(said["label"], batch["label"])
    if "box_classes" in said:
        np.testing.assert_array_equal(np.sort(said["box_classes"]), np.sort(batch["box_classes"]))
    for key in ("depth", "low_res", "keypoints"):
        if key in said:
            assert np.abs(said[key] - batch[key]).mean() < 0.15


@pytest.mark.parametrize("name", ALL)
def test_a_person_sees_what_is_given_and_what_the_tokens_say(name):
    condition = ALL[name]
    batch = rows(condition)
    given = condition.draw(batch, (96, 112), NAMES)
    assert given.shape == (ROWS, 96, 112 * len(condition.parts), 3) and given.dtype == np.uint8
    said = condition.draw(
        on_host(condition.invert(FROZEN, condition.tokens(FROZEN, on_device(batch)))), (96, 112), NAMES
    )
    assert said.shape == given.shape
    if condition.keys == ("coords",):  # the same of every whole picture
        assert (np.diff(given[0, :, 0, 0].astype(int)) >= 0).all() and (
            np.diff(given[0, 0, :, 1].astype(int)) >= 0
        ).all()
        return
    difference = lambda a, b: np.abs(a.astype(float) - b).mean()  # noqa: E731
    others = [difference(given[i], given[j]) for i in range(ROWS) for j in range(ROWS) if i != j]
    assert max(others) > 0
    assert np.mean([difference(a, b) for a, b in zip(given, said, strict=True)]) < np.mean(others)


def test_names_are_drawn_and_classes_without_one_are_numbers():
    batch = {"label": np.array([0, 0, 12])}
    by_key, plain_list, none = (ALL["class"].draw(batch, (40, 200), n) for n in (NAMES, scenes.CLASSES, ()))
    np.testing.assert_array_equal(by_key, plain_list)
    assert (by_key[0] != none[0]).any() and (by_key[2] == none[2]).all()
    boxes = rows(ALL["boxes"])
    assert (ALL["boxes"].draw(boxes, (96, 96), NAMES) != ALL["boxes"].draw(boxes, (96, 96))).any()


def test_boxes_are_drawn_where_the_crop_shows_them():
    condition = ALL["centres"]
    batch = {
        "boxes": np.float32([[[0.5, 0.5, 0.25, 0.25], [0.0, 0.0, 0.2, 0.2]]]),
        "box_classes": np.int32([[2, 3]]),
        "box_flags": np.zeros((1, 2), np.int32),
        "crop_box": np.float32([[0.5, 0.5, 0.5, 0.5]]),
    }
    inside = {**batch, "box_classes": np.int32([[2, -1]])}
    np.testing.assert_array_equal(condition.draw(batch, (64, 64)), condition.draw(inside, (64, 64)))
    as_seen = {
        **inside,
        "boxes": np.float32([[[0, 0, 0.5, 0.5], [0, 0, 0, 0]]]),
        "crop_box": np.float32([[0, 0, 1, 1]]),
    }
    np.testing.assert_array_equal(condition.draw(batch, (64, 64)), condition.draw(as_seen, (64, 64)))


def test_no_condition_is_a_start_token_that_says_nothing():
    condition = build(dict(name="none"))
    tokens = condition.tokens({}, {"image": jnp.zeros((2, 4, 4, 3))})
    assert tokens.shape == (2, 1) and condition.invert({}, tokens) == {} and condition.keys == ()
    assert condition.draw({"image": np.zeros((2, 4, 4, 3))}, (5, 6)).shape == (2, 5, 6, 3)


@pytest.mark.parametrize("name", JOINTS)
def test_several_at_once_are_their_parts_one_after_the_other(name):
    whole, parts = ALL[name], [ALL[part] for part in JOINTS[name]]
    assert whole.parts == tuple(parts) and whole.spatial == any(part.spatial for part in parts)
    assert whole.labels == (8 if "class" in JOINTS[name] else 0)
    batch = rows(whole)
    tokens = np.asarray(whole.tokens(FROZEN, on_device(batch)))
    said, drawn = whole.invert(FROZEN, jnp.asarray(tokens)), whole.draw(batch, (64, 64))
    start = offset = 0
    for k, part in enumerate(parts):
        own = {key: batch[key] for key in part.keys}
        ids = np.asarray(part.tokens(FROZEN, on_device(own)))
        np.testing.assert_array_equal(tokens[:, start : start + part.length] - offset, ids)
        for key, value in part.invert(FROZEN, jnp.asarray(ids)).items():
            np.testing.assert_array_equal(said[key], value)
        np.testing.assert_array_equal(drawn[:, :, 64 * k : 64 * (k + 1)], part.draw(own, (64, 64)))
        start, offset = start + part.length, offset + part.vocab_size
    assert (start, offset) == (whole.length, whole.vocab_size)


@pytest.mark.parametrize("name", JOINTS)
def test_windows_of_several_at_once_are_those_of_the_parts(name):
    """Of whole pictures larger than the trained ones."""
    whole, parts, grid = ALL[name], [ALL[part] for part in JOINTS[name]], (16, 16)
    batch = rows(whole, grid[0] * FACTOR)
    tokens = whole.tokens(FROZEN, on_device(batch))
    assert tokens.shape[1] == whole.length_on(grid) > whole.length == whole.length_on(GRID)
    cut = jax.jit(lambda tokens, top, left: whole.window(tokens, grid, top, left, GRID))(tokens, 3, 5)
    assert cut.shape == (ROWS, whole.length)
    start = offset = 0
    for part in parts:
        own = part.tokens(FROZEN, on_device({key: batch[key] for key in part.keys}))
        np.testing.assert_array_equal(cut[:, start : start + part.length] - offset, part.window(own, grid, 3, 5, GRID))
        start, offset = start + part.length, offset + part.vocab_size
    said = whole.invert(FROZEN, tokens, grid)
    for key in set(whole.keys) & {"segmentation", "depth", "edges", "coords"}:
        assert said[key].shape[1:3] == (64, 64)


def make_model(fields: dict, **changes) -> ImageTransformer:
    config = common.transformer()
    config.model.condition, config.model.grid = ConfigDict(fields), (2, 2)
    gpt = config.model.transformer
    gpt.layers, gpt.heads, gpt.width = 1, 2, 16
    gpt.prefix = changes.pop("prefix", 0)
    config.model.update(changes)
    first = Tokenizer(VQGAN(ref.FIRST_STAGE_TINY))
    return ImageTransformer(TransformerConfig.from_config(config.model), first, STAGES)


def test_several_conditions_see_each_other_both_ways_and_are_dropped_together():
    """A bidirectional prefix over the whole condition, condition dropout, and the cache that the sampler uses."""
    model = make_model(joint("class + segmentation"), prefix=-1, condition_dropout=0.5)
    condition = model.condition
    assert model.gpt.prefix == condition.length == 5 and model.attend == "prefix"
    tokens = condition.tokens(FROZEN, on_device(rows(condition, 8)))
    dropped = model.drop_condition(jax.random.key(0), jnp.tile(tokens, (20, 1)))
    null = (dropped == condition.vocab_size).all(axis=1)
    assert 15 < null.sum() < 45
    np.testing.assert_array_equal(dropped[~null], jnp.tile(tokens, (20, 1))[~null])
    assert model.layout.vocab_size == 64 + condition.vocab_size + 1

    params = nn.unbox(jax.jit(model.init)(jax.random.key(0)))
    noise = jax.random.key(1)
    params = jax.tree.map(lambda x: 5 * x + 0.1 * jax.random.normal(noise, x.shape), params)

    @jax.jit
    def run(params, tokens):
        keys = row_keys(0, jnp.arange(ROWS))
        ids = sample_grid(model, split_layers(params), tokens, keys, Strategy(greedy=True))
        return ids, model.logits(params, tokens, model.from_grid(ids))

    ids, logits = run(params, tokens)
    np.testing.assert_array_equal(logits.argmax(-1), model.from_grid(ids))
    for wrong in (6, -2):
        with pytest.raises(UserError, match=r"transformer\.prefix: .* condition has 5 tokens"):
            _ = make_model(joint("class + segmentation"), prefix=wrong).gpt


def test_sizes_that_do_not_fit_the_grid_are_told():
    model = make_model(joint("class + segmentation"))
    model.check_size(8)
    coarse = Blocks(VQGAN(dataclasses.replace(STAGES["depth"].config, autoencoder=ref.autoencoder())))
    with pytest.raises(UserError, match=r"config\.cond_vqgan: the VQGAN of 'depth' has factor 2, .* factor 4"):
        dataclasses.replace(model, cond_stages={**STAGES, "depth": coarse}).check_size(8)
    with pytest.raises(UserError, match=r"factor: 8, the first stage has 4"):
        make_model(dict(SINGLE["coordinates"], factor=8)).check_size(8)


def test_joint_configs_are_read_by_name_and_survive_every_copy():
    fields = {"name": "joint", "map": SINGLE["segmentation"], "kind": SINGLE["class"]}
    config = condition_config(ConfigDict(fields), "k")
    assert [type(part).__name__ for part in config.parts] == ["ClassLabelConfig", "EncodedImageConfig"]  # kind, map
    recorded = json.loads(json.dumps(plain(ConfigDict(dict(condition=fields)))))["condition"]
    assert condition_config(recorded, "k") == condition_config(dict(reversed(fields.items())), "k") == config
    assert encoded_keys(config) == ("segmentation",) and batch_keys(config) == ("label", "segmentation")


def test_a_part_is_overridden_on_the_command_line(monkeypatch):
    config = common.transformer()
    config.model.condition = ConfigDict(joint("class + segmentation"))
    argv, values = ["program", "--config.model.condition.part0.classes=5"], flags.FlagValues()
    monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for overrides
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    values(argv)
    assert condition_config(values.config.model.condition, "k").parts[0].classes == 5


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"a": SINGLE["class"]}, "k: a joint condition has two parts"),
        ({"a": SINGLE["class"], "b": 3}, "k.b: a part of a joint condition"),
        ({"a": SINGLE["class"], "b": {"name": "none"}}, "k.b.name: unknown name 'none'"),
        ({"a": SINGLE["class"], "b": {"name": "imgae"}}, "k.b.name: .*did you mean 'image'"),
        ({"a": SINGLE["class"], "b": {"name": "class", "classes": 0}}, "k.b: classes is 0"),
        ({"a": SINGLE["depth"], "b": SINGLE["class"], "c": SINGLE["depth"]}, "k: 'a' and 'c' both read 'depth'"),
    ],
)
def test_mistakes_in_joint_configs_name_the_part(fields, message):
    with pytest.raises(UserError, match=message):
        condition_config({"name": "joint", **fields}, "k")


def test_an_encoded_picture_needs_its_own_vqgan():
    config = condition_config(joint("depth + edges + centres"), "k")
    with pytest.raises(UserError, match="a 'edges' condition needs the workdir .* there is one of depth"):
        make_condition(config, GRID, {"depth": STAGES["depth"]})


def test_the_new_kind_of_the_readme_is_one():
    """The class and the row that the README shows are all that a model of a new kind needs."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    code = next(block for block in blocks if "KINDS" in block)
    before = dict(KINDS)
    try:
        exec(compile(code, "README.md", "exec"), {})
        (name,) = set(KINDS) - set(before)
        config = common.transformer()
        (use,) = (block for block in blocks if f'name="{name}"' in block)
        exec(compile(use, "README.md", "exec"), {"config": config, "ConfigDict": ConfigDict})
        condition_config(config.model.condition, "k")
        fields = {"name": name} | {field.name: 5 for field in dataclasses.fields(KINDS[name].config)}
        model = make_model({"name": "joint", "a": fields, "b": SINGLE["class"]}, condition_dropout=0.1)
        condition = model.condition
        tokens = condition.tokens({}, on_device(rows(condition)))
        assert tokens.shape == (ROWS, 2)
        np.testing.assert_array_equal(condition.tokens({}, condition.invert({}, tokens)), tokens)
        assert condition.draw(rows(condition), (32, 48)).shape == (ROWS, 32, 96, 3)
        model.check_size(8)
        assert jax.eval_shape(model.init, jax.random.key(0))
    finally:
        KINDS.clear()
        KINDS.update(before)


def test_the_raster_scheme_equals_the_reference_for_pictures_and_their_crops():
    golden = ref.golden("coords.npz")
    vocab, factor = int(golden["n_embed"]), int(golden["down_factor"])
    coords = pixel_coordinates(*golden["coord"].shape[1:3])[None]
    expected = golden["indices"][:, 0]
    condition = Coordinates(CoordinatesConfig(vocab, factor, "raster"), expected.shape[1:])
    tokens = jax.jit(lambda x: condition.tokens({}, {"coords": x}))(coords)
    np.testing.assert_array_equal(tokens, expected.reshape(1, -1))
    crop = coords[:, factor : 3 * factor, factor : 4 * factor]
    cropped = Coordinates(condition.config, (2, 3)).tokens({}, {"coords": jnp.asarray(crop)})
    np.testing.assert_array_equal(cropped, expected[:, 1:3, 1:4].reshape(1, -1))
    scalar = condition.invert({}, tokens)["coords"][..., :1]
    assert np.abs(scalar - golden["coord"]).max() < factor / coords.shape[1] + 1 / vocab


def test_tokens_never_leave_the_table():
    condition = Coordinates(CoordinatesConfig(4, 1, "raster"), (4, 4))
    tokens = condition.tokens({}, {"coords": jnp.asarray(pixel_coordinates(4, 4)[None])})
    assert tokens.max() == 3


def test_objects_are_their_layouts_tokens():
    layout = ObjectTokens("boxes", 3, 100, 5, True, ("group",), False)
    condition = make_condition(layout, (4, 4), {})
    assert condition == Objects(layout) and condition.length == 11 and condition.vocab_size == 100
    assert condition.keys == ("boxes", "box_classes", "box_flags", "crop_box") and not condition.spatial
    batch = {
        "boxes": jnp.array([[[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]]),
        "box_classes": jnp.array([[2, -1]]),
        "box_flags": jnp.array([[1, 0]]),
        "crop_box": jnp.array([[0.0, 0.0, 1.0, 0.5]]),
    }
    tokens = condition.tokens({}, batch)
    assert tokens[0, 0] == 2 + 5 and (tokens[0, 3:9] == layout.none).all()
    found = condition.invert({}, tokens)
    np.testing.assert_allclose(found["boxes"][0, 0], batch["boxes"][0, 0], atol=0.5 / 9 * 2)
    np.testing.assert_array_equal(found["box_flags"][0], [1, 0, 0])


@pytest.mark.parametrize("crop, trim, whole", [(True, True, True), (False, False, True), (False, True, False)])
def test_objects_ask_for_the_crop_where_its_boxes_must_be_whole(crop, trim, whole):
    condition = Objects(ObjectTokens("boxes", 3, 100, 5, crop, (), trim))
    assert ("crop_box" in condition.keys) == whole


def test_configs_are_read_by_name():
    config = condition_config({"name": "coordinates", "codes": 64, "factor": 4, "scheme": "joint"}, "k")
    assert config == CoordinatesConfig(64, 4, "joint")
    fields = dict(kind="boxes", max_objects=3, vocab=100, classes=5, crop=False, flags=["group"], trim=True)
    assert condition_config({"name": "objects", **fields}, "k") == ObjectTokens(**fields | {"flags": ("group",)})
    for wrong, message in (
        ({"name": "coordinates", "codes": 64, "factor": 4, "scheme": "rater"}, "did you mean 'raster'"),
        ({"name": "coordinates", "codes": 0, "factor": 4, "scheme": "joint"}, "codes is 0"),
        ({"name": "objects", **fields, "vocab": 3}, "k: vocab"),
        ({"name": "object"}, "did you mean 'objects'"),
    ):
        with pytest.raises(UserError, match=message):
            condition_config(wrong, "k")
