"""What kind of image a file holds, before any conversion."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sslkit_datasets.arrays import PLAIN, Arrays, is_array, values_of
from sslkit_datasets.decode import FORMATS, Pixels, decode

_NAMES = {"1": "black and white", "L": "grey", "P": "palette", "I": "32-bit grey", "F": "float grey"}
_STEPS = (0.7548776662466927, 0.5698402909980532)
"""The plastic number's inverse and its square: multiples of these, without their whole parts, fill a square evenly."""
_GREY = ("1", "L", "LA", "La", "I", "F")


@dataclass(frozen=True)
class Kind:
    """A file that can be decoded."""

    name: str
    height: int
    width: int
    channels: int
    values: NDArray[np.float64] | None
    """Some of its values, evenly over it, where they are not 8-bit."""
    array: bool = False
    """Whether its bands are taken as they are, as those of NumPy and TIFF files."""


def kind_of_image(data: bytes, values: int, arrays: Arrays = PLAIN) -> Kind:
    """Decode a file in full and say what it is.

    Args:
        data: the file.
        values: how many values to take of what is not 8-bit.
        arrays: which of a file's axes are its bands.

    Raises:
        BadImageError: it cannot be decoded.
    """
    if is_array(data):
        held = values_of(data, arrays)
        height, width, bands = held.shape
        kind = f"{bands} bands {held.dtype}" if bands > 1 else f"grey {held.dtype}"
        ranged = bool(values) and held.dtype != np.uint8
        return Kind(kind, height, width, bands, some(held, values) if ranged else None, array=True)
    pixels: Pixels = decode(data, 3, None)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode = image.mode
        deep = mode.startswith("I;16")
        found = some(np.asarray(image), values) if deep and values else None
    name = "16-bit grey" if deep else _NAMES.get(mode, mode)
    grey = deep or mode in _GREY or (mode == "P" and _is_grey(pixels))
    return Kind(name, pixels.shape[1], pixels.shape[2], 1 if grey else 3, found)


def some(values: NDArray[np.generic], count: int) -> NDArray[np.float64]:
    """About `count` of an image's finite values, as many of each band and evenly over rows and columns.

    Args:
        values: `[h, w, bands]`, or `[h, w]`.
        count: how many; fewer than bands are not taken, nor more than there are.
    """
    height, width, bands = values.shape if values.ndim == 3 else (*values.shape, 1)
    if values.size <= count:
        chosen = values.reshape(-1)
    else:
        each = -(-count // bands)
        at = np.arange(each * bands)
        # Not every n-th value: where n has a factor of the bands or the width, that sees some bands or columns alone.
        row, column = (
            ((at + 0.5) * step % 1 * side).astype(int) for step, side in zip(_STEPS, (height, width), strict=True)
        )
        chosen = values.reshape(height, width, bands)[row, column, at // each]
    wide = chosen.astype(np.float64)
    return wide[np.isfinite(wide)]


def _is_grey(pixels: Pixels) -> bool:
    return bool((pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all())
