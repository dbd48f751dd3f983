"""Choices as the text of a recipe, in which each line says why."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import tomli_w

from sslkit.errors import printable
from sslkit.suggesting.lines import Choice, Choices

WIDTH = 120
COLUMN = 30
"""Where comments stand beside what they are about."""


def written(made: Choices, head: str) -> str:
    """The choices as TOML, under a comment."""
    lines = [f"# {line}" for line in textwrap.wrap(printable(head), WIDTH - 2)]
    table = ""
    for choice in made.lines:
        path, _, key = choice.key.rpartition(".")
        if path != table:
            table = path
            name, _, number = path.partition(".")
            lines += ["", f"[[{name}]]" if number else f"[{name}]"]
        lines += _line(key, choice)
    return "\n".join(lines) + "\n"


def _line(key: str, choice: Choice) -> list[str]:
    text, why = f"{key} = {_value(choice.value)}", printable(choice.why)
    beside = f"{text:{COLUMN - 1}} # {why}"
    if "\n" not in text and len(beside) <= WIDTH:
        return [beside]
    return [f"# {line}" for line in textwrap.wrap(why, WIDTH - 2)] + text.split("\n")


def _value(value: Any) -> str:
    """A value in one line, but for a list of tables."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], Mapping):
            return "[\n" + "".join(f"    {_value(inner)},\n" for inner in value) + "]"
        return "[" + ", ".join(map(_value, value)) + "]"
    return tomli_w.dumps({"v": value}).partition("=")[2].strip()
