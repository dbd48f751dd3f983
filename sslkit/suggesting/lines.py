"""The lines of a recipe, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A line of the recipe."""

    key: str
    """`train.epochs`, `observers.0.k`."""
    value: Any
    why: str


@dataclass
class Choices:
    """The lines in their order, and what is to be told beside them."""

    lines: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    epochs: int = 1
    affordable: float = 1.0
    """Epochs that the hours have, before they are rounded or bounded."""

    def add(self, key: str, value: Any, why: str) -> None:
        self.lines.append(Choice(key, value, why))

    def value(self, key: str) -> Any:
        """What was chosen; None where nothing was."""
        return next((line.value for line in self.lines if line.key == key), None)

    def tables(self) -> dict[str, Any]:
        """The recipe as TOML would read it."""
        made: dict[str, Any] = {}
        for line in self.lines:
            *path, last = line.key.split(".")
            at: Any = made
            for name, following in zip(path, [*path, last][1:], strict=True):
                if isinstance(at, list):
                    at += [{}] * (int(name) + 1 - len(at))
                    at = at[int(name)]
                else:
                    at = at.setdefault(name, [] if following.isdigit() else {})
            at[last] = line.value
        return made


def power_of_two(number: float) -> int:
    """The largest that is not above it, and 1 at least."""
    return 1 << max(0, math.floor(math.log2(max(1, number))))
