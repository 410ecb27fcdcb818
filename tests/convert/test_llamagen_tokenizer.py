"""LlamaGen's tokenizers come in whole: their own layout, written and computed here in NumPy, gives the same codes and
the same pictures."""

import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.files import assert_equal, run
from tests.test_torch_files import mapping, storage, tensor, text, write_zip
from vqgan_jax import pretrained
from vqgan_jax.config import UserError
from vqgan_jax.convert import llamagen_tokenizer
from vqgan_jax.convert.reference import open_checkpoint, vqgan_slots
from vqgan_jax.models.autoencoder import AutoencoderConfig
from vqgan_jax.models.quantizers import VQConfig
from vqgan_jax.models.vqgan import VQGANConfig
from vqgan_jax.train.portable import read_stage

CHANNELS, WIDTHS, Z, CODES, DIM = 32, (32, 64), 32, 48, 8


class Layout:
    """The layout in the order in which it runs; a layer's tensors are made where it first asks for them."""

    def __init__(self):
        self.tensors, self.random = {}, np.random.RandomState(0)

    def take(self, name, *shape):
        if name not in self.tensors:
            array = self.random.standard_normal(shape)
            if len(shape) > 1:
                array *= np.prod(shape[1:]) ** -0.5
            else:
                array = 0.2 * array + ("norm" in name and name.endswith("weight"))
            self.tensors[name] = array.astype(np.float32)
        assert self.tensors[name].shape == shape, name
        return self.tensors[name].astype(np.float64)

    def conv(self, name, x, width, size=3, stride=1, pad=(1, 1)):
        weight, bias = self.take(f"{name}.weight", width, len(x), size, size), self.take(f"{name}.bias", width)
        x = np.pad(x, ((0, 0), pad, pad)) if size > 1 else x
        patches = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
        return np.einsum("chwyx,ocyx->ohw", patches, weight, optimize=True) + bias[:, None, None]

    def norm(self, name, x, swish=True):
        c, h, w = x.shape
        groups = x.reshape(32, -1)
        mean, variance = groups.mean(1, keepdims=True), groups.var(1, keepdims=True)
        y = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(c, h, w)
        weight, bias = self.take(f"{name}.weight", c), self.take(f"{name}.bias", c)
        y = y * weight[:, None, None] + bias[:, None, None]
        return y / (1 + np.exp(-y)) if swish else y

    def res(self, name, x, width):
        y = self.conv(f"{name}.conv1", self.norm(f"{name}.norm1", x), width)
        y = self.conv(f"{name}.conv2", self.norm(f"{name}.norm2", y), width)
        return y + (x if len(x) == width else self.conv(f"{name}.nin_shortcut", x, width, 1))

    def attention(self, name, x):
        c, h, w = x.shape
        y = self.norm(f"{name}.norm", x, swish=False)
        q, k, v = (self.conv(f"{name}.{part}", y, c, 1).reshape(c, -1) for part in "qkv")
        scores = q.T @ k / c**0.5
        p = np.exp(scores - scores.max(1, keepdims=True))
        mixed = v @ (p / p.sum(1, keepdims=True)).T
        return x + self.conv(f"{name}.proj_out", mixed.reshape(c, h, w), c, 1)

    def middle(self, side, x):
        x = self.attention(f"{side}.mid.1", self.res(f"{side}.mid.0", x, len(x)))
        return self.res(f"{side}.mid.2", x, len(x))

    def blocks(self, name, x, width, count, attends):
        for k in range(count):
            x = self.res(f"{name}.res.{k}", x, width)
            x = self.attention(f"{name}.attn.{k}", x) if attends else x
        return x

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, CHANNELS)
        for level, width in enumerate(WIDTHS):
            last = level == len(WIDTHS) - 1
            x = self.blocks(f"encoder.conv_blocks.{level}", x, width, 1, last)
            if not last:
                x = self.conv(f"encoder.conv_blocks.{level}.downsample.conv", x, width, stride=2, pad=(0, 1))
        x = self.norm("encoder.norm_out", self.middle("encoder", x))
        z = self.conv("quant_conv", self.conv("encoder.conv_out", x, Z), DIM, 1).reshape(DIM, -1).T
        book = self.take("quantize.embedding.weight", CODES, DIM)
        z, book = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (z, book))
        return ((z[:, None] - book) ** 2).sum(-1).argmin(1).reshape(x.shape[1:])

    def decode(self, ids):
        book = self.take("quantize.embedding.weight", CODES, DIM)
        book = book / np.linalg.norm(book, axis=1, keepdims=True)
        x = self.conv("post_quant_conv", book[ids].transpose(2, 0, 1), Z, 1)
        x = self.middle("decoder", self.conv("decoder.conv_in", x, WIDTHS[-1]))
        for number, width in enumerate(reversed(WIDTHS)):
            x = self.blocks(f"decoder.conv_blocks.{number}", x, width, 2, number == 0)
            if number < len(WIDTHS) - 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = self.conv(f"decoder.conv_blocks.{number}.upsample.conv", x, width)
        return self.conv("decoder.conv_out", self.norm("decoder.norm_out", x), 3)


@pytest.fixture(scope="module")
def made():
    """(tensors, picture [3, h, w], its codes, the picture of the codes) by NumPy alone."""
    layout = Layout()
    picture = np.random.RandomState(1).uniform(-1, 1, (3, 16, 12))
    ids = layout.encode(picture)
    rebuilt = layout.decode(ids)
    return layout.tensors | {"quantize.codebook_used": np.zeros(65536, np.float32)}, picture, ids, rebuilt


def test_codes_and_pictures_are_those_of_the_layout(made, tmp_path):
    tensors, picture, ids, rebuilt = made
    save_file(tensors, tmp_path / "vq.safetensors")
    model = pretrained.load_vqgan(tmp_path / "vq.safetensors")
    c, q = model.config.autoencoder, model.config.quantizer
    assert (c.channels, c.multipliers, c.blocks, c.decoder_extra_blocks) == (32, (1, 2), 1, 1)
    assert [c.has_attention(level) for level in (0, 1)] == [False, True] and model.config.discriminator is None
    assert (q.codebook_size, q.dim, q.normalize, q.commitment_weight, q.codebook_weight) == (48, 8, True, 0.25, 1.0)
    found = model.encode(picture.transpose(1, 2, 0)[None].astype(np.float32))
    assert len(np.unique(ids)) > 10
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_allclose(model.decode(ids[None])[0], rebuilt.transpose(1, 2, 0), atol=2e-4)


def test_the_file_of_pytorch_and_its_import_are_the_same(made, tmp_path, capsys):
    """The published form, {"model": tensors}, as a file and as a folder."""
    tensors = made[0]
    entries, blocks = b"", {}
    for k, (name, array) in enumerate(tensors.items()):
        strides = [stride // 4 for stride in array.strides]
        entries += text(name) + tensor(storage(str(k), array.size), 0, array.shape, strides)
        blocks[str(k)] = array.tobytes()
    path = write_zip(tmp_path / "vq.pt", mapping(model=b"}(" + entries + b"u"), blocks)
    assert run(f"checkpoint={path}", f"out={tmp_path}/out") == 0
    assert "left out: the last codes that training used" in capsys.readouterr().out
    save_file(tensors, tmp_path / "vq.safetensors")
    with open_checkpoint(tmp_path / "vq.safetensors") as opened:
        assert_equal(read_stage(tmp_path / "out")[0], opened.read())


def test_names_go_both_ways(made):
    names = set(made[0])
    levels = llamagen_tokenizer.levels_of(names)
    assert levels == 2
    for name in names:
        theirs = llamagen_tokenizer.reference_name(name, levels)
        assert llamagen_tokenizer.llamagen_name(theirs, levels) == name and "conv_blocks" not in theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("decoder.conv_blocks.1.res.1.conv1.bias"),
            "no tensor 'decoder.conv_blocks.1.res.1.conv1.bias'",
        ),
        (lambda t: t.pop("encoder.mid.1.q.weight"), "'decoder.mid.1.k.bias' is no part"),
        (lambda t: t.update({"quantize.extra": np.zeros(1, np.float32)}), "'quantize.extra' is no part"),
        (
            lambda t: t.update({"quant_conv.weight": np.zeros((9, Z, 1, 1), np.float32)}),
            "'quant_conv.weight' has shape",
        ),
        (lambda t: t.update({"loss.x": np.zeros(1, np.float32)}), "'loss.x' is no part"),
    ],
)
def test_strict_both_ways(made, change, message, tmp_path):
    tensors = dict(made[0])
    change(tensors)
    save_file(tensors, tmp_path / "vq.safetensors")
    with pytest.raises(UserError, match=message), open_checkpoint(tmp_path / "vq.safetensors"):
        pass


def test_the_reference_has_no_such_quantizer(made, tmp_path, capsys):
    save_file(made[0], tmp_path / "vq.safetensors")
    assert run(f"checkpoint={tmp_path}/vq.safetensors", f"out={tmp_path}/out") == 0
    assert run(f"checkpoint={tmp_path}/out", f"out={tmp_path}/back.safetensors", "to=torch") == 2
    assert "the reference has no quantizer like this VQ" in capsys.readouterr().err


@pytest.mark.slow
def test_published_sizes():
    """72 million parameters at f 16 and 70 million at f 8."""
    for multipliers, millions in (((1, 1, 2, 2, 4), 72), ((1, 2, 2, 4), 70)):
        resolution = 256 // 2 ** (len(multipliers) - 1)
        ae = AutoencoderConfig(3, 3, 256, 128, multipliers, 2, 1, (resolution,), True, 256, 0.0, 1)
        config = VQGANConfig(ae, VQConfig(16384, 8, 0.25, 1.0, 0.0, 0.99, True, "uniform"), None, "image")
        assert round(sum(math.prod(slot.shape) for slot in vqgan_slots(config)) / 1e6) == millions
