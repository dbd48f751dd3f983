"""The bytes of one image file -> pixels, or one line that says why not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sslkit_datasets.arrays import PLAIN, Arrays, is_array, scaled, to_pixels
from sslkit_datasets.bad import BadImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 89_478_485
"""Pillow's own limit, kept here because other libraries switch Pillow's off for the whole process."""

Pixels = NDArray[np.uint8]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


def decode(data: bytes, channels: int, size: int | None, arrays: Arrays = PLAIN) -> Pixels:
    """Decode a JPEG, PNG, WebP, NumPy or TIFF file in full.

    Args:
        data: the file.
        channels: 3 (RGB) or 1 (grey); any number of bands of a NumPy or TIFF file.
        size: side in pixels to which the largest central square is resized; None keeps the image's own size.
        arrays: how bands are picked, and what is done with values of more than 8 bits.

    Returns:
        uint8 `[C, H, W]`.

    Raises:
        BadImageError: the bytes are no such image, or a damaged one, or one with more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise BadImageError("is empty (0 bytes)")
    if is_array(data):
        return _fitted(to_pixels(data, channels, arrays), size)
    if channels not in (1, 3):
        raise BadImageError(f"has colours or grey values, and not {channels} channels")
    with bad_images(), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise BadImageError(f"has {opened.width} x {opened.height} pixels, more than {MAX_PIXELS:,}")
        opened.load()
        image = _convert(_turn(opened), channels, arrays)
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image, dtype=np.uint8)
    return pixels.reshape(image.height, image.width, channels).transpose(2, 0, 1)


@contextlib.contextmanager
def bad_images() -> Iterator[None]:
    """Whatever Pillow raises on a stranger's bytes as a BadImageError, but for a lack of memory."""
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("is not a JPEG, PNG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError(f"has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise anything at all on a stranger's bytes
        text = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise BadImageError(f"cannot be decoded: {text}") from error


def _fitted(pixels: Pixels, size: int | None) -> Pixels:
    """As `ImageOps.fit` does it, band by band."""
    if size is None:
        return pixels
    bands = [ImageOps.fit(Image.fromarray(band), (size, size), Image.Resampling.BICUBIC) for band in pixels]
    return np.stack([np.asarray(band) for band in bands])


def convertible(image: Image.Image) -> bool:
    """Whether a conversion to RGB and to grey is defined for the image's colour mode."""
    return image.mode.startswith("I") or image.mode in (*_PLAIN, *_TRANSPARENT) or "transparency" in image.info


def _turn(image: Image.Image) -> Image.Image:
    try:
        orientation: Any = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data says nothing about an image that was decoded
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _convert(image: Image.Image, channels: int, arrays: Arrays) -> Image.Image:
    if not convertible(image):
        raise BadImageError(f"has the colour mode {image.mode}, for which no conversion is defined")
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips at 255, which leaves an almost white image.
        image = Image.fromarray(scaled(np.asarray(image), arrays.value_range or (0.0, 65535.0)))
    elif image.mode in _TRANSPARENT or "transparency" in image.info:
        front = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front)
    return image.convert("RGB" if channels == 3 else "L")
