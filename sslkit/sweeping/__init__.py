"""Several runs of one recipe: a grid of its options, or a search among them."""

from __future__ import annotations

from typing import Any


def command(recipe: str, **how: Any) -> int:
    """What the command does; its options are in `sslkit.cli_many`."""
    raise NotImplementedError
