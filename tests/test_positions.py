from __future__ import annotations

import tomllib
from typing import Any

import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from sslkit.positions import lines_of

TEXT = '''# a comment with [brackets] and "quotes"
name = "x = [1]"   # another

[optimizer]
use = "lars"
lr = { use = "warmup_cosine", peak = 1.0, "odd key" = 2 }
groups.predictor.lr = 0.1
text = """
[not.a.table]
key = 3
"""

[[observers]]
use = 'knn'
[[observers]]
use = "health"
[observers.options]
deep = [
  1,  # one
  { inside = true },
]
'''


def test_every_key_has_its_line() -> None:
    lines = lines_of(TEXT)
    assert lines[("name",)] == 2
    assert lines[("optimizer",)] == 4
    assert lines["optimizer", "lr", "peak"] == 6
    assert lines["optimizer", "lr", "odd key"] == 6
    assert lines["optimizer", "groups", "predictor", "lr"] == 7
    assert ("not", "a", "table") not in lines
    assert lines["observers", 0, "use"] == 14
    assert lines["observers", 1] == 15
    assert lines["observers", 1, "options", "deep", 1, "inside"] == 20


leaves = st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=6)
tables = st.recursive(
    st.dictionaries(st.text(min_size=1, max_size=5), leaves, max_size=3),
    lambda inner: st.dictionaries(
        st.text(min_size=1, max_size=5), leaves | inner | st.lists(leaves | inner, max_size=3)
    ),
    max_leaves=12,
)


@given(tables)
def test_any_document_is_followed_key_by_key(document: dict[str, Any]) -> None:
    text = tomli_w.dumps(document)
    lines = lines_of(text)
    text_lines = text.split("\n")

    def visit(value: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert (*path, key) in lines
                visit(inner, (*path, key))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                visit(inner, (*path, number))

    visit(tomllib.loads(text), ())
    assert all(1 <= line <= len(text_lines) for line in lines.values())
