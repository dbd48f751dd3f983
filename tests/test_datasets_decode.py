"""One image file -> pixels: conversions stated and compared with Pillow and torchvision, broken files named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sslkit_datasets.decode import MAX_PIXELS, BadImageError, decode


def picture(width=24, height=16, seed=0):
    """Smooth random colours, so that JPEG keeps them nearly as they are."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width, height):
    """A PNG file that claims a size and holds next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_pillows(kind):
    data = encoded(picture(), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    assert decode(data, 3, None).dtype == np.uint8
    assert np.array_equal(decode(data, 3, None), expected)


def test_content_and_not_the_name_decides_the_format():
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
    others = [encoded(picture(), kind) for kind in ("GIF", "BMP", "PPM")]
    for data in [svg, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"not an image", b"\0", *others]:
        with pytest.raises(BadImageError, match="is not a JPEG, PNG or WebP image"):
            decode(data, 3, None)


def test_empty():
    with pytest.raises(BadImageError, match="is empty"):
        decode(b"", 3, None)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated(kind, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(BadImageError):
        decode(data[: int(part * len(data))], 3, None)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 20_000, 200_000])
def test_decompression_bomb(side, recwarn):
    assert side**2 > MAX_PIXELS
    with pytest.raises(BadImageError, match="more than 89,478,485"):
        decode(png_header(side, side), 3, None)


def test_bomb_though_pillows_limit_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImageError, match="200000 x 200000 pixels"):
        decode(png_header(200_000, 200_000), 3, None)


def test_lost_pixels_are_not_grey_pixels():
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(png_header(100, 100), 3, None)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255))))
@pytest.mark.filterwarnings("ignore")
def test_damage_is_an_image_or_a_bad_image(kind, changes):
    data = bytearray(encoded(picture(), kind))
    for position, value in changes:
        data[position % len(data)] = value
    try:
        image = decode(bytes(data), 3, 8)
    except BadImageError as error:
        assert "\n" not in str(error)  # noqa: PT017 either outcome is right
    else:
        assert image.shape == (3, 8, 8)


# ---------------------------------------------------------------- conversions


def test_transparency_lies_on_white():
    colours = np.zeros((1, 3, 4), np.uint8)
    colours[0] = [(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51)]
    image = decode(encoded(Image.fromarray(colours, "RGBA")), 3, None)
    assert image[:, 0, 0].tolist() == [200, 0, 0]
    assert image[:, 0, 1].tolist() == [255, 255, 255]
    assert image[:, 0, 2].tolist() == [round(0.2 * 200 + 0.8 * 255), 204, 204]


def test_transparency_of_grey_palette_and_plain_colours():
    grey = encoded(Image.fromarray(np.array([[0, 90]], np.uint8)), transparency=0)
    assert decode(grey, 3, None)[:, 0].tolist() == [[255, 90]] * 3
    assert decode(grey, 1, None).tolist() == [[[255, 90]]]
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)])
    assert decode(encoded(grey_alpha), 1, None).tolist() == [[[255]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(encoded(palette), 3, None).transpose(1, 2, 0).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    see_through = encoded(palette, transparency=b"\x00\xff")
    assert decode(see_through, 3, None).transpose(1, 2, 0).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    plain = encoded(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    assert decode(plain, 3, None).transpose(1, 2, 0).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_16_bit_grey_is_scaled():
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.rint(deep / 257).astype(int).tolist()
    data = encoded(Image.fromarray(deep))
    assert decode(data, 1, None)[0].tolist() == expected
    assert decode(data, 3, None).tolist() == [expected] * 3


def test_one_bit_and_grey():
    bits = encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert decode(bits, 3, None)[:, 0].tolist() == [[0, 255]] * 3
    colours = encoded(picture())
    assert np.array_equal(decode(colours, 1, None)[0], np.asarray(picture().convert("L")))


def test_cmyk():
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    difference = decode(data, 3, None).astype(int) - np.asarray(picture()).transpose(2, 0, 1)
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(decode(data, 3, None), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0"]
)
def test_damaged_exif_does_not_matter(exif):
    assert np.array_equal(decode(encoded(picture(), "PNG", exif=exif), 3, None), decode(encoded(picture()), 3, None))


def test_an_animation_gives_its_first_frame():
    data = encoded(picture(), "PNG", save_all=True, append_images=[picture(seed=1)])
    assert np.array_equal(decode(data, 3, None), decode(encoded(picture()), 3, None))


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize(("width", "height", "size"), [(48, 32, 16), (32, 80, 16), (200, 150, 32), (20, 20, 40)])
def test_resizing_is_torchvisions(width, height, size):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    data = encoded(picture(width, height))
    whole = torch.from_numpy(decode(data, 3, None))
    expected = tv.center_crop(
        tv.resize(whole, [size], interpolation=InterpolationMode.BICUBIC, antialias=True), [size, size]
    )
    difference = (torch.from_numpy(decode(data, 3, size)).int() - expected.int()).abs().float()
    assert difference.mean() < 1.0  # of 255; where the crop does not fall on whole pixels torchvision rounds it
    exact = (width - height) * size / min(width, height) % 2 == 0
    # Torchvision lets pixels outside the square weigh in at its border.
    assert not exact or difference[:, 2:-2, 2:-2].max() <= 1


def test_resizing_averages():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    image = decode(encoded(Image.fromarray(stripes)), 3, 8)
    assert abs(int(image.min()) - 127) <= 4
    assert abs(int(image.max()) - 128) <= 4


def test_extreme_shapes():
    assert decode(encoded(Image.new("RGB", (1, 1), (9, 8, 7))), 3, 5)[:, 2, 2].tolist() == [9, 8, 7]
    assert decode(encoded(picture(1, 3000)), 3, 16).shape == (3, 16, 16)
