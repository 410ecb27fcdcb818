"""Larger pictures of a trained model: their conditions and given parts are encoded within the memory, and kept."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax import parallel, pretrained
from vqgan_jax.sampling.large import LargeOptions
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.trained_transformer import TrainedTransformer

GRID = (18, 24)


def test_tiles_are_of_the_trained_size_however_it_is_shaped():
    """A window of 4 x 8 codes: tiles of 4 x 8, on every device one, for pictures and what is encoded alike."""
    seen = []

    def local(variables, x, enlarge):
        seen.append(x.shape)
        return x.repeat(2, 1).repeat(2, 2)[..., None] * variables if enlarge else x[:, ::2, ::2, 0].astype("int32")

    first = SimpleNamespace(
        config=SimpleNamespace(input_key="image"),
        codebook_size=64,
        factor=2,
        decode=lambda variables, ids: local(variables, ids, True),
        encode=lambda variables, x: local(variables, x, False),
    )
    model = SimpleNamespace(config=SimpleNamespace(grid=(4, 8)), first_stage=first)
    trained = TrainedTransformer(model, None, {"first_stage": np.float32(1)}, None, {})
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    ids = np.random.default_rng(0).integers(64, size=(1, 10, 21), dtype=np.int32)
    picture = ids.repeat(2, 1).repeat(2, 2)[..., None].astype(np.float32)
    for method, x, made in (("decode", ids, picture), ("encode", picture, ids)):
        asked = (method, first, "first_stage", x.shape, x.dtype, mesh, LargeOptions(tiles=True))
        np.testing.assert_allclose(trained._convert_large(*asked)(x), made, atol=1e-4)
    assert seen == [(8, 4, 8), (8, 8, 16, 1)]


@pytest.mark.slow
def test_conditions_and_given_parts_are_encoded_within_the_memory():
    trained = pretrained.open_transformer(ref.GOLDEN / "depth_transformer_tiny.ckpt", key="path")
    factor = trained.model.first_stage.factor
    size = tuple(factor * n for n in GRID)
    rng = np.random.default_rng(0)
    depth = rng.uniform(-1, 1, (1, *size, 1)).astype(np.float32)
    image = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    given = np.zeros((1, *GRID), bool)
    given[:, :9] = True
    one = parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])

    def made(memory, **rows):
        lines = []
        large = LargeOptions(stride=8, memory=memory, announce=lines.append)
        asked = dict(seed=0, batch=1, strategy=Strategy(), indices=np.arange(1), mesh=one, large=large)
        (pictures,) = trained.samples(lambda chosen: rows, GRID, **asked)
        assert pictures.shape == (1, *size, 3)
        return pictures.astype(int), sorted(line.partition(" (")[0] for line in lines)

    whole, said = made(0, depth=depth)
    assert said == ["decoding whole", "encoding depth whole"]
    strips, said = made(1 << 20, depth=depth)
    assert said == ["decoding strips", "encoding depth strips"]
    assert np.abs(strips - whole).max() <= 1
    assert np.abs(made(0, depth=-depth)[0] - whole).max() > 9  # the condition counts

    completed, said = made(1 << 20, depth=depth, image=image, given=given)
    assert said == ["decoding strips", "encoding depth strips", "encoding image strips"]
    first = trained.model.first_stage
    codes = first.encode(trained.frozen["first_stage"], image)
    kept = np.asarray(first.decode(trained.frozen["first_stage"], codes))
    upper = slice(None), slice(0, 6 * factor)
    away = [np.abs((x[upper] / 127.5 - 1) - np.clip(kept, -1, 1)[upper]).mean() for x in (completed, whole)]
    assert away[0] < 0.5 * away[1]
