"""Files that no reader ever sees half of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def in_one_piece(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it takes the place of `path` when the block ends, or is removed if it fails."""
    staging = path.with_name(f".{path.name}.tmp")
    try:
        if staging.is_symlink():  # left in a stranger's folder, it would be written through
            staging.unlink()
        yield staging
        with staging.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut may leave the name with nothing in it
        staging.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise
