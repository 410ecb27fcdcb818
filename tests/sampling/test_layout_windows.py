"""What a window of a larger picture is told of a layout: recomputed from the definition, in exact fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax.conditioning import Objects
from vqgan_jax.config import GPT2
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.object_tokens import ObjectTokens
from vqgan_jax.sampling.large import LargeSampler
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.trained_transformer import TrainedTransformer
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig

GRID, WINDOW, SECTIONS = (9, 7), (3, 5), 41  # boxes on a lattice of twentieths: no coordinate is ever a tie
PICTURES, OBJECTS, CLASSES = 3, 5, 4


def layouts():
    """x, y, width and height in twentieths int [b, n, 4], classes and flags [b, n]; the last picture has one object."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 18, (PICTURES, OBJECTS, 2))
    size = 1 + rng.integers(0, 20 - start)
    classes = rng.integers(0, CLASSES, (PICTURES, OBJECTS))
    classes[-1, 1:] = -1
    return np.concatenate([start, size], -1), classes, rng.integers(0, 16, (PICTURES, OBJECTS))


def expected(config, boxes, classes, flags, top, left):
    """One picture's tokens."""

    def token(x, y):
        return round(min(max(y, 0), 1) * (SECTIONS - 1)) * SECTIONS + round(min(max(x, 0), 1) * (SECTIONS - 1))

    shown = (Fraction(left, GRID[1]), Fraction(top, GRID[0]))
    seen = (Fraction(WINDOW[1], GRID[1]), Fraction(WINDOW[0], GRID[0]))
    found = []
    for box, name, flag in zip(boxes.tolist(), classes.tolist(), flags.tolist(), strict=True):
        if name < 0:
            continue
        ends = [(Fraction(box[k], 20), Fraction(box[k] + box[k + 2], 20)) for k in range(2)]
        if any(end <= at or start >= at + size for (start, end), at, size in zip(ends, shown, seen, strict=True)):
            continue
        if not config.crop:
            ends = [
                tuple(min(max((n - at) / size, 0), 1) for n in pair)
                for pair, at, size in zip(ends, shown, seen, strict=True)
            ]
        found.append(name + CLASSES * (flag & 1))
        (x0, x1), (y0, y1) = ends
        found += [token(x0, y0), token(x1, y1)] if config.kind == "boxes" else [token((x0 + x1) / 2, (y0 + y1) / 2)]
    found += [config.none] * (OBJECTS * config.slot - len(found))
    if config.crop:
        found += [token(*shown), token(*(at + size for at, size in zip(shown, seen, strict=True)))]
    return found


@pytest.mark.parametrize("kind", ["boxes", "centres"])
@pytest.mark.parametrize("crop", [True, False])
def test_a_window_holds_the_objects_that_reach_into_it(kind, crop):
    """Those too whose centre lies beyond it."""
    config = ObjectTokens(kind, OBJECTS, SECTIONS**2 + 2, CLASSES, crop, ("group",), True)
    boxes, classes, flags = layouts()
    batch = {"boxes": (boxes / 20).astype(np.float32), "box_classes": classes, "box_flags": flags}
    condition = Objects(config)
    whole = jax.jit(lambda batch: condition.whole({}, batch))(batch)
    assert whole.shape == (PICTURES, condition.length_on(GRID)) and whole.max() < 2**30
    cut = jax.jit(lambda tokens, top, left: condition.window(tokens, GRID, top, left, WINDOW))
    shown = set()
    for top in range(GRID[0] - WINDOW[0] + 1):
        for left in range(GRID[1] - WINDOW[1] + 1):
            right = [expected(config, *picture, top, left) for picture in zip(boxes, classes, flags, strict=True)]
            np.testing.assert_array_equal(cut(whole, top, left), right)
            shown.add(right[0].count(config.none))
    assert len(shown) > 1  # windows differ in how many objects they hold


def test_a_window_of_a_crop_lies_in_the_crop():
    """Of boxes that are relative to a whole of which the picture shows a part."""
    config = ObjectTokens("boxes", OBJECTS, SECTIONS**2, CLASSES, True, (), True)
    boxes = jnp.array([[[0.25, 0.25, 0.25, 0.5]]])
    batch = {"boxes": boxes, "box_classes": jnp.array([[1]]), "box_flags": jnp.array([[0]])}
    condition = Objects(config)
    whole = jax.jit(lambda batch: condition.whole({}, batch))(batch | {"crop_box": jnp.array([[0.25, 0.0, 0.5, 1.0]])})
    cut = jax.jit(lambda whole, left: condition.invert({}, condition.window(whole, (4, 4), 2, left, (2, 2))))
    said, right = cut(whole, 0), cut(whole, 2)
    np.testing.assert_allclose(said["crop_box"], [[0.25, 0.5, 0.25, 0.5]], atol=1e-6)
    assert said["box_classes"].tolist() == [[1, -1, -1, -1, -1]]
    assert right["box_classes"].tolist() == [[-1] * 5]


def test_larger_pictures_are_drawn_from_layouts_with_sizes(monkeypatch):
    """Else an object would leave a window with its centre."""
    config = ObjectTokens("centres", 2, 300, CLASSES, True, (), True)
    architecture = ArchitectureConfig(1, 2, 16, 0, 0, 0.0, 0.0, 0.0, **GPT2)
    model = ImageTransformer(
        TransformerConfig(architecture, config, (4, 4), "row_major", False, 0.0), Tokenizer(VQGAN(ref.FIRST_STAGE_TINY))
    )
    given = []

    class Spy(LargeSampler):
        def __call__(self, params, condition, *rest, **settings):
            given.append(condition)
            yield jnp.zeros((1, *self.grid), jnp.int32), self.total

    trained, sampler = TrainedTransformer(model, {}, {}, None, {}), Spy(model, (4, 8))
    for name, value in (("_placed", ({}, {})), ("_large_sampler", sampler)):
        monkeypatch.setitem(vars(trained), name, lambda *asked, value=value, **how: value)
    pictures = np.zeros((1, 8, 16, 3), np.float32)
    monkeypatch.setattr(TrainedTransformer, "_large_decoder", lambda *asked: lambda ids: pictures)
    layout = {
        "boxes": np.array([[[0.3, 0.2, 0.3, 0.5]]], np.float32),
        "box_classes": np.array([[2]]),
        "box_flags": np.array([[0]]),
    }
    settings = dict(seed=0, batch=1, strategy=Strategy(), indices=np.arange(1))
    assert len(list(trained.samples(lambda chosen: layout, (4, 8), **settings))) == 1
    cut = jax.jit(lambda tokens, left: model.condition.window(tokens, (4, 8), 0, left, (4, 4)))
    assert [int(cut(given[0], left)[0, 0]) for left in (0, 4)] == [2, 2]  # the centre lies in the left half
    points = config.tokens(*layout.values())
    assert [int(cut(points, left)[0, 0]) for left in (0, 4)] == [2, config.none]
