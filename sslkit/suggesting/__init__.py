"""From a folder of images to a recipe that fits them and this machine."""

from __future__ import annotations

from typing import Any


def init(folder: str, **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_use`."""
    raise NotImplementedError
