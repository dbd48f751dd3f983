"""A run's encoder for use without sslkit."""

from __future__ import annotations

from typing import Any


def command(run: str, **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_use`."""
    raise NotImplementedError
