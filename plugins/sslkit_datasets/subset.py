"""Part of a data source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, overload

import torch
from torch import Tensor

from sslkit.api import DataInfo, Images, ImageSet, Ordered, Originals
from sslkit.errors import UserError
from sslkit_datasets.images import Opened

if TYPE_CHECKING:
    from sslkit_datasets import Subset


class Part:
    """The images of `whole` at ascending `rows` (`sslkit.api.Originals`)."""

    def __init__(self, whole: Images, rows: Tensor) -> None:
        self.whole, self.rows = whole, rows
        self.labels = None if whole.labels is None else whole.labels[rows]
        self.tensor = None if whole.tensor is None else whole.tensor[rows]
        self.workers: int | None = getattr(whole, "workers", None)
        sizes: Tensor | None = getattr(whole, "sizes", None)
        self.sizes = None if sizes is None else sizes[rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def files(self) -> Sequence[object] | None:
        """What each image is called, where that is known."""
        files = getattr(self.whole, "files", None)
        return None if files is None else Chosen(files, self.rows)

    def read(self, indices: Tensor) -> Tensor:
        """As `Images.read`."""
        return self.whole.read(self.rows[indices])

    def original(self, index: int) -> Tensor:
        """As `Originals.original`."""
        return cast("Originals", self.whole).original(int(self.rows[index]))


class OrderedPart(Part):
    """Some of a set's images that are cheap to read in some orders only (`sslkit.api.Ordered`)."""

    def order(self, generator: torch.Generator) -> Tensor:
        """As `Ordered.order`: that of all images, without those that are left out."""
        return self._positions(cast("Ordered", self.whole).order(generator))

    def sample(self, n: int) -> Tensor:
        """As `Ordered.sample`. More of the whole are asked for, since some of them are left out."""
        share = len(self.rows) / len(self.whole)
        chosen = self._positions(cast("Ordered", self.whole).sample(int(n / share)))
        return (
            chosen[torch.linspace(0, len(chosen) - 1, min(n, len(chosen))).round().long()]
            if len(chosen)
            else (torch.arange(min(n, len(self))))
        )

    def _positions(self, whole: Tensor) -> Tensor:
        number = torch.full((len(self.whole),), -1)
        number[self.rows] = torch.arange(len(self.rows))
        found = number[whole]
        return found[found >= 0]


class Chosen(Sequence[object]):
    """Some of a sequence's entries, looked up when they are asked for."""

    def __init__(self, whole: Sequence[object], rows: Tensor) -> None:
        self.whole, self.rows = whole, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> object: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[object]: ...
    def __getitem__(self, index: int | slice) -> object:
        if isinstance(index, slice):
            return Chosen(self.whole, self.rows[index])
        return self.whole[int(self.rows[index])]


def draw(options: Subset, info: DataInfo) -> ImageSet:
    """Open the source and keep some of its training images.

    Raises:
        UserError: it has fewer.
    """
    opened = options.of.build(info)
    whole, count = opened.train, options.images
    if count > len(whole):
        raise UserError(
            f"data_source.images: is {count}, but there are only {len(whole)} training images; make it smaller"
        )
    generator = torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(whole), generator=generator)[:count].sort().values
    part = (OrderedPart if hasattr(whole, "order") else Part)(whole, rows)
    chosen = hashlib.sha256(f"{opened.fingerprint} {rows.tolist()}".encode()).hexdigest()
    return Opened(part, opened.test, opened.class_names, chosen, opened.bad)
