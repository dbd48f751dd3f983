"""Features of a folder's images, with their paths, in a Parquet file. Resumable."""

from __future__ import annotations

from typing import Any


def command(run: str, folder: str, **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_use`."""
    raise NotImplementedError
