"""Where each key of a TOML text stands, which `tomllib` does not tell.

The text is known to be valid TOML (`tomllib` has read it), so only structure is followed here, never values.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left

Path = tuple[str | int, ...]

_KEY = re.compile(r"""[ \t]*("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*""")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'",
    re.DOTALL,
)
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]\}#\n]*")


def lines_of(text: str) -> dict[Path, int]:
    """Line number (from 1) of every table and key: `{("optimizer", "lr", "peak"): 31, ("observers", 0): 40}`."""
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Path, int] = {}
        self.arrays: dict[Path, int] = {}
        self.ends = [match.start() for match in re.finditer("\n", text)]

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip_blank():
            if self.text.startswith("[[", self.at):
                self.at += 2
                path = self._through_arrays(self._keys())
                number = self.arrays.get(path, -1) + 1
                self.arrays[path] = number
                table = (*path, number)
                self._mark(table)
                self.at += 2
            elif self.text[self.at] == "[":
                self.at += 1
                table = self._through_arrays(self._keys())
                self.at += 1
            else:
                self._pair(table)
        return self.lines

    def _pair(self, table: Path) -> None:
        path: Path = table
        for key in self._keys():
            path = (*path, key)
            self._mark(path)
        self.at += 1  # the equals sign
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip_blank()
        if string := _STRING.match(self.text, self.at):
            self.at = string.end()
        elif self.text[self.at] == "{":
            self._enclosed("}", lambda _: self._pair(path))
        elif self.text[self.at] == "[":
            self._enclosed("]", lambda number: self._element((*path, number)))
        else:
            scalar = _SCALAR.match(self.text, self.at)
            self.at = scalar.end() if scalar else self.at + 1

    def _element(self, path: Path) -> None:
        self._mark(path)
        self._value(path)

    def _enclosed(self, end: str, item: object) -> None:
        self.at += 1
        number = 0
        while self._skip_blank() and self.text[self.at] != end:
            item(number)  # type: ignore[operator]
            number += 1
            self._skip_blank()
            if self.text[self.at] == ",":
                self.at += 1
        self.at += 1

    def _keys(self) -> list[str]:
        keys = []
        while match := _KEY.match(self.text, self.at):
            self.at = match.end()
            raw = match.group(1)
            keys.append(tomllib.loads(f"k = {raw}")["k"] if raw[0] in "\"'" else raw)
            if not self.text.startswith(".", self.at):
                break
            self.at += 1
        return keys

    def _through_arrays(self, keys: list[str]) -> Path:
        """`[observers.options]` means the last element of the array `observers`."""
        path: Path = ()
        for position, key in enumerate(keys):
            path = (*path, key)
            self._mark(path)
            if path in self.arrays and position < len(keys) - 1:
                path = (*path, self.arrays[path])
        return path

    def _skip_blank(self) -> bool:
        blank = _BLANK.match(self.text, self.at)
        if blank:
            self.at = blank.end()
        return self.at < len(self.text)

    def _mark(self, path: Path) -> None:
        self.lines.setdefault(path, bisect_left(self.ends, self.at) + 1)
