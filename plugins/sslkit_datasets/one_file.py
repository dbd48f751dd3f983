"""One image file at a time, read as the folder's are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sslkit.errors import UserError
from sslkit_datasets.bad import BadImageError
from sslkit_datasets.folder import ARRAYS, SUFFIXES
from sslkit_datasets.images import load
from sslkit_datasets.preparing import Preparation


@dataclass(frozen=True)
class Reader:
    """Decodes single files (`sslkit.api.FileReader`)."""

    prepared: Preparation
    suffixes: tuple[tuple[str, ...], ...] = (SUFFIXES, ARRAYS)

    def read(self, file: Path) -> tuple[Tensor, str]:
        """As `FileReader.read`."""
        try:
            data = load(file)
            return torch.from_numpy(self.prepared.square(data)), hashlib.sha256(data).hexdigest()
        except BadImageError as error:
            raise UserError(str(error)) from error
