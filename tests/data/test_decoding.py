"""Decoding: every kind of picture, the same with and without simplejpeg, and one line for what is unreadable."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps

from vqgan_jax.data import decoding
from vqgan_jax.data.decoding import decode_float_rgba, decode_ids, decode_image
from vqgan_jax.data.source import CorruptExample


@pytest.fixture(params=["fast", "pillow"])
def library(request, monkeypatch):
    """Runs a test with simplejpeg and without."""
    if request.param == "fast":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    return request.param


def encode(pixels, kind="PNG", mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(height=120, width=161, seed=0):
    """Smooth colours with edges and some noise, uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 100 * np.sin(x / a + y / b) for a, b in ((9, 31), (17, 11), (40, 7))], axis=-1)
    waves[(x - 60) ** 2 + (y - 50) ** 2 < 900] = 20, 200, 240
    return np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)


def test_every_kind_of_picture_becomes_rgb_uint8(library):
    grey = np.array([[0, 128, 255]], np.uint8)
    deep = (grey.astype(np.int32) * 257 + [0, 100, -100]).astype(np.uint16)
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)
    red = Image.new("RGB", (3, 2), (255, 0, 0))
    transparent = red.convert("P")
    transparent.info["transparency"] = transparent.getpixel((0, 0))
    for data, expected, tolerance in (
        (encode(grey), np.repeat(grey[..., None], 3, axis=2), 0),
        (encode(deep), np.repeat(grey[..., None], 3, axis=2), 0),
        (encode(rgba), [[[255, 0, 0], [255, 255, 255]]], 0),
        (encode(rgba, "WEBP", lossless=True), [[[255, 0, 0], [255, 255, 255]]], 0),
        (encode(red.convert("P")), np.broadcast_to([255, 0, 0], (2, 3, 3)), 0),
        (encode(transparent), np.full((2, 3, 3), 255), 0),
        (encode(Image.new("1", (3, 2), 1), "BMP"), np.full((2, 3, 3), 255), 0),
        (encode(np.array([[[9, 255], [9, 0]]], np.uint8)), [[[9] * 3, [255] * 3]], 0),
        (encode(np.full((2, 3), 77, np.uint8), "JPEG"), np.full((2, 3, 3), 77), 1),
        (encode(Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "JPEG"), np.broadcast_to([255, 0, 0], (2, 3, 3)), 3),
        (encode(red, "WEBP", lossless=True), np.broadcast_to([255, 0, 0], (2, 3, 3)), 0),
    ):
        pixels = decode_image(data, "x")
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels, expected, atol=tolerance)


def test_the_inverted_cmyk_of_adobe_is_turned_over(library):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 0] = 255  # full cyan
    marked = encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=95)  # Pillow writes Adobe's marker and inverts
    assert b"Adobe" in marked[:200]
    np.testing.assert_allclose(decode_image(marked, "x"), np.broadcast_to([0, 255, 255], (8, 8, 3)), atol=4)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}, {"grey": True}])
@pytest.mark.parametrize("at_least", [None, 30, 59, 60, 61, 200])
def test_simplejpeg_and_pillow_decode_bit_for_bit_the_same(monkeypatch, options, at_least):
    pytest.importorskip("simplejpeg")
    options = dict(options)
    picture = Image.fromarray(photograph())
    data = encode(picture.convert("L") if options.pop("grey", False) else picture, "JPEG", **options)
    calls = []
    monkeypatch.setattr(decoding, "_to_rgb", lambda image: calls.append(image))
    fast = decode_image(data, "x", at_least=at_least)
    monkeypatch.undo()
    assert not calls, "simplejpeg did not do it"
    monkeypatch.setattr(decoding, "simplejpeg", None)
    np.testing.assert_array_equal(fast, decode_image(data, "x", at_least=at_least))


def test_a_jpeg_is_halved_while_its_short_side_stays_long_enough(library):
    data = encode(photograph(300, 400), "JPEG")
    shapes = {n: decode_image(data, "x", at_least=n).shape[:2] for n in (None, 151, 150, 76, 75, 38, 37, 1)}
    assert shapes == {
        None: (300, 400),
        151: (300, 400),
        150: (150, 200),
        76: (150, 200),
        75: (75, 100),
        38: (75, 100),
        37: (38, 50),
        1: (38, 50),
    }
    assert decode_image(encode(photograph(300, 400)), "x", at_least=1).shape == (300, 400, 3)  # a PNG cannot


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_rotation_is_applied(library, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(24, 40), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = decode_image(data, "x")
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.flags.c_contiguous and pixels.shape == ((40, 24, 3) if orientation > 4 else (24, 40, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_nonsense_in_exif_spoils_no_picture(library):
    plain = encode(photograph(24, 40), "JPEG")
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0abc"):
        data = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
        np.testing.assert_array_equal(decode_image(data, "x"), decode_image(plain, "x"))
    for kind in ("PNG", "WEBP"):
        odd, plain = (encode(photograph(24, 40), kind, **options) for options in ({"exif": b"Exif\0\0abc"}, {}))
        np.testing.assert_array_equal(decode_image(odd, "x"), decode_image(plain, "x"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header"])
def test_damaged_files_are_corrupt_examples(library, kind, damage):
    whole = encode(photograph(), kind)
    data = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "header": whole[:24]}[damage]
    with pytest.raises(CorruptExample) as caught:
        decode_image(data, "a/b.jpg")
    assert caught.value.path == "a/b.jpg" and caught.value.reason and "\n" not in str(caught.value)
    assert ("empty" in caught.value.reason) == (damage == "empty")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("damage", ["overwritten", "stray marker", "early end", "no end", "zeros", "more"])
def test_the_same_damaged_jpegs_are_readable_with_and_without_simplejpeg(monkeypatch, damage):
    """libjpeg only warns of some damage: Pillow goes on, and so must the fast way."""
    pytest.importorskip("simplejpeg")
    whole = encode(photograph(), "JPEG", quality=90)
    half = len(whole) // 2
    data = {
        "overwritten": whole[:half] + bytes(range(1, 41)) + whole[half + 40 :],
        "stray marker": whole[:half] + b"\xff\xd0" + whole[half:],
        "early end": whole[:half] + b"\xff\xd9" + whole[half:],
        "no end": whole[:-2],
        "zeros": whole[:half] + bytes(40) + whole[half + 40 :],
        "more": whole + b"more",
    }[damage]

    def outcome():
        try:
            return decode_image(data, "x")
        except CorruptExample as error:
            return np.array([str(error)])

    fast = outcome()
    assert (fast.ndim == 1) == (damage == "no end")
    monkeypatch.setattr(decoding, "simplejpeg", None)
    np.testing.assert_array_equal(fast, outcome())


def test_a_decompression_bomb_is_a_corrupt_example(library, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for kind in ("PNG", "JPEG"):
        with pytest.raises(CorruptExample, match="DecompressionBomb"):
            decode_image(encode(np.zeros((20, 20, 3), np.uint8), kind), "x")


def test_ids_are_read_as_they_were_written():
    ids = np.array([[0, 3], [150, 255]], np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([(i * 7) % 256 for i in range(768)])
    large = ids.astype(np.int32) * 200
    for data, expected in (
        (encode(ids), ids),
        (encode(palette), ids),
        (encode(large.astype(np.uint16)), large),
        (encode(np.repeat(ids[..., None], 3, axis=2)), ids),
        (encode(Image.fromarray(np.array([[True, False]]))), [[1, 0]]),
        (encode(np.stack([ids, 255 - ids], axis=-1)), ids),
    ):
        found = decode_ids(data, "x")
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == (np.int32 if np.max(expected) > 255 else np.uint8)
    for data, reason in ((encode(photograph()), "colours"), (b"", "empty"), (encode(ids)[:30], "unknown format")):
        with pytest.raises(CorruptExample, match=reason):
            decode_ids(data, "x")


def test_floats_in_rgba_come_back_bit_for_bit():
    depth = np.random.default_rng(0).normal(0, 1e3, (5, 7)).astype("<f4")
    data = encode(depth.view(np.uint8).reshape(5, 7, 4))
    found = decode_float_rgba(data, "x")
    np.testing.assert_array_equal(found, depth)
    assert found.dtype == np.float32
    with pytest.raises(CorruptExample, match="RGBA"):
        decode_float_rgba(encode(photograph()), "x")
