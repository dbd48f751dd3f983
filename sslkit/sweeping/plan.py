"""Which runs a sweep consists of, and the file that remembers it: `sweep.json`."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, ValidationError

from sslkit.diff import differences
from sslkit.errors import RunFailed, UserError
from sslkit.files import in_one_piece
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.rules import is_number
from sslkit.run_directory import read_json, refuse_strays

NOTE = "sweep.json"
LONGEST = 100
"""Letters of a folder's name; file systems allow 255."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")

Values = Mapping[str, str]
"""Options by key, as `--set` takes them."""


# ---------------------------------------------------------------- what was asked for


def read_grid(options: Sequence[str]) -> dict[str, list[str]]:
    """`KEY=V1,V2` each, as the values of every key. Commas inside brackets, braces and quotes belong to a value.

    Raises:
        UserError: one line for each that cannot be read, or names a key or a value twice.
    """
    grid: dict[str, list[str]] = {}
    problems = []
    for option in options:
        key, equals, text = option.partition("=")
        key, values = key.strip(), [plain(value) for value in split(text)]
        if not equals or not key or not all(values):
            problems.append(f"--grid {option}: should read KEY=V1,V2, such as optimizer.lr=0.03,0.06")
        elif key in grid:
            problems.append(f"--grid {option}: {key} has a --grid already; give all its values in one")
        elif twice := next((value for value in values if values.count(value) > 1), None):
            problems.append(f"--grid {option}: {twice} is given twice")
        grid[key] = values
    if problems:
        raise UserError(*problems)
    return grid


def check_keys(keys: Sequence[str], overrides: Sequence[str], option: str) -> None:
    """Refuse keys that something else decides.

    Raises:
        UserError: for each such key.
    """
    held = {override.partition("=")[0].strip() for override in overrides}
    problems = [f"{option} {key}: is given by --set as well; leave one of them out" for key in keys if key in held]
    if "seed" in {*keys, *held}:
        given = "--set" if "seed" in held else option
        problems.append(f"{given} seed: the seeds of a sweep are the recipe's and those after it; use --seeds")
    if problems:
        raise UserError(*problems)


def split(text: str) -> list[str]:
    """A text at its commas, but for those inside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        parts[-1] += letter
    return [part.strip() for part in parts]


def plain(value: str) -> str:
    """A number in its one spelling, so that `.03`, which TOML does not know, and `3e-2` are `0.03`."""
    if not _NUMBER.fullmatch(value):
        return value
    return str(int(value)) if re.fullmatch(r"[+-]?\d+", value) else repr(float(value))


def combinations(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations, the last key changing fastest; one without values for no keys."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def settings(overrides: Sequence[str], values: Values, seed: int) -> tuple[str, ...]:
    """What `--set` says of one run."""
    return (*overrides, *(f"{key}={value}" for key, value in values.items()), f"seed={seed}")


def check_all(recipe: str, overrides: Sequence[str], asked: Sequence[Values]) -> Recipe:
    """Read the recipe of every combination; the first one.

    Raises:
        UserError: each mistake once, or two combinations that are the same recipe.
    """
    problems: dict[str, None] = {}
    seen: dict[str, Values] = {}
    first = None
    for values in asked:
        try:
            made = read_recipe(recipe, [*overrides, *(f"{key}={value}" for key, value in values.items())])
        except UserError as error:
            problems |= dict.fromkeys(error.lines)
            continue
        first, text = first or made, made.to_toml()
        if text in seen:
            problems[f"--grid: {_words(seen[text])} and {_words(values)} are the same recipe; leave one out"] = None
        seen[text] = values
    if problems or first is None:
        raise UserError(*problems)
    return first


def constants(recipe: str, overrides: Sequence[str], asked: Sequence[Values]) -> list[str]:
    """A line for each key whose component in the recipe, as a schedule, the numbers asked for take the place of.

    Raises:
        UserError: the recipe cannot be read.
    """
    tables = tomllib.loads(read_recipe(recipe, overrides).to_toml())
    lines = []
    for key in asked[0]:
        if not any(_NUMBER.fullmatch(values[key]) for values in asked):
            continue
        found: Any = tables
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, dict) and isinstance(found.get("use"), str):
            numbers = [name for name, value in found.items() if is_number(value)]
            ways = f"; its own numbers are {', '.join(f'{key}.{name}' for name in numbers)}" if numbers else ""
            lines.append(f"{key}: is one number throughout each run, without the recipe's {found['use']}{ways}")
    return lines


def _words(values: Values) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


# ---------------------------------------------------------------- directories


def folder_name(values: Values, taken: Sequence[str]) -> str:
    """A folder for a combination: `lr=0.03,temperature=0.1`, with a number behind it where that is taken.

    Of a key as much is kept as tells it from the others; of a value, what every file system takes.
    """
    short = {key: _short(key, list(values)) for key in values}
    parts = (f"{short[key]}={re.sub(r'[^A-Za-z0-9._+-]+', '-', value).strip('-')}" for key, value in values.items())
    name = (",".join(parts)[:LONGEST] or "all").rstrip(".")
    known = {other.lower() for other in taken}  # some file systems do not tell large letters from small ones
    number, chosen = 2, name
    while chosen.lower() in known:
        chosen, number = f"{name}-{number}", number + 1
    return chosen


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = parts[-length:]
        if sum(other.split(".")[-length:] == end for other in keys) == 1 and end[0] != "use":
            return ".".join(end)
    return key


# ---------------------------------------------------------------- the note


def _within(name: str) -> str:
    """A folder's name, and not a way to another place, as a file of a stranger might have it."""
    if name in ("", "..") or any(kind(name).name != name for kind in (PurePosixPath, PureWindowsPath)):
        raise ValueError("should be the name of a folder")
    return name


class Trial(BaseModel):
    """What `sweep.json` says of a trial of a search."""

    model_config = ConfigDict(extra="forbid", strict=True)

    values: dict[str, str]
    figures: dict[str, FiniteFloat | None]
    """By seed; None for a run that failed."""
    value: FiniteFloat | None = None
    """What came of the trial, once it is over."""
    problem: str | None = None


class Looked(BaseModel):
    """What `sweep.json` says of a search."""

    model_config = ConfigDict(extra="forbid", strict=True)

    spaces: dict[str, str]
    by: str
    seeds: int
    steps: int | None
    trials: list[Trial]


class Written(BaseModel):
    """What `sweep.json` holds, which a stranger may have written."""

    model_config = ConfigDict(extra="forbid", strict=True)

    recipe: str
    example: dict[str, str]
    keys: list[str]
    folders: dict[Annotated[str, AfterValidator(_within)], dict[str, str]]
    search: Looked | None = None


@dataclass
class Note:
    """`sweep.json`: what the folder's runs are of. Written before any of them begins."""

    path: Path
    recipe: str
    """The recipe of one run with every option spelt out, by which another recipe is told."""
    example: dict[str, str]
    """The values of the keys that it was read with."""
    keys: list[str]
    folders: dict[str, dict[str, str]]
    """The values of each combination, by its folder's name."""
    search: dict[str, Any] | None = None

    def write(self) -> None:
        """Write it in one piece.

        Raises:
            RunFailed: the disk is full, or the folder is gone.
        """
        known = {name: value for name, value in vars(self).items() if name != "path" and value is not None}
        try:
            with in_one_piece(self.path) as staging:
                staging.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunFailed(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def folder_of(self, values: Values) -> str:
        """The folder of a combination, a new one if it has none."""
        known = next((name for name, other in self.folders.items() if other == values), None)
        if known is None:
            known = folder_name(values, list(self.folders))
            self.folders[known] = dict(values)
        return known


def noted(folder: Path, recipe: str, overrides: Sequence[str], keys: Sequence[str], example: Values) -> Note:
    """The note of a folder, or a new one where there is none.

    Raises:
        UserError: the folder holds something else, or runs of another recipe or of other keys.
    """
    path = folder / NOTE
    made = read_recipe(recipe, settings(overrides, example, 0))
    if not path.is_file():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; choose another --dir")
        if folder.is_dir() and any(folder.glob("**/recipe.lock.toml")):
            raise UserError(f"{folder}: holds runs and no {NOTE}, so it is no sweep's; choose another --dir")
        return Note(path, made.to_toml(), dict(example), list(keys), {})
    refuse_strays(folder)
    try:
        note = Note(path=path, **Written.model_validate(read_json(path)).model_dump(exclude_unset=True))
        before = parse_recipe(note.recipe, str(path))
        again = read_recipe(recipe, settings(overrides, note.example, before.seed))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: cannot be read ({where}: {first['msg']}); choose another --dir") from None
    except UserError as error:
        raise UserError(f"{path}: its sweep does not fit this recipe; choose another --dir",
                        *(f"  {line}" for line in error.lines)) from None  # fmt: skip
    if set(note.keys) != set(keys):
        raise UserError(f"{folder}: holds a sweep over {', '.join(note.keys) or 'seeds alone'}, and this one is over "
                        f"{', '.join(keys) or 'seeds alone'}; choose another --dir")  # fmt: skip
    if changes := differences(before, again):
        raise UserError(f"{folder}: holds a sweep of another recipe; choose another --dir, or undo:",
                        *(f"  {change}" for change in changes))  # fmt: skip
    return note
