"""LlamaGen's transformers: an import computes what their formulas do, and takes nothing that it does not know."""

import contextlib
import http.client
import json

import jax
import numpy as np
import pytest

from tests import reference as ref
from vqgan_jax import pretrained, published, weights
from vqgan_jax.config import UserError
from vqgan_jax.convert.reference import open_checkpoint
from vqgan_jax.convert.stream import Entry, write_safetensors
from vqgan_jax.tools import convert

CODES, CLASSES, WIDTH, HEADS, LAYERS, HIDDEN, SIDE = 64, 5, 32, 2, 3, 48, 3
FIRST_STAGE = ref.GOLDEN / "vqgan_tiny.ckpt"


def angles() -> np.ndarray:
    """[1 + 9, 8, 2]: cosine and sine of each place and pair, zeros for the class; the first half turns with the row."""
    half = WIDTH // HEADS // 2
    frequencies = 10000.0 ** -(np.arange(0, half, 2) / half)
    table = np.zeros((1 + SIDE**2, half, 2))
    for i in range(SIDE**2):
        turn = np.concatenate([i // SIDE * frequencies, i % SIDE * frequencies])
        table[1 + i] = np.stack([np.cos(turn), np.sin(turn)], -1)
    return table


def tensors() -> dict[str, np.ndarray]:
    """A file's tensors, by LlamaGen's names and shapes."""
    rng = np.random.default_rng(0)
    shapes = {
        "tok_embeddings.weight": (CODES, WIDTH),
        "cls_embedding.embedding_table.weight": (CLASSES + 1, WIDTH),
        "norm.weight": (WIDTH,),
        "output.weight": (CODES, WIDTH),
    }
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
            f"layers.{i}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{i}.feed_forward.w1.weight": (HIDDEN, WIDTH),
            f"layers.{i}.feed_forward.w2.weight": (WIDTH, HIDDEN),
            f"layers.{i}.feed_forward.w3.weight": (HIDDEN, WIDTH),
            f"layers.{i}.attention_norm.weight": (WIDTH,),
            f"layers.{i}.ffn_norm.weight": (WIDTH,),
        }
    made = {name: 0.4 * rng.standard_normal(shape) + (len(shape) == 1) for name, shape in shapes.items()}
    return {name: array.astype(np.float32) for name, array in (made | {"freqs_cis": angles()}).items()}


def write(path, arrays):
    entries = [Entry(name, a.shape, a.dtype, lambda a=a: [a]) for name, a in arrays.items()]
    write_safetensors(path, entries)
    return path


def oracle(arrays: dict[str, np.ndarray], label: int, codes: np.ndarray) -> np.ndarray:
    """Logits [t, codes] of one row in float64: token i sees the class and the codes before it."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    table, t = angles(), len(codes)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def turn(x):  # [t, heads, k]
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = (table[:t, None, :, part] for part in (0, 1))
        return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)

    x = np.concatenate([w["cls_embedding.embedding_table.weight"][[label]], w["tok_embeddings.weight"][codes[:-1]]])
    for i in range(LAYERS):
        layer = {name.removeprefix(f"layers.{i}."): a for name, a in w.items() if name.startswith(f"layers.{i}.")}
        y = norm(x, layer["attention_norm.weight"]) @ layer["attention.wqkv.weight"].T
        q, k, v = (part.reshape(t, HEADS, -1) for part in np.split(y, 3, axis=-1))
        scores = np.einsum("tnk,snk->nts", turn(q), turn(k)) / np.sqrt(WIDTH // HEADS)
        scores = np.where(np.tri(t, dtype=bool), scores, -np.inf)
        weights_ = np.exp(scores - scores.max(-1, keepdims=True))
        weights_ /= weights_.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snk->tnk", weights_, v).reshape(t, WIDTH) @ layer["attention.wo.weight"].T
        y = norm(x, layer["ffn_norm.weight"])
        gate, up = y @ layer["feed_forward.w1.weight"].T, y @ layer["feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen")
    file = write(folder / "c2i.safetensors", tensors())
    code = convert.main([f"--checkpoint={file}", f"--first_stage={FIRST_STAGE}", f"--out={folder / 'out'}"])
    assert code == 0
    return folder / "out"


def test_an_import_computes_the_formulas(workdir):
    trained = pretrained.open_transformer(workdir, key="--workdir")
    arrays, model = tensors(), trained.model
    rng = np.random.default_rng(1)
    codes, labels = rng.integers(0, CODES, (2, SIDE**2)), np.array([3, CLASSES])
    assert model.null_condition.tolist() == [[CLASSES]]
    logits = jax.jit(model.logits)(trained.params, labels[:, None], codes)
    for row in range(2):
        expected = oracle(arrays, labels[row], codes[row])
        np.testing.assert_allclose(logits[row], expected, atol=1e-4 * np.abs(expected).max())


def test_its_record_says_what_it_is(workdir):
    model = json.loads((workdir / "stage.json").read_text())["record"]["config"]["model"]
    assert model["grid"] == [SIDE, SIDE] and model["condition"] == {"name": "class", "classes": CLASSES}
    said = {name: model["transformer"][name] for name in ("block", "heads", "kv_heads", "mlp_width", "positions")}
    assert said == dict(block="llama", heads=HEADS, kv_heads=0, mlp_width=HIDDEN, positions="rope_llamagen")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("layers.1.feed_forward.w3.weight"), "no tensor 'layers.1.feed_forward.w3.weight'"),
        (lambda a: a.update({"layers.0.attention.bias": np.zeros(3, np.float32)}), "'layers.0.attention.bias' is no"),
        (lambda a: a.update({"output.weight": np.zeros((CODES, 8), np.float32)}), r"shape \(64, 8\), \(64, 32\)"),
        (
            lambda a: a.update({"layers.2.attention.wqkv.weight": np.zeros((64, 32), np.float32)}),
            r"shape \(64, 32\), \(96, 32\)",
        ),
        (lambda a: a.pop("freqs_cis"), "block_size|n_head"),
    ],
)
def test_it_is_strict_both_ways(tmp_path, change, message):
    arrays = tensors()
    change(arrays)
    file = write(tmp_path / "c2i.safetensors", arrays)
    with pytest.raises(UserError, match=message), open_checkpoint(file):
        pass


def test_a_yaml_or_a_published_name_says_what_the_file_does_not(tmp_path):
    arrays = tensors()
    del arrays["freqs_cis"]
    (tmp_path / "c2i_L_384.yaml").write_text("model: {params: {n_head: 2}}")
    with open_checkpoint(write(tmp_path / "c2i_L_384.safetensors", arrays)) as opened:
        model = opened.stages[""].record["config"]["model"]
    assert model["grid"] == [24, 24] and model["transformer"]["heads"] == 2


def test_a_file_alone_asks_for_its_tokenizer(tmp_path):
    file = write(tmp_path / "c2i.safetensors", tensors())
    with pytest.raises(UserError, match="--first_stage=vq_ds16_c2i.pt"):
        pretrained.open_transformer(file, key="--workdir")
    assert convert.main([f"--checkpoint={file}", f"--out={tmp_path / 'out'}"]) == 2


def test_a_published_model_is_imported_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path))
    small = published.Published("llamagen_b_256", "vqgan_imagenet_f16_1024")
    monkeypatch.setitem(published.MODELS, "llamagen-B", small)

    def offline(*_, **__):
        raise http.client.HTTPException("no connection")

    monkeypatch.setattr(weights.urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match=r"c2i_B_256.pt.*vqgan_imagenet_f16_1024.ckpt"):
        published.published("llamagen-B", flag="--pretrained")
    (tmp_path / "vqgan_imagenet_f16_1024.ckpt").write_bytes(FIRST_STAGE.read_bytes())
    with contextlib.suppress(OSError):
        (tmp_path / "vqgan_imagenet_f16_1024.yaml").write_text(FIRST_STAGE.with_suffix(".yaml").read_text())
    with pytest.raises(UserError) as raised:
        published.published("llamagen-B", flag="--pretrained")
    text = str(raised.value)
    assert "resolve/main/c2i_B_256.pt" in text and str(tmp_path / "c2i_B_256.pt") in text and "\n" not in text
    write(tmp_path / "c2i_B_256.pt", tensors())
    folder = published.published("llamagen-B", flag="--pretrained")
    (tmp_path / "c2i_B_256.pt").unlink()
    assert published.published("llamagen-B", flag="--pretrained") == folder
    assert pretrained.kind_of(folder, key="--workdir") == "transformer"
    assert not list(tmp_path.glob("*.part"))


def test_every_published_model_has_its_files_in_the_registry():
    for model in published.MODELS.values():
        assert weights.REGISTRY[model.transformer].licence == "MIT"
