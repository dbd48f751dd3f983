"""Images of any number of bands and of more than 8 bits: NumPy and TIFF files, and how they become 8-bit."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from sslkit.errors import UserError
from sslkit_datasets.bad import BadImageError

MOST_BYTES = 2**29
"""Of one image's values, all bands together."""
_AT_A_TIME = 2**18
"""Values that are scaled in one piece, which bounds the memory for the steps between."""
_NUMPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BANDS = 16
_DTYPES = ("uint8", "uint16", "int16", "float32")

Values = NDArray[Any]
Axes = Literal["hwc", "chw"] | None


@dataclass(frozen=True)
class Arrays:
    """The options of data sources of these names."""

    bands: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    axes: Axes = None


PLAIN = Arrays()


def is_array(data: bytes) -> bool:
    """Whether these are the first bytes of a NumPy or TIFF file."""
    return data.startswith((_NUMPY, *_TIFF))


def shape_of(file: BinaryIO, channels: int, options: Arrays) -> tuple[int, int]:
    """Height and width, from the header alone: no more of the file is read.

    Raises:
        BadImageError: as `to_pixels`, of what the header tells.
    """
    shape, dtype, axes = _header(file, options)
    return _checked(shape, dtype, axes, channels, options)[:2]


def values_of(data: bytes, options: Arrays) -> Values:
    """The file's values, `[h, w, bands]`.

    Raises:
        BadImageError: it cannot be read, or has another shape or type than an image has.
    """
    shape, dtype, axes = _header(io.BytesIO(data), options)
    first = _layout(shape, dtype, axes)[0]
    if dtype not in _DTYPES:
        raise BadImageError(f"holds {dtype}; {', '.join(_DTYPES)} can be read")
    values = _read_numpy(data) if data.startswith(_NUMPY) else _read_tiff(data)
    if values.shape != shape:
        raise BadImageError(f"is said to be {list(shape)} and is {list(values.shape)}")
    values = values[:, :, None] if values.ndim == 2 else values
    return values.transpose(1, 2, 0) if first else values


def to_pixels(data: bytes, channels: int, options: Arrays) -> NDArray[np.uint8]:
    """The bands that are wanted, as uint8 `[channels, h, w]`.

    Values that are not 8-bit become round(255 * clip((v - low) / (high - low), 0, 1)) with `value_range`.

    Raises:
        BadImageError: the file cannot be read, has other bands than `channels` or lacks one of `bands`, holds NaN, or
            is not 8-bit and there is no `value_range`.
    """
    shape, dtype, axes = _header(io.BytesIO(data), options)
    _checked(shape, dtype, axes, channels, options, ranged=False)
    values = values_of(data, options)
    if options.bands is not None:
        values = values[:, :, list(options.bands)]
    values = values.transpose(2, 0, 1)
    if values.dtype != np.uint8:
        return scaled(values, options.value_range)
    return np.ascontiguousarray(values)


def scaled(values: Values, value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Values of more than 8 bits as 8 bits, computed in float64.

    Raises:
        BadImageError: there is no range, or some are not numbers.
    """
    if value_range is None:
        low, high = (float(f.reduce(values, axis=None)) for f in (np.fmin, np.fmax))
        raise BadImageError(
            f"holds {values.dtype} from {low:g} to {high:g}; set data_source.value_range = [low, high], which become 0 "
            "and 255"
        )
    table, lowest = None, 0
    if values.dtype.kind in "iu" and values.itemsize == 2:
        lowest = int(np.iinfo(values.dtype).min)
        table = _table(lowest, value_range)
    made = np.empty(values.shape, np.uint8)
    steps = np.nditer(
        [values, made],
        flags=["external_loop", "buffered"],
        op_flags=[["readonly"], ["writeonly"]],
        buffersize=_AT_A_TIME,
    )
    with steps:
        for part, into in steps:
            into[...] = _scale(part, value_range) if table is None else table[part.astype(np.intp) - lowest]
    return made


def _scale(values: Values, value_range: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = value_range
    wide = values.astype(np.float64)
    if np.isnan(wide).any():
        raise BadImageError("holds values that are no numbers (NaN)")
    return np.rint(255 * np.clip((wide - low) / (high - low), 0, 1)).astype(np.uint8)


@lru_cache(maxsize=8)
def _table(lowest: int, value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """What becomes of each value of 16 bits, from the lowest on."""
    return _scale(np.arange(lowest, lowest + 2**16), value_range)


def _checked(
    shape: tuple[int, ...], dtype: str, axes: Axes, channels: int, options: Arrays, *, ranged: bool = True
) -> tuple[int, int, int]:
    _, height, width, bands = _layout(shape, dtype, axes)
    if dtype not in _DTYPES:
        raise BadImageError(f"holds {dtype}; {', '.join(_DTYPES)} can be read")
    if options.bands is not None:
        if max(options.bands) >= bands:
            raise BadImageError(
                f"has {bands} bands, and data_source.bands asks for band {max(options.bands)}, from 0 on"
            )
    elif bands != channels:
        raise BadImageError(
            f"has {bands} bands (it is {list(shape)}), and data_source.channels is {channels}; set channels = {bands}, "
            "or pick some with data_source.bands"
        )
    if ranged and dtype != "uint8" and options.value_range is None:
        raise BadImageError(f"holds {dtype}; set data_source.value_range = [low, high], which become 0 and 255")
    return height, width, bands


def _layout(shape: tuple[int, ...], dtype: str, axes: Axes) -> tuple[bool, int, int, int]:
    """Whether bands come first; height, width, bands."""
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImageError(f"is {list(shape)}; an image is [h, w], [h, w, bands] or [bands, h, w]")
    if dtype in _DTYPES and math.prod(shape) * np.dtype(dtype).itemsize > MOST_BYTES:
        raise BadImageError(
            f"is {list(shape)} of {dtype}, more than the {MOST_BYTES:,} bytes that are read of an image"
        )
    if len(shape) == 2:
        return False, shape[0], shape[1], 1
    last, first = shape[2] <= _BANDS, shape[0] <= _BANDS
    if axes is None and last == first:
        why = "either could be the bands" if last else f"neither side is {_BANDS} bands or fewer"
        raise BadImageError(f'is {list(shape)}, and {why}; set data_source.axes to "hwc" or "chw"')
    if axes == "chw" or (axes is None and first):
        return True, shape[1], shape[2], shape[0]
    return False, shape[0], shape[1], shape[2]


def _header(file: BinaryIO, options: Arrays) -> tuple[tuple[int, ...], str, Axes]:
    """Shape, type, and where the bands are, if that is known."""
    try:
        numpy = file.read(len(_NUMPY)) == _NUMPY
        file.seek(0)
        if numpy:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            return tuple(shape), dtype.name, options.axes
        with _tiff().TiffFile(file) as tiff:
            page = tiff.series[0]
            if (colours := tiff.pages[0].photometric.name) in ("PALETTE", "MINISWHITE", "SEPARATED", "CIELAB"):
                raise BadImageError(
                    f"is a TIFF file whose values stand for {colours}, for which no conversion is defined"
                )
            told: Axes = {"YXS": "hwc", "SYX": "chw", "CYX": "chw"}.get(page.axes)  # type: ignore[assignment]
            return tuple(page.shape), str(page.dtype), options.axes or told
    except (BadImageError, UserError, MemoryError):
        raise
    except Exception as error:  # readers raise anything at all on a stranger's bytes
        raise BadImageError(f"cannot be read: {_first_line(error)}") from error


def _read_numpy(data: bytes) -> Values:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadImageError(f"cannot be read: {_first_line(error)}") from error


def _read_tiff(data: bytes) -> Values:
    try:
        with _tiff().TiffFile(io.BytesIO(data)) as tiff:
            return np.asarray(tiff.series[0].asarray(maxworkers=1))
    except (BadImageError, UserError, MemoryError):
        raise
    except Exception as error:
        # tifffile leaves compression to it, or to modules that not every Python has.
        if isinstance(error, ImportError) or "requires the 'imagecodecs' package" in str(error):
            raise _missing("imagecodecs") from None
        raise BadImageError(f"cannot be decoded: {_first_line(error)}") from error


def _tiff() -> Any:
    try:
        import tifffile
    except ImportError:
        raise _missing("tifffile") from None
    return tifffile


def _missing(package: str) -> UserError:
    """That is no fault of the file, which may be read as soon as the package is there."""
    return UserError(f"data_source: there are TIFF files, for which {package} is missing: pip install 'sslkit[tiff]'")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
