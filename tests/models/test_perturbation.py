"""Latent perturbation: how many codes, which ones, and nothing at all where it is off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax.models.autoencoder import AutoencoderConfig
from vqgan_jax.models.perturbation import Perturbation, perturbed
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig

ALL = Perturbation(share=1.0, pictures=1.0, nearest=5, anneal_start=10, anneal_end=20, final_share=0.2)


@pytest.fixture(scope="module")
def book():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 3)).astype(np.float32), rng.integers(0, 64, (200, 4, 4)).astype(np.int32)


def test_codes_are_replaced_by_one_of_their_nearest_others(book):
    codebook, ids = book
    new = np.asarray(perturbed(jax.random.key(0), ids, codebook, ALL, 0))
    distance = ((codebook[:, None] - codebook[None]) ** 2).sum(-1)
    order = np.argsort(distance, axis=1)[:, 1:6]  # without itself
    rank = np.argmax(order[ids] == new[..., None], axis=-1)
    assert np.array_equal(np.take_along_axis(order[ids], rank[..., None], -1)[..., 0], new)
    np.testing.assert_allclose(np.bincount(rank.ravel()) / rank.size, 1 / 5, atol=0.03)
    late = np.asarray(perturbed(jax.random.key(0), ids, codebook, ALL, 20))
    assert set(np.unique(late == order[ids][..., 0])) == {False, True}  # a fifth of the codes, and by the first rank
    assert np.array_equal(late != ids, late == order[ids][..., 0])


def test_as_many_as_asked_for(book):
    codebook, ids = book
    some = dataclasses.replace(ALL, share=0.5, pictures=0.3)
    moved = np.asarray(perturbed(jax.random.key(1), ids, codebook, some, 0)) != ids
    touched = moved.any(axis=(1, 2))
    assert abs(touched.mean() - 0.3) < 0.1 and abs(moved[touched].mean() - 0.5) < 0.05
    np.testing.assert_allclose([ALL.level(step) for step in (0, 10, 15, 20, 99)], [1, 1, 0.6, 0.2, 0.2], atol=1e-6)
    few = dataclasses.replace(ALL, nearest=1000)  # more than there are
    assert np.all(np.asarray(perturbed(jax.random.key(1), ids, codebook, few, 0)) != ids)


@pytest.mark.parametrize("change", [dict(nearest=0), dict(share=1.1), dict(pictures=-0.1), dict(anneal_end=9)])
def test_impossible_settings_raise(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(ALL, **change)


def test_the_decoder_sees_them_and_the_gradient_goes_straight_through():
    """Off is the same program as without; on, the ids stay, the decoder decodes others, the encoder learns."""
    tiny = AutoencoderConfig(3, 3, 16, 32, (1,), 1, 0, (), False, 8, 0.0, 4)
    model = VQGAN(VQGANConfig(tiny, dataclasses.replace(ref.VQGAN_TINY.quantizer, dim=8), None, "image"))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    keys = {"quantizer": jax.random.key(1)}
    variables = jax.jit(model.init)({"params": jax.random.key(0)} | keys, images)

    def run(perturbation, params):
        options = dict(train=True, perturbation=perturbation, rngs=keys)
        output = model.apply({"params": params}, images, **options)
        return jnp.sum(output.reconstruction**2), output

    none, off, on = (functools.partial(run, p) for p in (None, dataclasses.replace(ALL, share=0.0), ALL))
    programs = [str(jax.make_jaxpr(f)(variables["params"])) for f in (none, off, on)]
    assert programs[0] == programs[1] != programs[2]
    grads, output = jax.jit(jax.grad(on, has_aux=True))(variables["params"])
    _, plain = jax.jit(none)(variables["params"])
    np.testing.assert_array_equal(output.ids, plain.ids)
    assert np.abs(output.reconstruction - plain.reconstruction).max() > 0
    assert np.abs(grads["encoder"]["conv_in"]["kernel"]).max() > 0
    assert not np.any(grads["quantizer"]["codebook"])  # as without: only its own loss moves a code
