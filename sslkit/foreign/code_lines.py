"""Telling the lines of a script from those that it prints, where both were pasted one after the other."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from typing import Literal

Kind = Literal["statement", "call", "assignment", "words"]
LONGEST = 1000
"""Characters of a line that is looked at; no statement is longer, and nothing deep enough to exhaust the parser."""
_MAYBE = re.compile(r"[=(]|[:,\\]\s*$|^\s*(?:return|import|from|assert|del|raise|global|pass)\b")
"""What every statement has; most lines of a log have nothing of it."""
_STATEMENTS = (
    ast.Return, ast.Import, ast.ImportFrom, ast.Assert, ast.Delete, ast.Raise, ast.Global, ast.AugAssign,
    ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.With, ast.Try,
)  # fmt: skip
_FIGURES = frozenset(("nan", "inf", "infinity"))


def kind(line: str) -> Kind:
    """What a line is.

    A statement: Python that computes something, which a script has and a log has not. A call: `print(...)`, which
    programs print too, as they print `Namespace(lr=0.1)`. An assignment: `loss = 0.5`, which either may have. Words:
    the rest, with `loss: 0.5`, `Loss (0.5)` and `loss -0.5`, which Python would read.
    """
    text = line.strip()
    if len(text) > LONGEST or not _MAYBE.search(text):
        return "words"
    return _kind(re.sub(r"\d+", "0", text))


@functools.lru_cache(4096)
def _kind(text: str) -> Kind:
    """That of a line with all its figures made alike, which the many lines of a log then are."""
    if _goes_on(text) and re.search(r"[\w\])]\s*\(|^\w+\s*=(?!=)", text):
        return "statement" if re.match(r"[\w.\[\]'\"]+\s*[-+*/]?=(?!=)", text) else "call"
    body = _parsed(text)
    if not body:
        return "words"
    if any(isinstance(s, _STATEMENTS) or (isinstance(s, ast.Assign) and _computes(s.value)) for s in body):
        return "statement"
    if any(map(_calls, body)):
        return "call"
    return "assignment" if all(isinstance(s, ast.Assign) and _is_figure(s.value) for s in body) else "words"


def _goes_on(text: str) -> bool:
    """Whether a bracket is left open, as `loss = criterion(a,` leaves it."""
    return text.endswith((",", "(", "[", "{")) and any(text.count(a) > text.count(b) for a, b in ("()", "[]", "{}"))


def _parsed(text: str) -> list[ast.stmt]:
    """The statements of a line; none if it is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Python thinks of somebody's words
        for attempt in (text, f"{text} pass") if text.endswith(":") else (text,):
            try:
                return ast.parse(attempt).body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
    return []


def _computes(value: ast.expr) -> bool:
    """Whether a value has to be worked out: not `resnet18` and `(0.9, 0.95)`, as settings are printed."""
    return any(isinstance(node, ast.Call | ast.BinOp | ast.Subscript | ast.Attribute) for node in ast.walk(value))


def _calls(statement: ast.stmt) -> bool:
    """Whether a function is called, with more than figures."""
    called = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(not call.args or call.keywords or not all(map(_is_figure, call.args)) for call in called)


def _is_figure(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_figure(node.operand)
    if isinstance(node, ast.Name):
        return node.id.lower() in _FIGURES
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)
