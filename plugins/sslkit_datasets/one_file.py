"""One image file at a time, read as the folder's are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sslkit.looking import Unreadable
from sslkit_datasets.bad import TOO_MUCH, BadImageError
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
            raise Unreadable(str(error)) from error
        except MemoryError:
            raise Unreadable(TOO_MUCH) from None
