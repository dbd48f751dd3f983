"""The runs below a folder, a line each. Reads files only; no torch."""

from __future__ import annotations

from typing import Any


def show(folder: str, **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_many`."""
    raise NotImplementedError
