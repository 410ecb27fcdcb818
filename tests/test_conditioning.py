"""Coordinates and objects as conditions: the reference's tokens, inverses, and configs that name what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax.conditioning import Coordinates, CoordinatesConfig, Objects, condition_config, make_condition
from vqgan_jax.config import UserError
from vqgan_jax.coordinates import pixel_coordinates
from vqgan_jax.object_tokens import ObjectTokens


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
    scalar = condition.invert({}, tokens)
    assert np.abs(scalar - golden["coord"]).max() < factor / coords.shape[1] + 1 / vocab


def test_the_joint_scheme_tells_positions_apart_and_inverts():
    condition = make_condition(CoordinatesConfig(64, 4, "joint"), (8, 8), None)
    coords = jnp.asarray(pixel_coordinates(32, 32)[None])
    tokens = condition.tokens({}, {"coords": coords})
    assert tokens.shape == (1, condition.length) and len(np.unique(tokens)) == 64 == condition.vocab_size
    assert np.abs(condition.invert({}, tokens) - coords).max() <= 0.5 / 8 + 1e-6
    assert condition.spatial and condition.keys == ("coords",)


def test_tokens_never_leave_the_table():
    condition = Coordinates(CoordinatesConfig(4, 1, "raster"), (4, 4))
    tokens = condition.tokens({}, {"coords": jnp.asarray(pixel_coordinates(4, 4)[None])})
    assert tokens.max() == 3


def test_objects_are_their_layouts_tokens():
    layout = ObjectTokens("boxes", 3, 100, 5, True, ("group",), False)
    condition = make_condition(layout, (4, 4), None)
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
