"""What a run's features are worth: named protocols, with the figures of a random network beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def command(runs: Sequence[str], **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_use`."""
    raise NotImplementedError
