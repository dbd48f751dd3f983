"""The text of a recipe, before it has types: found, laid over the recipe that it extends, changed by `--set`.

Every key remembers where it was written, so that errors point there whichever file that was.
"""

from __future__ import annotations

import datetime
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslkit import local, starting_point
from sslkit.errors import UserError, did_you_mean
from sslkit.positions import Path as Keys
from sslkit.positions import lines_of

MAX_BYTES = 2**18
"""What is larger is no recipe but something else that was named by mistake."""
MAX_DEPTH = 32
"""Tables and lists inside one another; a component in a component takes two."""
_MOST_PARTS = 100
# tomllib's time grows with the square of the parts of a key.
_DEEP_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{_MOST_PARTS}}}""")
_BARE_POINT = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")
MAX_BASES = 16
"""Recipes that extend one another in a row."""


@dataclass
class Origin:
    """Where each key of a recipe was written: `recipe.toml:7`, or `--set key=value`."""

    file: str
    own: dict[Keys, str] = field(default_factory=dict)
    """Keys in the file itself and in `--set`."""
    inherited: dict[Keys, str] = field(default_factory=dict)
    """Keys that came from the recipe that the file extends."""
    replaced: set[Keys] = field(default_factory=set)
    """Keys of that recipe in whose place the file has something else."""

    def of(self, keys: Keys) -> str:
        """The place of a key. What is nowhere is missing from the file itself: the nearest key above it there."""
        if keys in self.inherited and keys not in self.own:
            return self.inherited[keys]
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.own:
                return self.own[keys[:length]]
        return f"{self.file}:1"


def _forget(places: dict[Keys, str], keys: Keys) -> None:
    """Drop a key and what lies below it, since something else takes their place."""
    for below in [k for k in places if k[: len(keys)] == keys]:
        del places[below]


# ---------------------------------------------------------------- finding


def shipped() -> dict[str, Path]:
    """The recipes that come with sslkit, by name."""
    here = Path(__file__).parent
    installed, checkout = here / "recipes", here.parent / "recipes"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def is_path(recipe: str) -> bool:
    """Whether a text is a recipe's path, which holds `/` or ends in `.toml`, and not the name of a shipped recipe."""
    return "/" in recipe or "\\" in recipe or recipe.endswith(".toml")


def locate(recipe: str, folder: Path | None = None) -> Path:
    """A recipe's file, by its path (seen from `folder`, if given) or by the name of a shipped recipe.

    Raises:
        UserError: there is no such file or shipped recipe, or it is a folder, a pipe or a device.
    """
    known = shipped()
    if is_path(recipe):
        path = (folder or Path()) / recipe
        if mode := _mode(path):
            _refuse_other_kinds(path, mode)
            return path
        near = did_you_mean(path.stem, known)
        raise UserError(f"{path}: no such recipe file{near and near + ' (a shipped recipe, without .toml)'}")
    if recipe not in known:
        raise UserError(
            f"{recipe}: no shipped recipe has this name{did_you_mean(recipe, known)} ({', '.join(known)}); "
            "a file's path ends in .toml"
        )
    return known[recipe]


def _mode(path: Path) -> int:
    """What kind of file it is, as `stat` has it; 0 where there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # no leave, too long, links in a circle; a name with a zero byte
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder; give a recipe file in it")
    if not stat.S_ISREG(mode):  # a pipe would be waited for, and a device may have no end
        raise UserError(f"{path}: is a pipe, a socket or a device; a recipe is a regular file")


def read(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        UserError: it cannot be read, or is not UTF-8, or too large to be a recipe.
    """
    _refuse_other_kinds(path, _mode(path) or stat.S_IFREG)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return decoded(data, str(path))


def decoded(data: bytes, file: str) -> str:
    """The text of a recipe; a byte order mark of UTF-8, which some editors write, is no part of it.

    Raises:
        UserError: it is not UTF-8, or too large to be a recipe.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{file}: is larger than {MAX_BYTES:,} bytes, so it is no recipe")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}: is UTF-16 text; a recipe is a TOML file in UTF-8, so save it as that")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: is not UTF-8 text (byte {error.start}); a recipe is a TOML file") from None


def place(source: str, overrides: Sequence[str], *keys: str | int) -> str:
    """`recipe.toml:7`, or the override, for the nearest key at or above the given ones."""
    path = locate(source)
    return resolve(read(path), str(path), overrides)[1].of(keys)


def renamed(text: str, name: str) -> str:
    """A recipe's text with another `name`; a recipe without one is named after its file, and stays as it is."""
    number = lines_of(text).get(("name",))
    if number is None:
        return text
    lines = text.split("\n")
    lines[number - 1] = re.sub(r"""=\s*("[^"]*"|'[^']*')""", f'= "{name}"', lines[number - 1], count=1)
    return "\n".join(lines)


def without_schema(text: str) -> str:
    """A recipe's text without the comment that names its JSON Schema, which is not beside a copy."""
    return re.sub(r"^#:schema .*\n", "", text, count=1, flags=re.MULTILINE)


# ---------------------------------------------------------------- extends


def resolve(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Origin]:
    """A recipe's tables with its bases below them and `--set` on top, and where each key was written.

    Raises:
        UserError: the text is not TOML, a base cannot be had, or an override cannot be read.
    """
    tables, origin = _extended(_parsed(text, file), text, file, [file])
    _override(tables, overrides, origin)
    return tables, origin


def _extended(tables: dict[str, Any], text: str, file: str, chain: list[str]) -> tuple[dict[str, Any], Origin]:
    origin = Origin(file, {keys: f"{file}:{line}" for keys, line in lines_of(text).items()})
    tables = starting_point.anchored(local.anchored(tables, Path(file).parent), Path(file).parent)
    if "extends" not in tables:
        return tables, origin
    extends = tables.pop("extends")
    try:
        if not isinstance(extends, str):
            raise UserError(f"should be the name of a shipped recipe or a path, not {extends!r}")
        if len(chain) > MAX_BASES:
            raise UserError(f"more than {MAX_BASES} recipes extend one another in a row")
        path = locate(extends, Path(file).parent)
        further = [*chain, str(path)]
        if path.resolve() in [Path(earlier).resolve() for earlier in chain]:
            raise UserError(f"goes round in a circle: {' -> '.join(further)}")
        below = read(path)
        parsed = _parsed(below, str(path))
    except UserError as error:
        raise UserError(*(f"{origin.of(('extends',))}: extends: {line}" for line in error.lines)) from None
    base, base_origin = _extended(parsed, below, str(path), further)
    origin.inherited = base_origin.inherited | base_origin.own
    base.pop("name", None)  # a name is one recipe's own: runs are kept under it
    _forget(origin.inherited, ("name",))
    merged = _laid_over(base, tables, origin)
    origin.inherited = {
        keys: where
        for keys, where in origin.inherited.items()
        if not any(keys[:length] in origin.replaced for length in range(1, len(keys) + 1))
    }
    return merged, origin


def _parsed(text: str, file: str) -> dict[str, Any]:
    if deep := _DEEP_KEY.search(text):
        line = text.count("\n", 0, deep.start()) + 1
        raise UserError(f"{file}:{line}: not valid: a key of more than {_MOST_PARTS} parts")
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(_syntax_error(file, error)) from None
    if unfit := _unfit(tables):
        keys, problem = unfit
        # A key inside too deep a nest is not looked for: that would take as many calls inside one another.
        place = f"{file}:{lines_of(text)[keys]}: {'.'.join(map(str, keys))}" if keys else f"{file}: not valid"
        raise UserError(f"{place}: {problem}")
    return tables


def _unfit(value: object) -> tuple[Keys, str] | None:
    """The first value that TOML allows and no option can take, by its keys, and what is wrong with it."""
    todo: list[tuple[Keys, object]] = [((), value)]
    while todo:
        keys, value = todo.pop()
        if isinstance(value, dict | list):
            if len(keys) >= MAX_DEPTH:
                return (), f"{keys[0]} is nested more than {MAX_DEPTH} levels deep"
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            todo += reversed([((*keys, key), below) for key, below in inner])
        elif isinstance(value, datetime.date | datetime.time):
            return keys, f'is a date or time, and no option takes one; quote it if it is text: "{value}"'
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return keys, "is an integer of more than 64 bits, which TOML does not have"
    return None


def _syntax_error(file: str, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"{file}: not valid TOML: nested too deeply"
    text = str(error)
    if match := re.search(r" \(at line (\d+), column (\d+)\)$", text):
        return f"{file}:{match[1]}: not valid TOML: {text[: match.start()]} (column {match[2]})"
    return f"{file}: not valid TOML: {text.removesuffix(' (at end of document)')}"


def _laid_over(base: Mapping[str, Any], tables: Mapping[str, Any], origin: Origin, at: Keys = ()) -> dict[str, Any]:
    """Tables are laid over tables, unless they name another component; whatever else is given replaces the base's."""
    merged = dict(base)
    for key, value in tables.items():
        keys, below = (*at, key), base.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and _use(value) in (None, _use(below)):
            merged[key] = _laid_over(below, value, origin, keys)
        elif keys == ("observers",) and isinstance(below, list) and isinstance(value, list):
            merged[key] = _observers(below, value, origin)
        elif keys == ("requires",) and isinstance(below, list) and isinstance(value, list):
            merged[key] = _joined(below, value, origin)
        else:
            merged[key] = value
            origin.replaced.add(keys)
    return merged


def _observers(base: Sequence[Any], tables: Sequence[Any], origin: Origin) -> list[Any]:
    """Each observer is laid over the base's of the same `use` (the second of a name over the second), or added."""
    merged = list(base)
    free: dict[object, list[int]] = {}
    for number in reversed(range(len(base))):
        if isinstance(use := _use(base[number]), str):
            free.setdefault(use, []).append(number)
    written: dict[int, dict[Keys, str]] = {}
    for keys in [keys for keys in origin.own if keys[0] == "observers" and len(keys) > 1]:
        written.setdefault(int(keys[1]), {})[keys[2:]] = origin.own.pop(keys)
    for number, table in enumerate(tables):
        use = _use(table)
        same = free.get(use) if isinstance(use, str) else None
        to = same.pop() if same else len(merged)
        if to < len(merged):
            merged[to] = _laid_over(base[to], table, origin, ("observers", to))
        else:
            merged.append(table)
        origin.own |= {("observers", to, *keys): where for keys, where in written.get(number, {}).items()}
    return merged


def _joined(base: Sequence[Any], further: Sequence[Any], origin: Origin) -> list[Any]:
    """What the base requires, and what the file does: either may need it."""
    written = {keys: where for keys, where in origin.own.items() if keys[0] == "requires" and len(keys) > 1}
    for keys in written:
        del origin.own[keys]
    origin.own |= {("requires", len(base) + int(keys[1])): where for keys, where in written.items()}
    return [*base, *further]


def _use(table: object) -> object:
    return table.get("use") if isinstance(table, dict) else None


# ---------------------------------------------------------------- --set


def _override(tables: dict[str, Any], overrides: Iterable[str], origin: Origin) -> None:
    """Apply `--set`: changed `use` first, the outermost before those inside, since it resets the rest of its table."""
    parsed = []
    for override in overrides:
        if override != override.encode("utf-8", "replace").decode():
            raise UserError(f"--set {override}: is not UTF-8 text")
        key, equals, raw = override.partition("=")
        keys = tuple(key.strip().split("."))
        if not equals or not all(keys):
            raise UserError(f"--set {override}: should read key=value, such as train.batch_size=64")
        if keys == ("extends",):
            raise UserError(f"--set {override}: a recipe says in its file what it extends")
        typed = local.anchored({keys[-1]: _typed(raw.strip(), override)}, Path())[keys[-1]]
        if keys in (("init_from",), *(("init_from", place) for place in starting_point.PLACES)):
            table = {keys[-1]: typed} if keys[1:] else typed
            path = starting_point.anchored({"init_from": table}, Path())["init_from"]
            typed = path[keys[-1]] if keys[1:] else path
        parsed.append((keys, typed, override))
    for keys, value, override in sorted(parsed, key=lambda p: (0, len(p[0])) if p[0][-1] == "use" else (1, 0)):
        _set(tables, keys, value, override, origin)


def _typed(raw: str, override: str) -> object:
    """A value as TOML reads it; a bare word is a string. `.03` and `3.`, which TOML does not know, are numbers too."""
    try:
        read = tomllib.loads(f"value = {raw}")
    except RecursionError:
        raise UserError(f"--set {override[:60]}...: is nested too deeply") from None
    except ValueError:
        return float(raw) if _BARE_POINT.fullmatch(raw) else raw
    if len(read) > 1:  # more lines than one, which would set other keys
        return raw
    if unfit := _unfit(read):
        raise UserError(f"--set {override}: {unfit[1]}")
    return read["value"]


def _set(tables: dict[str, Any], keys: tuple[str, ...], value: object, override: str, origin: Origin) -> None:
    table: Any = tables
    path: Keys = ()
    rest = list(keys)
    text = f"--set {override}"
    if rest[0] == "observers" and len(rest) > 1:
        observers = tables.setdefault("observers", [])
        name = rest[1]
        if not isinstance(observers, list):
            return  # a mistake in the file, which validation tells
        at = next((i for i, o in enumerate(observers) if _use(o) == name), len(observers))
        if at == len(observers):
            observers.append({"use": name})
            origin.own["observers", at] = text
        table, path, rest = observers[at], ("observers", at), rest[2:]
        if not rest or rest == ["use"]:
            raise UserError(f"{text}: should name an option, such as observers.{name}.enabled=false")
    for key in rest[:-1]:
        entry = _entry(table, key, path, text)
        path = (*path, entry)
        if isinstance(table, dict) and not isinstance(table.get(key), dict | list):
            table[key] = {}
            _replaced(origin, path, text)
        table = table[entry]
    last = _entry(table, rest[-1], path, text)
    if last == "use" and path and table.get("use") != value:
        table.clear()
        _replaced(origin, path, text)
    table[last] = value
    _replaced(origin, (*path, last), text)


def _entry(table: object, key: str, path: Keys, text: str) -> str | int:
    """A key of a table, or the number of an element of a list."""
    if isinstance(table, dict):
        return key
    where = ".".join(map(str, path))
    if not isinstance(table, list):
        raise UserError(f"{text}: {where} is {table!r}, which has no {key!r}")
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(table):
        raise UserError(f"{text}: {where} is a list of {len(table)}; name an element by its number, from 0")
    return int(key)


def _replaced(origin: Origin, keys: Keys, text: str) -> None:
    for places in (origin.own, origin.inherited):
        _forget(places, keys)
    origin.own[keys] = text
