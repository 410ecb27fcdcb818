"""Layout tokens: equal to the released code's, and inverted to half a lattice step."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqgan_jax.config import UserError
from vqgan_jax.object_tokens import FLAGS, ObjectTokens

CASES = json.loads((Path(__file__).parent / "golden" / "object_tokens.json").read_text())
LAYOUT = ObjectTokens(kind="boxes", max_objects=5, vocab=8192, classes=80, crop=True, flags=FLAGS, trim=True)


def reference_layout(case, kind):
    builder = case["builder"]
    flags = FLAGS[:1] * builder["use_group_parameter"] + FLAGS[1:] * builder["use_additional_parameters"]
    return ObjectTokens(
        kind=kind,
        max_objects=builder["no_max_objects"],
        vocab=builder["no_tokens"],
        classes=builder["no_object_classes"],
        crop=builder["encode_crop"],
        flags=flags,
        trim=False,
    )


def arrays(case):
    objects = case["annotations"]
    return dict(
        boxes=np.float32([o["bbox"] for o in objects]),
        box_classes=np.int32([o["category_no"] for o in objects]),
        box_flags=np.int32(
            [sum(o[f"is_{f}".replace("group", "group_of")] << k for k, f in enumerate(FLAGS)) for o in objects]
        ),
        crop_box=None if case["crop"] is None else np.float32(case["crop"]),
        flip=case["horizontal_flip"],
    )


def scene(seed, batch=(), n=4, classes=80):
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.05, 0.6, (*batch, n, 2))
    boxes = np.concatenate([rng.random((*batch, n, 2)) * (1 - size), size], -1).astype(np.float32)
    return boxes, rng.integers(-1, classes, (*batch, n), np.int32), rng.integers(16, size=(*batch, n), dtype=np.int32)


@pytest.mark.parametrize("kind, key", [("boxes", "tokens_bbox"), ("centres", "tokens_center")])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_equals_reference(case, kind, key):
    layout = reference_layout(case, kind)
    tokens = layout.tokens(**arrays(case))
    assert tokens.dtype == np.int32 and tokens.shape == (layout.length,)
    np.testing.assert_array_equal(tokens, case[key])
    jitted = jax.jit(lambda a: layout.tokens(**a))(jax.tree.map(jnp.asarray, arrays(case)))
    np.testing.assert_array_equal(jitted, case[key])


def test_released_length():
    assert dataclasses.replace(LAYOUT, max_objects=30, flags=("group",)).length == 92


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["boxes", "centres"])
@pytest.mark.parametrize("seed", range(5))
def test_inverts_to_half_a_step(kind, flip, seed):
    layout = dataclasses.replace(LAYOUT, kind=kind)
    boxes, classes, flags = scene(seed)
    crop = np.float32([0, 0, 0.97, 0.95])
    found = layout.invert(layout.tokens(boxes, classes, flags, crop, flip=flip))

    def as_seen(boxes):
        x, y, w, h = np.moveaxis(boxes, -1, 0)
        return np.stack([1 - x - w if flip else x, y, w, h], -1)

    real = classes >= 0
    count = real.sum()
    np.testing.assert_array_equal(found["box_classes"], [*classes[real], *[-1] * (5 - count)])
    np.testing.assert_array_equal(found["box_flags"], [*flags[real], *[0] * (5 - count)])
    assert not found["boxes"][count:].any()
    step = 0.5 / 89 + 1e-6
    want, got = as_seen(boxes[real]), found["boxes"][:count]
    if kind == "boxes":
        assert np.abs(want[:, :2] - got[:, :2]).max() <= step
        assert np.abs(want[:, :2] + want[:, 2:] - got[:, :2] - got[:, 2:]).max() <= step
    else:
        assert np.abs(want[:, :2] + want[:, 2:] / 2 - got[:, :2]).max() <= step
        assert not got[:, 2:].any()
    seen, read = as_seen(crop), found["crop_box"]
    assert np.abs(seen[:2] - read[:2]).max() <= step and np.abs(seen[:2] + seen[2:] - read[:2] - read[2:]).max() <= step


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("kind", ["boxes", "centres"])
def test_tokens_of_inverted_tokens_are_the_same(kind, crop):
    layout = dataclasses.replace(LAYOUT, kind=kind, crop=crop)
    tokens = layout.tokens(*scene(0, (7,)))
    np.testing.assert_array_equal(layout.tokens(**layout.invert(tokens)), tokens)


def test_a_batch_equals_its_rows_in_numpy_and_under_jit():
    boxes, classes, flags = scene(0, (6,), n=9)
    crop = np.float32([[0.1 * k, 0.05 * k, 0.5, 0.5] for k in range(6)])
    flip = np.array([True, False] * 3)
    for layout in (LAYOUT, dataclasses.replace(LAYOUT, crop=False, kind="centres")):
        rows = [
            layout.tokens(b, c, f, k, flip=m) for b, c, f, k, m in zip(boxes, classes, flags, crop, flip, strict=True)
        ]
        tokens = layout.tokens(boxes, classes, flags, crop, flip=flip)
        np.testing.assert_array_equal(tokens, rows)
        np.testing.assert_array_equal(jax.jit(layout.tokens)(boxes, classes, flags, crop, flip), tokens)
        jitted = jax.jit(layout.invert)(tokens)
        for key, value in layout.invert(tokens).items():
            assert jitted[key].dtype == value.dtype
            np.testing.assert_allclose(jitted[key], value, atol=1e-6)


def test_objects_outside_the_crop_leave_no_token_and_no_gap():
    layout = dataclasses.replace(LAYOUT, max_objects=2)
    boxes = np.float32(
        [[0, 0, 0.2, 0.2], [0.6, 0.6, 0.2, 0.2], [0.3, 0, 0.2, 0.9], [0.7, 0.5, 0.3, 0.3], [0.5, 0.6, 0.4, 0.4]]
    )
    crop = np.float32([0.5, 0.5, 0.5, 0.5])
    tokens = layout.tokens(boxes, np.arange(5, dtype=np.int32), np.zeros(5, np.int32), crop)
    np.testing.assert_array_equal(layout.invert(tokens)["box_classes"], [1, 3])


def test_trim_ends_a_cut_box_at_the_crop():
    box, crop = np.float32([[0.25, 0.25, 0.5, 0.5]]), np.float32([0.5, 0.5, 0.5, 0.5])
    one = (box, np.int32([0]), np.int32([0]), crop)
    step = 0.5 / 89 + 1e-6
    for trim, size in ((True, 0.5), (False, 1.0)):
        found = dataclasses.replace(LAYOUT, crop=False, trim=trim).invert(
            dataclasses.replace(LAYOUT, crop=False, trim=trim).tokens(*one)
        )
        np.testing.assert_allclose(found["boxes"][0], [0, 0, size, size], atol=2 * step)
        np.testing.assert_array_equal(found["crop_box"], [0, 0, 1, 1])


def test_only_the_chosen_flags_are_told():
    layout = dataclasses.replace(LAYOUT, flags=("group", "depiction"))
    boxes = np.tile(np.float32([0, 0, 1, 1]), (4, 1))
    tokens = layout.tokens(boxes, np.int32([3, 3, 3, 3]), np.int32([15, 2, 8, 4]))
    np.testing.assert_array_equal(layout.invert(tokens)["box_flags"][:4], [5, 0, 0, 4])


def test_no_objects_is_all_none_and_the_whole_picture():
    tokens = LAYOUT.tokens(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    np.testing.assert_array_equal(tokens, [8191] * 15 + [0, 8099])


def test_any_sampled_tokens_read_as_a_valid_layout():
    tokens = np.random.default_rng(0).integers(8192, size=(500, LAYOUT.length), dtype=np.int32)
    found = LAYOUT.invert(tokens)
    for boxes in (found["boxes"], found["crop_box"]):
        assert boxes.min() >= 0 and (boxes[..., :2] + boxes[..., 2:]).max() <= 1 + 1e-6
    assert found["box_classes"].min() == -1 and found["box_classes"].max() == 79
    assert found["box_flags"].min() == 0 and found["box_flags"].max() == 15
    np.testing.assert_array_equal(found["box_classes"] < 0, tokens[:, :15:3] >= 80 * 16)


def test_points_outside_the_picture_stay_on_the_lattice():
    boxes = np.float32([[-0.5, 0.5, 2, 2]])
    tokens = LAYOUT.tokens(boxes, np.int32([0]), np.int32([0]))
    np.testing.assert_array_equal(LAYOUT.invert(tokens)["boxes"][0, [0, 2]], [0, 1])
    assert tokens[2] == 90 * 90 - 1


def test_a_class_beyond_the_classes_is_refused():
    with pytest.raises(UserError, match="class 80 in the data, but classes is 80"):
        LAYOUT.tokens(np.ones((1, 4), np.float32), np.int32([80]), np.int32([0]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="box"), "did you mean 'boxes'"),
        (dict(flags=("grouped",)), "did you mean 'group'"),
        (dict(vocab=1280), "set vocab to 1281"),
        (dict(max_objects=0), "at least 1"),
    ],
)
def test_bad_settings_name_the_mend(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYOUT, **change)
    assert dataclasses.replace(LAYOUT, vocab=1281).none == 1280
