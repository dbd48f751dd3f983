"""How the bytes of an image become pixels, as one value that goes wherever images are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import BinaryIO, Literal, Protocol

from sslkit_datasets.arrays import PLAIN, Arrays, is_array, shape_of
from sslkit_datasets.decode import Pixels, decode
from sslkit_datasets.headers import sides

HEAD = 2**16
"""Bytes of a file that tell it from another where only headers are read."""


@dataclass(frozen=True)
class Preparation:
    """The options of a data source that decide what an image is."""

    channels: int = 3
    size: int | None = None
    """Side of the squares; None keeps each image's own sides."""
    original: bool = False
    """Whether images are wanted as they lie in their files, and as squares for measurement alone."""
    headers: bool = False
    """Whether the pass over all images reads their headers only."""
    arrays: Arrays = PLAIN
    """What is done with bands and with values of more than 8 bits."""

    def square(self, data: bytes) -> Pixels:
        """The image as a square of `size`, uint8 `[C, S, S]`.

        Raises:
            BadImageError: as `decode`.
        """
        return decode(data, self.channels, self.size, self.arrays)

    def whole(self, data: bytes) -> Pixels:
        """The image with its own sides, uint8 `[C, h, w]`.

        Raises:
            BadImageError: as `decode`.
        """
        return decode(data, self.channels, None, self.arrays)

    def sides(self, file: BinaryIO) -> tuple[int, int]:
        """Height and width of what `whole` gives, from the header.

        Raises:
            BadImageError: as `headers.sides` and `arrays.shape_of`.
        """
        array = is_array(file.read(8))
        file.seek(0)
        if array:
            return shape_of(file, self.channels, self.arrays)
        return sides(file)

    def facts(self) -> dict[str, object]:
        """What enters fingerprints. What is not set stays out of it, so that runs of before these options go on."""
        chosen: dict[str, object] = {"original": self.original, "headers": self.headers, **vars(self.arrays)}
        return {"size": self.size, "channels": self.channels, **{key: value for key, value in chosen.items() if value}}

    def decoders(self) -> dict[str, object]:
        """Versions of what decodes: together with `facts`, whatever decides which files can be decoded."""
        return {name: _version(name) for name in ("pillow", "numpy", "tifffile", "imagecodecs")}

    def digest(self, data: bytes) -> bytes:
        """SHA-256 of a file; of its length and first bytes where only headers are read."""
        return digest_of_head(len(data), data[:HEAD]) if self.headers else hashlib.sha256(data).digest()


class _Options(Protocol):
    @property
    def bands(self) -> tuple[int, ...] | None: ...
    @property
    def value_range(self) -> tuple[float, float] | None: ...
    @property
    def axes(self) -> Literal["hwc", "chw"] | None: ...


def arrays_of(options: _Options) -> Arrays:
    """What a data source's options say of bands and values."""
    return Arrays(options.bands, options.value_range, options.axes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def digest_of_head(length: int, head: bytes) -> bytes:
    """What tells files apart that were not read in full."""
    return hashlib.sha256(b"%d " % length + head).digest()
