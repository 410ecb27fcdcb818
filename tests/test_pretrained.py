"""The front door: the reference's own numbers through it, from every kind of place, and mistakes in one line."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import common
from tests import reference as ref
from vqgan_jax import pretrained
from vqgan_jax.conditioning import CoordinatesConfig, UnconditionalConfig
from vqgan_jax.config import GPT2, UserError
from vqgan_jax.coordinates import pixel_coordinates
from vqgan_jax.front_door import PretrainedTransformer
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.object_tokens import ObjectTokens
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.tools import convert
from vqgan_jax.transformer import ArchitectureConfig, ImageTransformer, TransformerConfig


def close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs, np.float32)
    assert np.shape(ours) == theirs.shape
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance * ref.scale(theirs))


@pytest.fixture(scope="module")
def labelled():
    return pretrained.load_transformer(ref.GOLDEN / "class_transformer_tiny.ckpt")


@pytest.fixture(scope="module")
def vqgan():
    return pretrained.load_vqgan(ref.GOLDEN / "vqgan_tiny.ckpt")


@pytest.mark.parametrize("case", ["square", "rect"])
def test_vqgan(vqgan, case):
    golden = ref.golden("vqgan_tiny.npz")
    images = golden[f"{case}/image"]
    ids = vqgan.encode(images)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, golden[f"{case}/indices"])
    close(vqgan.pre_quant(images), golden[f"{case}/pre_quant"])
    close(vqgan.decode(ids), golden[f"{case}/reconstruction"])
    close(vqgan.reconstruct(images), golden[f"{case}/reconstruction"])
    close(vqgan.codebook[ids], golden[f"{case}/quantized"])
    assert (vqgan.factor, vqgan.codebook.shape) == (2, (64, 16)) and vqgan.config.input_key == "image"


@pytest.mark.parametrize("file", ["vqseg_tiny", "vqseg_tiny_legacy_format"])
def test_segmentation_goes_in_as_labels_or_one_hot(file):
    golden, model = ref.golden("vqseg_tiny.npz"), pretrained.load_vqgan(ref.GOLDEN / f"{file}.ckpt")
    for images in (golden["seg/image"], golden["seg/labels"]):
        np.testing.assert_array_equal(model.encode(images), golden["seg/indices"])
    close(model.reconstruct(golden["seg/labels"]), golden["seg/reconstruction"])
    with pytest.raises(UserError, match="0 to 6"):
        model.encode(np.full((1, 8, 8), 7))


def test_gumbel():
    golden, model = ref.golden("gumbel_tiny.npz"), pretrained.load_vqgan(ref.GOLDEN / "gumbel_tiny.ckpt")
    np.testing.assert_array_equal(model.encode(golden["image"]), golden["indices_argmax"])
    close(model.pre_quant(golden["image"]), golden["pre_quant"])
    close(model.reconstruct(golden["image"]), golden["reconstruction_argmax"])


def test_class_transformer(labelled):
    golden = ref.golden("class_transformer_tiny.npz")
    ids = labelled.first_stage.encode(golden["image"])
    np.testing.assert_array_equal(ids.reshape(3, -1), golden["tokens"])
    tokens = labelled.condition_tokens(golden["class_label"])
    np.testing.assert_array_equal(tokens, golden["cond_tokens"])
    for codes in (golden["tokens"], golden["tokens"].reshape(3, 8, 8)):
        close(labelled.logits(codes, tokens), golden["logits"])
    np.testing.assert_allclose(labelled.nll(ids, tokens), golden["loss"], rtol=1e-4)
    sampled = labelled.sample(tokens, grid=(8, 8), greedy=True)
    np.testing.assert_array_equal(sampled.reshape(3, -1), golden["greedy_tokens"])
    close(labelled.decode(sampled), golden["greedy_image"])
    assert not labelled.cond_stages


@pytest.fixture(scope="module")
def deep():
    return pretrained.load_transformer(ref.GOLDEN / "depth_transformer_tiny.ckpt")


def test_depth_transformer(deep):
    golden, model = ref.golden("depth_transformer_tiny.npz"), deep
    assert model.config.grid == (16, 16) and list(model.cond_stages) == ["depth"]
    np.testing.assert_array_equal(model.first_stage.encode(golden["image"]).reshape(1, -1), golden["tokens"])
    tokens = model.condition_tokens(golden["depth"])
    np.testing.assert_array_equal(tokens, golden["cond_tokens"])
    close(model.logits(golden["tokens"], tokens), golden["logits"], 2e-3)  # stored as float16
    np.testing.assert_allclose(model.nll(golden["tokens"], tokens), golden["loss"], rtol=1e-4)
    with pytest.raises(UserError, match="256 tokens a row, 594 belong"):
        model.sample(tokens, grid=(22, 27))


@pytest.mark.slow
def test_the_sliding_window_of_a_depth_transformer(deep):
    golden, model = ref.golden("depth_transformer_tiny.npz"), deep
    whole = model.condition_tokens(golden["slide/depth"])
    np.testing.assert_array_equal(whole.reshape(1, 22, 27), golden["slide/cond_tokens"])
    ids = model.sample(whole, grid=(22, 27), greedy=True)
    np.testing.assert_array_equal(ids, golden["slide/greedy_tokens"])
    close(model.decode(ids), golden["slide/image"], 1e-3)


@pytest.mark.parametrize("name", ["class_transformer_tiny", "vqgan_tiny"])
def test_an_imported_directory_is_the_same_model(name, tmp_path, labelled, vqgan):
    convert.main([f"--checkpoint={ref.GOLDEN}/{name}.ckpt", f"--out={tmp_path}"])
    golden = ref.golden(f"{name}.npz")
    if name == "vqgan_tiny":
        images = golden["square/image"]
        np.testing.assert_array_equal(pretrained.load_vqgan(tmp_path).encode(images), vqgan.encode(images))
        return
    model = pretrained.load_transformer(tmp_path)
    tokens = model.condition_tokens([1, 2, 3])
    np.testing.assert_array_equal(model.logits(golden["tokens"], tokens), labelled.logits(golden["tokens"], tokens))
    np.testing.assert_array_equal(
        model.first_stage.encode(golden["image"]), labelled.first_stage.encode(golden["image"])
    )


def test_several_encoded_conditions_have_a_vqgan_each(tmp_path):
    for name in ("depth_transformer_tiny", "vqseg_tiny"):
        convert.main([f"--checkpoint={ref.GOLDEN}/{name}.ckpt", f"--out={tmp_path / name}"])
    depth, segmentation = str(tmp_path / "depth_transformer_tiny/cond_stage"), str(tmp_path / "vqseg_tiny")
    config = common.transformer()
    parts = {key: dict(name="image", input_key=key) for key in ("segmentation", "depth")}
    config.model.condition = ConfigDict(dict(name="joint", **parts))
    config.vqgan = str(tmp_path / "depth_transformer_tiny/first_stage")
    for wrong, message in (
        (depth, "a 'segmentation' condition needs the workdir"),
        (f"{depth},{depth},{segmentation}", "the second VQGAN of 'depth'"),
        (
            f"{depth},{segmentation},{config.vqgan}",
            "that VQGAN encodes 'image', the condition is 'depth, segmentation'",
        ),
        ("", "config.cond_vqgan: name the workdir"),
    ):
        config.cond_vqgan = wrong
        with pytest.raises(UserError, match=message):
            pretrained.adopt_stages(config, epath.Path(tmp_path / "run"), jnp.float32)
    config.cond_vqgan = f"{segmentation}, {depth}"
    stages = pretrained.adopt_stages(config, epath.Path(tmp_path / "run"), jnp.float32)
    assert set(stages.digest) == {"first_stage", "cond_stage/depth", "cond_stage/segmentation"}
    assert set(stages.frozen) == {"first_stage", "cond/depth", "cond/segmentation"}
    assert {key: stage.config.input_key for key, stage in stages.cond.items()} == {key: key for key in parts}
    config.vqgan = config.cond_vqgan = ""  # the workdir holds its own copies
    again = pretrained.adopt_stages(config, epath.Path(tmp_path / "run"), jnp.float32)
    assert again.digest == stages.digest
    model = ImageTransformer(TransformerConfig.from_config(config.model), stages.first, stages.cond)
    assert [part.key for part in model.condition.parts] == ["depth", "segmentation"]
    with pytest.raises(UserError, match="config.cond_vqgan: the VQGAN of 'segmentation' has factor"):
        model.check_size(16 * stages.first.factor)


def test_sampling_keeps_what_is_given_and_follows_its_seed(labelled):
    tokens = labelled.condition_tokens([1, 2])
    ids = np.random.RandomState(0).randint(0, 64, (2, 8, 8))
    mask = np.zeros((2, 8, 8), bool)
    mask[:, :4] = True
    drawn = np.asarray(labelled.sample(tokens, given=(ids, mask), temperature=0.9, top_k=20, top_p=0.95, seed=1))
    np.testing.assert_array_equal(drawn[mask], ids[mask])
    assert (drawn[~mask] != ids[~mask]).any()
    again = labelled.sample(tokens, given=(ids, mask), temperature=0.9, top_k=20, top_p=0.95, seed=1)
    np.testing.assert_array_equal(again, drawn)
    other = labelled.sample(tokens, given=(ids, mask), temperature=0.9, top_k=20, top_p=0.95, seed=2)
    assert (np.asarray(other) != drawn).any()
    np.testing.assert_array_equal(labelled.sample(tokens, top_k=1), labelled.sample(tokens, greedy=True))


def test_a_prefix_of_ids_gives_the_logits_of_its_positions(labelled):
    golden = ref.golden("class_transformer_tiny.npz")
    tokens = golden["cond_tokens"]
    close(labelled.logits(golden["tokens"][:, :5], tokens), golden["logits"][:, :5])


def test_each_shape_compiles_once(vqgan):
    images = np.zeros((1, 12, 8, 3), np.float32)
    vqgan.encode(images)
    before = vqgan._encode._cache_size()
    vqgan.encode(images + 0.5)
    vqgan.encode(jnp.asarray(images))
    vqgan.encode(images.astype(np.float16))
    assert vqgan._encode._cache_size() == before


def test_settings_compile_nothing_anew(labelled):
    tokens = labelled.condition_tokens([3])
    labelled.sample(tokens, top_k=9)
    sampler = labelled._sampler((8, 8))
    before = sampler._cache_size()
    labelled.sample(tokens, temperature=0.5, top_k=7, top_p=0.3, seed=9)
    assert sampler._cache_size() == before and labelled._sampler((8, 8)) is sampler


IMAGES = np.zeros((1, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode(IMAGES[0]), r"\[b, h, w, 3\]"),
        (lambda m: m.encode(IMAGES[..., :1]), r"\[b, h, w, 3\]"),
        (lambda m: m.reconstruct(IMAGES[:, :7]), "multiples of 2"),
        (lambda m: m.pre_quant(IMAGES[:0]), "none of them 0"),
        (lambda m: m.encode(IMAGES.astype(np.uint8)), "from_uint8"),
        (lambda m: m.decode([[[64]]]), "0 to 63"),
        (lambda m: m.decode([[[-1]]]), "0 to 63"),
        (lambda m: m.decode([[0.0]]), "integers"),
    ],
    ids=range(8),
)
def test_mistakes_with_a_vqgan_are_one_line(vqgan, call, message):
    with pytest.raises(UserError, match=message) as raised:
        call(vqgan)
    assert "\n" not in str(raised.value)


IDS, MASK = np.zeros((1, 8, 8), np.int32), np.zeros((1, 8, 8), bool)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.condition_tokens([10]), "0 to 9"),
        (lambda m: m.condition_tokens([0.5]), "integers"),
        (lambda m: m.logits(IDS, [[0, 0]]), "2 tokens a row, 1 belong"),
        (lambda m: m.logits(IDS, [[0], [1]]), "1 rows"),
        (lambda m: m.logits(IDS[:, :4], [[0]]), "trained on"),
        (lambda m: m.nll(np.zeros((1, 65), int), [[0]]), "from 1 to 64"),
        (lambda m: m.nll(IDS + 64, [[0]]), "0 to 63"),
        (lambda m: m.sample([[0]], grid=(4, 8)), "smaller than the window"),
        (lambda m: m.sample([[0]], temperature=0.0), "temperature"),
        (lambda m: m.sample([[0]], top_p=1.5), "top_p"),
        (lambda m: m.sample([[0]], top_k=0), "top_k"),
        (lambda m: m.sample([[0]], given=(IDS, MASK[:, :4])), "given"),
        (lambda m: m.sample([[0]], given=(IDS + 64, ~MASK)), "0 to 63"),
        (lambda m: m.decode(IDS[0]), "integers"),
        (lambda m: m.sample([[10]]), "0 to 9"),
    ],
    ids=range(15),
)
def test_mistakes_with_a_transformer_are_one_line(labelled, call, message):
    with pytest.raises(UserError, match=message) as raised:
        call(labelled)
    assert "\n" not in str(raised.value)


def test_wrong_places_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no workdir there"):
        pretrained.load_vqgan(tmp_path)
    with pytest.raises(UserError, match="a vqgan is needed"):
        pretrained.load_vqgan(ref.GOLDEN / "class_transformer_tiny.ckpt")
    with pytest.raises(UserError, match="a transformer is needed"):
        pretrained.load_transformer(ref.GOLDEN / "vqgan_tiny.ckpt")


def small(condition, grid=(4, 4)):
    """A tiny transformer with random parameters under some condition, its own vocabulary layout."""
    architecture = ArchitectureConfig(1, 1, 8, 0, 0, 0.0, 0.0, 0.0, **GPT2)
    config = TransformerConfig(architecture, condition, grid, "row_major", False, 0.0)
    model = ImageTransformer(config, Tokenizer(VQGAN(ref.VQGAN_TINY)))
    init = jax.jit(lambda: nn.unbox(model.init(jax.random.key(0))))
    frozen = {"first_stage": ref.vqgan_variables(ref.VQGAN_TINY, ref.checkpoint("vqgan_tiny.ckpt"))}
    return PretrainedTransformer(model, init(), frozen)


def test_unconditional_takes_a_number_of_rows():
    model = small(UnconditionalConfig())
    tokens = model.condition_tokens(3)
    assert tokens.shape == (3, 1) and model.sample(tokens).shape == (3, 4, 4)
    assert model.sample(tokens, grid=(4, 6)).shape == (3, 4, 6)
    with pytest.raises(UserError, match="number of rows"):
        model.condition_tokens("x")


def test_coordinates_of_a_larger_picture_reach_each_window():
    model = small(CoordinatesConfig(64, 2, "joint"))
    assert model.condition_tokens(pixel_coordinates(8, 8)[None]).shape == (1, 16)
    whole = model.condition_tokens(pixel_coordinates(12, 16)[None])
    assert whole.shape == (1, 48) and len(np.unique(whole)) > 40
    ids = model.sample(whole, grid=(6, 8))
    assert ids.shape == (1, 6, 8) and model.decode(ids).shape == (1, 12, 16, 3)
    with pytest.raises(UserError, match="does not divide"):
        model.condition_tokens(pixel_coordinates(9, 8)[None])
    with pytest.raises(UserError, match="coordinates are"):
        model.condition_tokens(np.zeros((1, 8, 8, 3)))


def test_objects_go_in_as_boxes():
    layout = ObjectTokens("boxes", 2, 100, 5, True, (), True)
    model = small(layout)
    raw = {"boxes": np.float32([[[0, 0, 1, 1]]]), "box_classes": np.int32([[4]])}
    tokens = model.condition_tokens(raw)
    np.testing.assert_array_equal(tokens, layout.tokens(raw["boxes"], raw["box_classes"], np.int32([[0]])))
    assert model.sample(tokens).shape == (1, 4, 4)
    cropped = model.condition_tokens(raw | {"crop_box": np.float32([[0, 0, 0.5, 0.5]])})
    assert (np.asarray(cropped)[0, -2:] != np.asarray(tokens)[0, -2:]).any()
    with pytest.raises(UserError, match="0 to 4"):
        model.condition_tokens(raw | {"box_classes": np.int32([[5]])})
    with pytest.raises(UserError, match="objects are"):
        model.condition_tokens(raw["boxes"])


@pytest.mark.parametrize("codes", [3, 5])
def test_a_stage_without_the_codes_that_a_run_was_left_with_is_compared_as_it_is(codes):
    """It was pruned itself, or has fewer codes than those: neither can be pruned to them."""
    kept = SimpleNamespace(record={"used_codes": [0, 2, 9]}, model_config={"quantizer": {"codebook_size": 3}})
    other = SimpleNamespace(record={}, model_config={"quantizer": {"codebook_size": codes}})
    assert pretrained._pruned_as(kept, other) is other
