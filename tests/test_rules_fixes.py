"""What rules say is to be done: it reads well of a recipe's run, and of a loop that has no recipe."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

SLOTS = "loss|optimizer|train|target_updater|projector|predictor|backbone|view_generator|observers|data_source"
KEY = re.compile(rf"\b(?:{SLOTS})\.[a-z_]+|\brecipes?\b|\bsslkit [a-z]+\b")


def constant(node: ast.expr) -> str:
    """The words of a text, with what is put into it left out."""
    return "".join(n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def fixes() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "plugins" / "sslkit_rules").glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        named = {
            statement.targets[0].id: statement.value
            for statement in tree.body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                value = named.get(node.value.id, node.value) if isinstance(node.value, ast.Name) else node.value
                if text := constant(value):
                    yield f"{path.stem}:{node.value.lineno}", text


FIXES = dict(fixes())


def test_there_are_many() -> None:
    assert len(FIXES) > 50


@pytest.mark.parametrize("place", FIXES)
def test_the_keys_of_a_recipe_stand_in_brackets_behind_what_they_are(place: str) -> None:
    outside = FIXES[place]
    while (fewer := re.sub(r"\([^()]*\)", "", outside)) != outside:
        outside = fewer
    assert not KEY.findall(outside), f"a loop without a recipe has none of it: {FIXES[place]}"
    assert outside.strip(), "something is left to do"
