"""Logs of any training loop, read into records under the keys of `metrics.jsonl`.

Three forms are told apart by themselves: a table (comma, semicolon, tab or spaces; with a header or without), JSON
lines, and lines of words with figures such as `Epoch: 4 Epoch_Loss: 0.0054`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sslkit.errors import UserError
from sslkit.foreign import code_lines
from sslkit.foreign.log_names import QUALITY, key_of, keys_of, loss_among

Row = dict[str, float]
"""A line of a log: key -> figure, which may be not a number."""


@dataclass
class Log:
    """What was read."""

    rows: list[Row]
    keys: tuple[str, ...]
    """Keys with at least one figure, in the order in which they were found."""
    notes: list[str] = field(default_factory=list)
    """What was left out or converted, in words."""
    places: tuple[int, ...] = ()
    """The line of the file on which each record stands."""

    def place(self, row: int) -> str:
        """` (line 12)`, or nothing where it is not known."""
        return f" (line {self.places[row]})" if row < len(self.places) else ""


def read(path: str) -> Log:
    """Read a log; `-` is the standard input.

    Raises:
        UserError: it cannot be read, or holds no losses; with the line where there is one.
    """
    name = "standard input" if path == "-" else path
    lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if _holds_something(line)]
    if not lines:
        raise UserError(f"{name}: is empty; a column of losses is the least that can be read")
    places = [number for number, _ in lines]
    if lines[0][1].lstrip().startswith("{"):
        rows, left_out = _from_json(name, lines)
    elif not _is_table(lines):
        rows, left_out, places = _from_words(name, lines)
    else:
        rows, left_out = _from_table(name, lines)
        places = places[-len(rows) :]
    log = _converted(name, rows, left_out)
    return replace(log, places=tuple(places))


def _text(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text; give a CSV file or a log") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _holds_something(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


# ---------------------------------------------------------------- lines of words

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?)\b"
_PAIR = re.compile(
    rf"([A-Za-z_][\w/.]*(?:[ -][A-Za-z][\w/.]*)?)\s*[\])]?\s*[:=]?\s*[\[(]?\s*({NUMBER})(?![\w.]*[A-Za-z_])(\s*%)?",
    re.IGNORECASE,
)
_NOT_TRAINING = {"val", "valid", "validation", "test", "eval"}


def _pairs(line: str) -> Row:
    """The figures of a line of words, the first of each name."""
    return _named(line)[0]


def _named(line: str) -> tuple[Row, tuple[str, ...]]:
    """The figures of a line of words, the first of each name, and all names that stand before a figure."""
    found: Row = {}
    pairs = _PAIR.findall(line)
    for words, number, percent in pairs:
        first, _, last = words.replace("-", " ").partition(" ")
        key = key_of(words) or (None if first.lower() in _NOT_TRAINING else key_of(last or first))
        if key is not None and key not in found:
            found[key] = float(number) / (100 if percent else 1)
    if "loss" not in found and len(losses := loss_among(words for words, _, _ in pairs)) == 1:
        found["loss"] = next(float(number) for words, number, _ in pairs if words == losses[0])
    return found, tuple(words.lower() for words, _, _ in pairs)


def _is_table(lines: list[tuple[int, str]]) -> bool:
    """Whether nothing in it is a word with a figure that means a loss."""
    return all("loss" not in _pairs(line) for _, line in lines)


@dataclass
class _Said:
    """A line of words with figures."""

    number: int
    found: Row
    names: tuple[str, ...]
    """What stands before its figures: lines that a program prints again and again have the same."""


def _from_words(name: str, lines: list[tuple[int, str]]) -> tuple[list[Row], list[str], list[int]]:
    """Records, what was left out, and the lines on which the records stand.

    What is code is never read. What prose says once is no record either, as it names its figures in other words than
    the program does again and again; where there is a script as well, or where only some losses have an epoch or step,
    it says nothing of any other figure.
    """
    kinds = {number: code_lines.kind(line) for number, line in lines}
    script = "statement" in kinds.values()
    none = ("statement", "call", "assignment") if script else ("call",)
    code = [number for number, kind in kinds.items() if kind in none]
    told = [_Said(number, *_named(line)) for number, line in lines if kinds[number] not in none]
    silent = sum(not said.found for said in told)
    told = [said for said in told if said.found]
    often = Counter(said.names for said in told)
    usual, times = next(iter(Counter(said.names for said in told if "loss" in said.found).most_common(1)), ((), 0))
    if script and times < 2:
        raise UserError(
            f"{name}: no lines of a log were found (line {code[0]} is read as code); give the lines of the log alone"
        )
    mixed = script or _disagree(told)
    once = [
        said.number
        for said in told
        if times > 1 and often[said.names] == 1 and not {*usual} <= {*said.names} and (mixed or "loss" in said.found)
    ]
    left_out = [f"{silent} lines without figures"] if silent else []
    left_out += [f"{_lines(code)}, as code"] if code else []
    left_out += [f"{_lines(once)}, said once only"] if once else []
    dropped = set(once)
    rows, places = _joined([said for said in told if said.number not in dropped])
    return rows, left_out, places


def _joined(told: list[_Said]) -> tuple[list[Row], list[int]]:
    """A line that has no loss belongs to the one with a loss before it, if it says something new."""
    rows: list[Row] = []
    places: list[int] = []
    for said in told:
        if "loss" in said.found or not rows:
            rows.append(said.found)
            places.append(said.number)
        elif said.found.keys() - rows[-1].keys():
            rows[-1] = {**said.found, **rows[-1]}
    kept = [number for number, row in enumerate(rows) if "loss" in row]
    return [rows[number] for number in kept], [places[number] for number in kept]


def _disagree(told: list[_Said]) -> bool:
    """Whether some lines with a loss name an epoch or step, and others do not."""
    losses = [said.found for said in told if "loss" in said.found]
    return any(0 < sum(key in found for found in losses) < len(losses) for key in ("epoch", "step"))


def _lines(numbers: list[int], most: int = 6) -> str:
    """`line 4`, `lines 3, 4, 8 and 20 more`."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:most]))}{more}"


# ---------------------------------------------------------------- JSON lines


def _from_json(name: str, lines: list[tuple[int, str]]) -> tuple[list[Row], list[str]]:
    tables: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            table = json.loads(line)
        except ValueError:
            raise UserError(f"{name}:{number}: is no JSON, though the first line is") from None
        if not isinstance(table, dict):
            raise UserError(f'{name}:{number}: is no JSON table; write one such as {{"loss": 0.5}} on every line')
        tables.append(table)
    keys, several = keys_of(list(dict.fromkeys(said for table in tables for said in table)))
    if several:
        raise UserError(f"{name}: {_which(several)}")
    rows: list[Row] = []
    left_out: dict[str, None] = {}
    for table in tables:
        row: Row = {}
        for said, value in table.items():
            key = keys.get(said)
            if key is None or isinstance(value, bool) or not isinstance(value, int | float | None):
                left_out[said] = None
            else:
                row.setdefault(key, math.nan if value is None else float(value))
        rows.append(row)
    return rows, list(left_out)


def _which(losses: list[str]) -> str:
    return f"each of {', '.join(losses)} may be the loss; name the one that training minimises 'loss'"


# ---------------------------------------------------------------- tables


def _from_table(name: str, lines: list[tuple[int, str]]) -> tuple[list[Row], list[str]]:
    separator = next((s for s in ("\t", ";", ",") if s in lines[0][1]), None)
    table = [(number, _cells(line, separator)) for number, line in lines]
    (first, header), rest = table[0], table[1:]
    if any(_figure(cell, separator) is not None for cell in header):
        keys, left_out, rest = _keys_without_header(name, table, separator), [], table
    else:
        keys = _keys(header)
        left_out = [said for said, key in zip(header, keys, strict=True) if key is None]
        if several := keys_of(header)[1]:
            raise UserError(f"{name}:{first}: {_which(several)}")
        if "loss" not in keys:
            raise UserError(f"{name}:{first}: no column is a loss (columns: {', '.join(header)}); name one 'loss'")
        if not rest:
            raise UserError(f"{name}: has a header and no line below it")
    rows = []
    for number, cells in rest:
        if len(cells) != len(keys):
            raise UserError(f"{name}:{number}: {_columns(len(cells))}, where line {first} has {len(keys)}")
        row: Row = {}
        for key, cell in zip(keys, cells, strict=True):
            if key is None or not cell:
                continue
            value = _figure(cell, separator)
            if value is None:
                raise UserError(f"{name}:{number}: {cell!r} in column {key} is no number")
            row[key] = value
        rows.append(row)
    return rows, left_out


def _cells(line: str, separator: str | None) -> list[str]:
    cells = line.split(separator) if separator else line.split()
    return [cell.strip().strip("\"'").strip() for cell in cells]


def _figure(cell: str, separator: str | None) -> float | None:
    """A cell as a number, `45 %` as .45; a decimal comma where commas do not separate."""
    percent = cell.endswith("%")
    text = cell.rstrip("% ")
    if separator != "," and re.fullmatch(r"[-+]?\d*,\d+", text):
        text = text.replace(",", ".")
    if not re.fullmatch(NUMBER, text, re.IGNORECASE):
        return None
    return float(text) / (100 if percent else 1)


def _keys(header: Sequence[str]) -> list[str | None]:
    """The key of each column; only the first of a key is read."""
    known, _ = keys_of(header)
    keys: list[str | None] = []
    for said in header:
        key = known.get(said)
        keys.append(None if key in keys else key)
    if "value" in keys and "loss" not in keys:  # TensorBoard's download: Wall time, Step, Value
        keys[keys.index("value")] = "loss"
    return keys


def _keys_without_header(name: str, table: list[tuple[int, list[str]]], separator: str | None) -> list[str | None]:
    number, cells = table[0]
    if len(cells) == 1:
        return ["loss"]
    firsts = [_figure(cells[0], separator) for _, cells in table]
    counted = len(firsts) > 1 and all(
        a is not None and b is not None and b - a == 1 for a, b in itertools.pairwise(firsts)
    )
    if len(cells) == 2 and counted:
        return ["epoch", "loss"]
    raise UserError(
        f"{name}:{number}: {_columns(len(cells))} without names; put a line such as 'epoch,loss' above them"
    )


def _columns(number: int) -> str:
    return "one column" if number == 1 else f"{number} columns"


# ---------------------------------------------------------------- what becomes of them

UNIT = 0.5
"""What the standard deviation of outputs of length 1 stays below, in 4 dimensions and more."""


def _converted(name: str, rows: list[Row], left_out: list[str]) -> Log:
    """Figures on our scales, and nothing changed without a word."""
    notes = [f"not read: {', '.join(left_out)}"] if left_out else []
    for row in rows:
        row.pop("value", None)
        if "collapse_level" in row:  # lightly's: 1 - sqrt(d) std, not below 0
            row.setdefault("std_sqrt_d", 1 - row.pop("collapse_level"))
    notes += _relative(rows)
    for key in (*QUALITY, "probe_train_top1"):
        if any(row.get(key, 0) > 1 for row in rows):
            notes.append(f"{key} was read as percent")
            for row in rows:
                if key in row:
                    row[key] /= 100
    keys = tuple(dict.fromkeys(key for row in rows for key in row))
    if "loss" not in keys:
        raise UserError(f"{name}: no losses were found; name them 'loss', or give one column of them")
    for number, row in enumerate(rows, 1):
        for key in ("epoch", "step"):
            if not math.isfinite(row.get(key, 0.0)):
                raise UserError(f"{name}: {key} of record {number} is no number")
    return Log(rows, keys, notes)


def _relative(rows: list[Row]) -> list[str]:
    """The deviation of outputs of length 1, as a share of its highest; solo-learn and lightly record it so.

    Of d dimensions it is at most 1 / sqrt(d): that share is never below `std_sqrt_d`, which rules know, and cannot make
    a collapse where there is none.
    """
    found = [row["spread"] for row in rows if math.isfinite(row.get("spread", math.nan))]
    most = max(found, default=0.0)
    usable = most > 0 and min(found) >= 0 and most < UNIT and not any("std_sqrt_d" in row for row in rows)
    for row in rows:
        value = row.pop("spread", None)
        if value is not None and usable:
            row["std_sqrt_d"] = value / most
    if not found:
        return []
    if not usable:
        return ["not read: a standard deviation, which is not that of outputs of length 1 or stands beside std_sqrt_d"]
    return [
        f"a standard deviation of at most {most:.3g} was read as a share of that, as its dimensions are not known: "
        "std_sqrt_d is at most this share"
    ]


def as_record(row: Mapping[str, float]) -> dict[str, Any]:
    """A row as it would stand in `metrics.jsonl`: what is not finite is null."""
    return {key: value if math.isfinite(value) else None for key, value in row.items()}
