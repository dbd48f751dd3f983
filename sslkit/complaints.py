"""A validation error -> lines that name the file, the line, the key, what was wrong and the nearest right name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from sslkit import local, registry
from sslkit.api import Component
from sslkit.errors import UserError, did_you_mean
from sslkit.positions import Path

MOST = 50
"""Mistakes that are told; a file with more of them is no recipe, or its first ones are the reason for the others."""


def lines(
    error: ValidationError, tables: dict[str, Any], where: Callable[[Path], str], top: type[BaseModel]
) -> list[str]:
    """One line per mistake, in the order of the file: `recipe.toml:7: loss.invarience: unknown option; ...`."""
    found = []
    # What was written wrongly before what is missing, which it may be the reason for.
    mistakes = sorted(error.errors(include_url=False), key=lambda m: bool(m["type"] == "missing"))
    for mistake in mistakes[:MOST]:
        path = _known(mistake["loc"], tables)
        if option := mistake.get("ctx", {}).get("option"):  # said of a table, but one of its options is to blame
            path = (*path, option)
        if use := _misspelt_use(mistake):
            path = (*path, use)
        dotted = _short(".".join(str(piece) for piece in path)) or "recipe"
        found.append((where(path), f"{dotted}: {_problem(mistake, path, tables, top)}"))
    unique = dict.fromkeys(found)
    told = [f"{place}: {text}" for place, text in sorted(unique, key=lambda item: _order(item[0]))]
    return told if len(mistakes) <= MOST else [*told, f"and {len(mistakes) - MOST} more mistakes"]


def not_installed(tables: dict[str, Any], top: type[BaseModel]) -> list[str]:
    """The components of a recipe's slots that no installed package offers: `loss 'vicreg'`."""
    found = []
    for slot, value in tables.items():
        model = _inner_model(top, slot) if slot in top.model_fields else None
        for table in value if isinstance(value, list) else (value,):
            use = table.get("use") if isinstance(table, dict) else None
            if model is None or not issubclass(model, Component) or not isinstance(use, str) or local.split(use):
                continue
            if use not in registry.names(model.kind):
                found.append(f"{model.kind} {use!r}")
    return found


def _problem(mistake: Any, path: Path, tables: dict[str, Any], top: type[BaseModel]) -> str:
    kind, context, given = mistake["type"], mistake.get("ctx", {}), mistake["input"]
    if kind == "extra_forbidden":
        valid = _options(path[:-1], tables, top)
        there = _table(path[:-1], tables)
        near = did_you_mean(str(path[-1]), sorted(valid, key=lambda name: name in there))  # not what is there already
        return f"unknown option{near or '; known here: ' + (', '.join(valid) or 'none')}"
    if _misspelt_use(mistake):
        return f"unknown option; did you mean 'use'? The table {_text(mistake)}"
    if kind == "missing" and isinstance(given, list):
        return f"should have more elements, not {_shown(given)}"
    if kind == "missing":
        what = "table" if len(path) == 1 and path[0] not in ("name", "seed") else "option"
        return f"this {what} is required and missing"
    if kind == "literal_error":
        near = did_you_mean(given, re.findall("'([^']*)'", context["expected"])) if isinstance(given, str) else ""
        return f"should be {context['expected']}, not {_shown(given)}{near}"
    if kind == "string_pattern_mismatch" and path == ("name",):
        return f"should be letters, digits, dots, dashes and underscores, not {_shown(given)}"
    text = _text(mistake)
    if kind in ("slot", "component", "scheduled"):
        return text if kind == "component" or isinstance(given, dict) else f"{text}, not {_shown(given)}"
    about_one_value = not isinstance(given, dict)  # what is said of a table as a whole names its values itself
    return f"{text[:1].lower()}{text[1:]}" + (f", not {_shown(given)}" if about_one_value else "")


def _text(mistake: Any) -> str:
    text: str = mistake["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return text.replace("a valid array", "a list").replace("an object", "a table")  # TOML's words, not JSON's


def _misspelt_use(mistake: Any) -> str | None:
    """The key of a component's table that is near to `use`, which the table lacks."""
    given = mistake["input"]
    if mistake["type"] not in ("slot", "scheduled") or not isinstance(given, dict) or "use" in given:
        return None
    return next((key for key in given if did_you_mean(key, ["use"])), None)


def _table(path: Path, tables: Any) -> Any:
    """The table that stands at `path`; an empty one if none does."""
    for piece in path:
        try:
            tables = tables[piece]
        except (KeyError, IndexError, TypeError):
            return {}
    return tables


def _options(path: Path, tables: dict[str, Any], top: type[BaseModel]) -> list[str]:
    """The options that the table at `path` may hold."""
    model: type[BaseModel] | None = top
    table: Any = tables
    for piece in path:
        try:
            table = table[piece]
        except (KeyError, IndexError, TypeError):
            return []
        if model is not None and isinstance(piece, str):
            model = _inner_model(model, piece)
        if model is not None and issubclass(model, Component) and isinstance(table, dict) and "use" in table:
            try:
                model = registry.load(model.kind, table["use"])
            except UserError:
                return []
    if model is None:
        return []
    extra = ["extends"] if model is top else ["use"] if issubclass(model, Component) else []
    return [*model.model_fields, *extra]


def _inner_model(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The tables that an option takes, alone or in a list: `Schedule` for `lr`, `Observer` for `observers`."""
    if name not in model.model_fields:
        return model  # a key of a mapping, such as a parameter group: its values have the mapping's model
    todo = [model.model_fields[name].annotation]
    while todo:
        annotation = todo.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        todo += getattr(annotation, "__args__", ())
    return None


def _known(path: Path, tables: Any) -> Path:
    """Drop what pydantic adds to a path (names of union members), but keep a last key that is missing."""
    kept: list[str | int] = []
    for position, piece in enumerate(path):
        inside = (isinstance(tables, dict) and piece in tables) or (
            isinstance(tables, list) and isinstance(piece, int) and piece < len(tables)
        )
        if inside:
            tables = tables[piece]
            kept.append(piece)
        elif position == len(path) - 1 and isinstance(tables, dict) and piece != "[key]":
            kept.append(piece)
    return tuple(kept)


def _shown(value: object) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _order(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (place, 0)
