"""What a data source knows of image files beside the sets it opens. No torch.

The facts that `sslkit init` chooses by, and how one file is read that is in no set, as `embed` and `search` need it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from sslkit.errors import UserError, printable

if TYPE_CHECKING:
    from torch import Tensor


PACKED = {".parquet": "data_source.parquet", ".tar": "data_source.webdataset"}
"""Files of many images each, by what reads them."""


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


def other_kinds(where: str, kinds: Sequence[Collection[str]]) -> str | None:
    """What is to be said of image files that are left out of a folder because others lie there.

    Args:
        where: The folder, as it is called in messages.
        kinds: Names of files, for each group of a `FileReader`'s suffixes. The first group that has any is read.

    Raises:
        UserError: fewer would be read than left out, as where one picture lies among a folder's arrays.
    """
    few, *others = [names for names in kinds if names] or [()]
    left = [name for names in others for name in names]
    if not left:
        return None
    if len(few) < len(left):
        raise UserError(
            f"{where}: {_files(few)} lie{'s' * (len(few) == 1)} among {_files(left)}; of a folder either pictures are "
            f"read or TIFF and NumPy files: move {'it' if len(few) == 1 else 'the fewer ones'} out of the folder"
        )
    return (
        f"{where}: left out {_files(left)}, which are read only where no pictures lie: put them into a folder of their "
        "own to have them"
    )


def _files(names: Collection[str]) -> str:
    """`60 .tif files (a.tif, b.tif, c.tif, ...)`."""
    ends = ", ".join(end for end, _ in _ends(names).most_common())
    some = ", ".join(nsmallest(3, names)) + (", ..." if len(names) > 3 else "")
    return f"{len(names):,} {ends} file{'s' * (len(names) > 1)} ({printable(some)})"


def _ends(names: Iterable[str]) -> Counter[str]:
    return Counter(PurePosixPath(name.lower()).suffix for name in names)


def packed(names: Iterable[str]) -> str:
    """What to add where a folder has no image files, and files of many images each instead; empty where not."""
    ends = _ends(names)
    return "".join(
        f"; it holds {ends[end]:,} {end} file{'s' * (ends[end] > 1)}, which a recipe's {use} trains on "
        "(docs/how-to/large-datasets.md)"
        for end, use in PACKED.items()
        if ends[end]
    )
