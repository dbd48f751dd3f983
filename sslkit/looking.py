"""What a data source knows of image files beside the sets it opens. No torch.

The facts that `sslkit init` chooses by, and how one file is read that is in no set, as `embed` and `search` need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sslkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class FileReader(Protocol):
    """Reads single image files as a data source reads those of its sets."""

    @property
    def suffixes(self) -> tuple[tuple[str, ...], ...]:
        """Of the files that it reads, in small letters and with the dot. Where a folder holds files of the first group,
        those of the others are not read: an array beside pictures is hardly a picture."""
        ...

    def read(self, file: Path) -> tuple[Tensor, str]:
        """An image, uint8 `[C, S, S]` as the source's `read` gives it, and the SHA-256 of its file in hex. Called from
        several threads.

        Raises:
            Unreadable: it cannot be read.
            UserError: something is missing to read such files at all, as a package.
        """
        ...


class Unreadable(UserError):
    """A file that cannot be read; the text completes the sentence "this file ..."."""


class Unclassed(UserError):
    """Images lie beside folders of images, so that folders are no classes."""

    def __init__(self, line: str, folder: Path, what: str) -> None:
        super().__init__(line)
        self.folder = folder
        """Where they lie."""
        self.what = what
        """`1 image lies beside 3 folders, as loose.png`."""


@dataclass(frozen=True)
class Look:
    """Facts about a set of images, before anything is trained on it. Paths are seen from the folder looked at."""

    files: int
    """Image files of the training set."""
    test_files: int
    """Image files of the test set; 0 where there is none."""
    looked_at: int
    """How many files, of both sets, were decoded."""
    bytes: int
    """Of all files."""
    unreadable: Sequence[Mapping[str, str]]
    """`path` and `problem` of each of the decoded ones that is broken."""
    heights: Sequence[int]
    """In pixels, upright, of each that was decoded."""
    widths: Sequence[int]
    modes: Mapping[str, int]
    """How many there are of each kind: `RGB`, `grey`, `RGBA`, `palette`, `CMYK`, `16-bit grey`, `8 bands uint16`."""
    channels: int
    """What the kinds have in common: of pictures 1 where all are grey and 3 for colours, else the number of bands."""
    classes: Mapping[str, int] | None
    """Training images of each class; None where folders suggest none."""
    test_classes: Mapping[str, int] | None
    duplicates: Sequence[Sequence[str]]
    """Groups of training files with the same bytes."""
    in_both: Sequence[Sequence[str]]
    """Groups of files with the same bytes that lie in both sets."""
    value_range: tuple[float, float] | None
    """The .1 and 99.9 percentile of values that are not 8-bit; None where all are."""
    seconds_per_image: float
    """What reading and decoding one took, in one thread."""
