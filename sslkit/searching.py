"""The images of a folder that are nearest to some images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def command(run: str, queries: Sequence[str], folder: str, **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_use`."""
    raise NotImplementedError
