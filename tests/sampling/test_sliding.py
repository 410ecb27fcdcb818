"""The sliding window: rows at once = one token after the other, for every kind of condition; blocks; going on."""

import collections
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from tests.sampling.models import random_transformer
from vqgan_jax import parallel
from vqgan_jax.conditioning import (
    ClassLabelConfig,
    CoordinatesConfig,
    EncodedImageConfig,
    JointConfig,
    Objects,
    UnconditionalConfig,
    make_condition,
)
from vqgan_jax.config import GPT2, UserError
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.object_tokens import ObjectTokens
from vqgan_jax.sampling.blocks import Blocks
from vqgan_jax.sampling.large import LargeSampler, windows_at_once
from vqgan_jax.sampling.sampler import make_sampler
from vqgan_jax.sampling.sliding import Wavefront
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer, by_input_key
from vqgan_jax.train.roofline import program_cost
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig

OBJECTS = ObjectTokens(kind="boxes", max_objects=3, vocab=300, classes=5, crop=True, flags=(), trim=True)
PLACES = CoordinatesConfig(64, 4, "joint")


def transformer(condition, *stages, layers=2):
    """A transformer under any condition, with parameters large enough for logits that differ."""
    config = TransformerConfig(
        ArchitectureConfig(layers, 2, 16, 0, 0, 0.0, 0.0, 0.0, **GPT2), condition, (4, 4), "row_major", False, 0.0
    )
    model = ImageTransformer(config, Tokenizer(VQGAN(ref.FIRST_STAGE_TINY)), by_input_key(stages))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0)))
    noise = jax.random.key(1)
    params = jax.tree.map(lambda x: 5 * x + 0.1 * jax.random.normal(noise, x.shape), params)
    return model, model.split(params, parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))


def whole_condition(model, grid, b=2):
    """Tokens of b whole pictures of a grid."""
    if isinstance(model.condition, Objects):
        rng = np.random.default_rng(0)
        boxes = np.concatenate([rng.uniform(0, 0.6, (b, 3, 2)), rng.uniform(0.1, 0.4, (b, 3, 2))], -1)
        layout = {"boxes": boxes.astype(np.float32), "box_classes": rng.integers(0, 5, (b, 3), np.int32)}
        layout["box_flags"] = np.zeros((b, 3), np.int32)
        return jax.jit(lambda layout: model.condition.whole({}, layout))(layout)
    length = model.condition.length_on(grid)
    return jax.random.randint(jax.random.key(5), (b, length), 0, model.condition.vocab_size)


DEPTH, SEGMENTATION = (Tokenizer(VQGAN(config)) for config in (ref.DEPTH_STAGE_TINY, ref.VQSEG_TINY))
MODELS = {
    "class": functools.partial(transformer, ClassLabelConfig(10)),
    "depth": functools.partial(transformer, EncodedImageConfig("depth"), DEPTH),
    "joint": functools.partial(
        transformer, JointConfig((ClassLabelConfig(5), EncodedImageConfig("depth"), PLACES)), DEPTH
    ),
    "objects": functools.partial(transformer, OBJECTS),
    "none": functools.partial(transformer, UnconditionalConfig()),
    "coordinates": functools.partial(transformer, PLACES),
    "class + segmentation": functools.partial(
        transformer, JointConfig((ClassLabelConfig(5), EncodedImageConfig("segmentation"))), SEGMENTATION
    ),
    "boxes in the view": functools.partial(transformer, dataclasses.replace(OBJECTS, crop=False)),
    "centres": functools.partial(transformer, dataclasses.replace(OBJECTS, kind="centres")),
}
QUICK = ("class", "depth", "joint", "objects")


def slid(model, params, grid, serial, strategy=Strategy(), centre="upper", given=None):  # noqa: B008
    condition, keys = whole_condition(model, grid), row_keys(3, jnp.arange(2))
    sampler = LargeSampler(model, grid, centre=centre, serial=serial)
    return np.asarray(sampler.whole(params, condition, keys, strategy, given))


@pytest.mark.parametrize("kind", QUICK)
def test_rows_at_once_give_the_tokens_of_one_after_the_other(kind):
    model, params = MODELS[kind]()
    serial, fast = (slid(model, params, (7, 13), s) for s in (True, False))
    np.testing.assert_array_equal(fast, serial)
    assert len(np.unique(serial)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_so_do_eight_devices_for_every_condition(kind):
    """On a grid that neither the window nor the devices divide, windows where the reference has them; two pictures of
    four windows each are one for every device."""
    model, params = MODELS[kind](layers=1)
    grid, condition, keys = (5, 9), whole_condition(model, (5, 9)), row_keys(3, jnp.arange(2))
    centre = "lower" if isinstance(model.condition, Objects) else "upper"
    serial, fast = (slid(model, params, grid, s, centre=centre) for s in (True, False))
    np.testing.assert_array_equal(fast, serial)
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        sampler = LargeSampler(model, grid, parts=mesh.size, batch=2)
        sharded = sampler.whole(jax.device_put(params, jax.NamedSharding(mesh, jax.P())), condition, keys, Strategy())
    assert mesh.size == 8 and len(np.unique(serial)) > 10
    np.testing.assert_array_equal(sharded, serial)


def test_the_window_decides_what_a_condition_says():
    """Of a map and of places the piece that lies under it; of a class the same everywhere."""
    grid = (6, 9)
    config = JointConfig((ClassLabelConfig(5), EncodedImageConfig("depth"), PLACES))
    condition = make_condition(config, (4, 4), by_input_key([DEPTH]))
    rng = np.random.default_rng(0)
    label, depth, place = (rng.integers(low, high, (2, n)) for low, high, n in ((0, 5, 1), (5, 69, 54), (69, 133, 54)))
    whole = np.concatenate([label, depth, place], axis=1)
    assert whole.shape[1] == condition.length_on(grid)
    cut = jax.jit(lambda tokens, top, left: condition.window(tokens, grid, top, left, (4, 4)))
    for top, left in ((0, 0), (2, 5), (1, 3)):
        pieces = (x.reshape(2, *grid)[:, top : top + 4, left : left + 4].reshape(2, 16) for x in (depth, place))
        np.testing.assert_array_equal(cut(whole, top, left), np.concatenate([label, *pieces], axis=1))


def test_given_ids_stay_and_guidance_counts():
    model, stacked = random_transformer(grid=(4, 4))
    params = model.split(stacked, parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    grid = (5, 9)
    mask = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.3, (2, *grid)))
    ids = np.asarray(jax.random.randint(jax.random.key(1), (2, *grid), 0, 64))
    guided = Strategy(guidance=3.0, schedule="cosine")
    both = [slid(model, params, grid, serial, guided, given=(ids, mask)) for serial in (True, False)]
    np.testing.assert_array_equal(*both)
    np.testing.assert_array_equal(both[0][mask], ids[mask])
    plain = slid(model, params, grid, False, given=(ids, mask))
    assert (plain != both[0]).any()


def test_the_wavefront_runs_as_many_rows_as_windows_fit_side_by_side():
    assert Wavefront((64, 64), (16, 16)).slots == 4
    assert Wavefront((64, 256), (16, 16)).slots == 16
    assert Wavefront((64, 64), (16, 16), multiple=8).slots == 8
    assert Wavefront((64, 64), (16, 16), serial=True).slots == 1
    assert Wavefront((64, 64), (16, 16)).steps == 64 + 63 * 16
    segments = list(Wavefront((64, 64), (16, 16)).segments(100))
    assert [first for first, _, _ in segments] == [0, *(last for _, last, _ in segments[:-1])]
    assert {length for _, _, length in segments} == {144, 256}  # of 256, most steps look at 144 tokens


@pytest.mark.parametrize("centre", ["upper", "lower"])
@pytest.mark.parametrize("grid, window", [((509, 512), (16, 16)), ((1024, 1021), (8, 8)), ((37, 1024), (8, 12))])
def test_up_to_8192_pixels_every_token_follows_what_its_window_holds(grid, window, centre):
    wavefront = Wavefront(grid, window, centre, multiple=8)
    (height, width), (h, w) = grid, window
    i, j = np.indices(grid)
    step = i * wavefront.lag + j
    assert wavefront.slots >= -(-width // w) and wavefront.slots % 8 == 0 and step.max() == wavefront.steps - 1
    before = (h // 2, w // 2) if centre == "upper" else ((h - 1) // 2, (w - 1) // 2)
    top, left = np.clip(i - before[0], 0, height - h), np.clip(j - before[1], 0, width - w)
    # Of the rows above, the last that is drawn of what a window shows is the right end of the row before.
    assert (step[i[1:] - 1, left[1:] + w - 1] < step[1:]).all()
    inside = (i - top) * w + j - left
    assert inside.min() >= 0 and (inside < wavefront.needed[step]).all()
    segments = list(wavefront.segments(64))
    assert [first for first, _, _ in segments] == [0, *(last for _, last, _ in segments[:-1])]
    assert segments[-1][1] == wavefront.steps
    assert all((wavefront.needed[first:last] <= length).all() for first, last, length in segments)


@pytest.mark.parametrize(
    "grid, window, stride",
    [((512, 509), (16, 16), 8), ((509, 512), (16, 16), 16), ((1021, 211), (8, 8), 3), ((8, 1024), (8, 8), 5)],
)
def test_up_to_8192_pixels_blocks_fit_together(grid, window, stride):
    """Each token is drawn once, and all of its window before the block is there by then."""
    blocks, (h, w) = Blocks(grid, window, stride), window
    drawn = np.zeros(grid, bool)
    for windows, (row, column) in blocks.batches():
        for top, left in windows:
            shown = drawn[top : top + h, left : left + w]
            assert shown.shape == window and shown[:row].all() and shown[:, :column].all()
            assert not shown[row:, column:].any()
        for top, left in windows:
            drawn[top : top + h, left : left + w] = True
    assert drawn.all()


@pytest.mark.parametrize("grid, stride", [((128, 128), 2), ((125, 125), 2), ((64, 67), 3), ((99, 31), 4)])
def test_few_shapes_of_block_windows_run_and_few_windows_twice(grid, stride):
    """Also where the stride does not divide the size, and windows at the ends have blocks of their own."""
    model, _ = MODELS["coordinates"]()
    programs = LargeSampler(model, grid, stride=stride).programs()
    shapes = collections.Counter(block for _, block in programs)
    assert max(shapes.values()) <= 4
    needed = math.prod(-(-(size - side) // stride) + 1 for size, side in zip(grid, (4, 4), strict=True))
    assert needed <= sum(count * len(parts) for (count, _), parts in programs.items()) <= 1.3 * needed


def test_8192_pixels_are_one_array_of_codes():
    """Of a whole picture, both ways, by shape alone."""
    model, params = MODELS["coordinates"]()
    grid = (512, 509)
    condition = jax.ShapeDtypeStruct((1, model.condition.length_on(grid)), jnp.int32)
    for stride in (0, 3):
        sampler = LargeSampler(model, grid, stride=stride)
        part = jax.eval_shape(
            lambda params, x: next(sampler(params, x, row_keys(0, jnp.arange(1)), Strategy()))[0],  # noqa: B023
            params,
            condition,
        )
        assert part.shape == (1, *grid) and part.dtype == jnp.int32
        assert sampler.rows(sampler.total) == 512 and sampler.tokens == 512 * 509


@pytest.mark.parametrize("stride", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_picture_goes_on_and_devices_do_not_matter(stride):
    model, params = MODELS["depth"]()
    grid = (9, 11)
    condition, keys, strategy = whole_condition(model, grid), row_keys(3, jnp.arange(2)), Strategy()
    sampler = LargeSampler(model, grid, stride=stride)
    parts = [(np.asarray(ids), position) for ids, position in sampler(params, condition, keys, strategy)]
    whole, last = parts[-1]
    assert last == sampler.total and len(parts) > 1
    ids, position = parts[(len(parts) - 1) // 2]
    starts = sorted(start for positions in sampler.programs().values() for start in positions)
    assert starts == [0, *(position for _, position in parts[:-1])]
    drawn = sampler.drawn(position)
    assert drawn[: sampler.rows(position)].all() and drawn.any() and not drawn.all()
    assert (sampler.rows(0), sampler.rows(last)) == (0, 9)
    np.testing.assert_array_equal(ids[:, drawn], whole[:, drawn])
    assert (ids[:, ~drawn] == 0).all() and sampler.drawn(last).all() and not sampler.drawn(0).any()
    *_, (again, _) = sampler(params, condition, keys, strategy, begun=(jnp.asarray(ids), position))
    np.testing.assert_array_equal(again, whole)
    if stride:  # a few windows at a time
        *_, (few, _) = sampler(params, condition, keys, strategy, most=2)
        np.testing.assert_array_equal(few, whole)
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    with jax.set_mesh(mesh):
        *_, (sharded, _) = LargeSampler(model, grid, stride=stride, parts=mesh.size, batch=2)(
            jax.device_put(params, jax.NamedSharding(mesh, jax.P())), condition, keys, strategy
        )
    np.testing.assert_array_equal(sharded, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [0, 2])
def test_windows_are_spread_over_the_devices(stride):
    """By what each of eight is handed to compute, and of block windows by the memory that they were said to take."""
    model, params = MODELS["depth"](layers=4)
    grid, keys = (6, 34), row_keys(0, jnp.arange(2))
    condition, ids = whole_condition(model, grid), jnp.zeros((2, *grid), jnp.int32)
    sampler = LargeSampler(model, grid, stride=stride, parts=8, batch=2)
    part = (jnp.zeros(8, jnp.int32), jnp.arange(8), (2, 2)) if stride else (0, 8, 16)
    program, costs = sampler._fill if stride else sampler._advance, []
    for devices in (8, 1):
        mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            everywhere = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
            compiled = program.lower(everywhere, condition, keys, Strategy(), None, ids, *part).compile()
        costs.append(program_cost(compiled))
    eighth, whole = costs
    assert eighth.flops < 0.2 * whole.flops
    if stride:
        taken = whole.arguments + whole.temporaries
        assert windows_at_once(model, 2, taken) in range(4, 9) and windows_at_once(model, 2, 1) == 1


@pytest.mark.parametrize("how", [dict(), dict(serial=True), dict(stride=2)])
def test_a_window_over_the_whole_grid_is_the_plain_sampler(how):
    model, params = MODELS["depth"]()
    condition, keys = whole_condition(model, (4, 4)), row_keys(3, jnp.arange(2))
    plain = make_sampler(model, (4, 4))(params, condition, keys, Strategy(), None)
    slid = LargeSampler(model, (4, 4), **how).whole(params, condition, keys, Strategy())
    np.testing.assert_array_equal(slid, plain)


@pytest.mark.parametrize("stride", [2, 4])
def test_blocks_see_what_stands_above_and_to_the_left(stride):
    """Greedily, by the definition: the logits of a block's token come from all of its window before it."""
    model, params = MODELS["class"]()
    grid = (7, 6) if stride == 2 else (8, 12)
    condition, keys, greedy = whole_condition(model, grid), row_keys(3, jnp.arange(2)), Strategy(greedy=True)
    made = LargeSampler(model, grid, stride=stride).whole(params, condition, keys, greedy)
    ids = np.zeros((2, *grid), np.int32)
    known = np.zeros(grid, bool)
    logits = jax.jit(model.window_logits)
    for windows, _ in Blocks(grid, (4, 4), stride).batches():
        for top, left in windows:
            for i in range(4):
                for j in range(4):
                    if not known[top + i, left + j]:
                        patch = ids[:, top : top + 4, left : left + 4].reshape(2, 16)
                        best = logits(params, condition, patch, np.full(2, 4 * i + j)).argmax(-1)
                        ids[:, top + i, left + j] = best
                        known[top + i, left + j] = True
    assert known.all()
    np.testing.assert_array_equal(made, ids)


def test_given_ids_stay_in_blocks():
    model, params = MODELS["class"]()
    grid = (6, 9)
    mask = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.3, (2, *grid)))
    ids = np.asarray(jax.random.randint(jax.random.key(1), (2, *grid), 0, 64))
    condition, keys = whole_condition(model, grid), row_keys(3, jnp.arange(2))
    made = LargeSampler(model, grid, stride=3).whole(params, condition, keys, Strategy(), (ids, mask))
    np.testing.assert_array_equal(np.asarray(made)[mask], ids[mask])


def test_what_does_not_fit_is_refused():
    model, _ = MODELS["class"]()
    with pytest.raises(UserError, match="smaller than the window"):
        LargeSampler(model, (3, 8))
    with pytest.raises(UserError, match="--stride"):
        LargeSampler(model, (8, 8), stride=5)
    spiral = ImageTransformer(dataclasses.replace(model.config, order="spiral_out"), model.first_stage)
    with pytest.raises(UserError, match="row-major"):
        LargeSampler(spiral, (8, 8))
