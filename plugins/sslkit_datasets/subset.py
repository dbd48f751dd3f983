"""Part of a data source."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.api import DataInfo, Images, ImageSet
from sslkit.errors import UserError
from sslkit_datasets.images import Opened

if TYPE_CHECKING:
    from sslkit_datasets import Subset


@dataclass
class Part:
    """The images of `whole` at `rows` (`sslkit.api.Images`)."""

    whole: Images
    rows: Tensor
    labels: Tensor | None
    tensor: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Tensor) -> Tensor:
        """As `Images.read`."""
        return self.whole.read(self.rows[indices])


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
    part = Part(
        whole, rows,
        labels=None if whole.labels is None else whole.labels[rows],
        tensor=None if whole.tensor is None else whole.tensor[rows],
    )  # fmt: skip
    chosen = hashlib.sha256(f"{opened.fingerprint} {rows.tolist()}".encode()).hexdigest()
    return Opened(part, opened.test, opened.class_names, chosen, opened.bad)
