"""What can be known of an image file without decoding it: its sides, and whether they can be believed."""

from __future__ import annotations

import warnings
from typing import BinaryIO

from PIL import Image

from sslkit_datasets.bad import BadImageError
from sslkit_datasets.decode import FORMATS, MAX_PIXELS, ORIENTATION, bad_images, convertible

_TURNED = (5, 6, 7, 8)
_LATE = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks of a PNG file that may tell how it is to be turned, and may come after its pixels."""


def sides(file: BinaryIO) -> tuple[int, int]:
    """Height and width that `decode` would give, from the header of a JPEG, PNG or WebP file.

    Raises:
        BadImageError: the header is none, or `decode` would refuse what it says. What is damaged behind the header
            is not found.
    """
    with bad_images(), warnings.catch_warnings(), Image.open(file, formats=FORMATS) as image:
        warnings.simplefilter("ignore")
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImageError(f"has {width} x {height} pixels, more than {MAX_PIXELS:,}")
        if not convertible(image):
            raise BadImageError(f"has the colour mode {image.mode}, for which no conversion is defined")
        if image.format == "PNG" and _late_text(file):
            image.load()
        turned = _orientation(image) in _TURNED
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> object:
    try:
        # The method of PNG files decodes the whole image first, lest text behind the pixels be missed.
        return Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # damaged EXIF data says nothing about an image that can be decoded
        return None


def _late_text(file: BinaryIO) -> bool:
    """Whether a PNG file has text or EXIF data after its pixels; only the chunks' headers are read."""
    back, at, pixels = file.tell(), 8, False
    try:
        while True:
            file.seek(at)
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            if pixels and head[4:] in _LATE:
                return True
            pixels = pixels or head[4:] == b"IDAT"
            at += 12 + int.from_bytes(head[:4], "big")
    finally:
        file.seek(back)
