"""Whether a run is compiled: what `auto` becomes."""

from __future__ import annotations

import pytest
from conftest import TINY

from sslkit.compiling import resolve_compile
from sslkit.recipe import Recipe, parse_recipe


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TINY, "r.toml", overrides)


def test_what_auto_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslkit.compiling._can_compile", lambda: True)
    auto = recipe("train.compile=auto")
    assert resolve_compile(auto, 1e8, "cuda").train.compile is False, "a short run does not win the time back"
    assert resolve_compile(auto, 1e10, "cuda").train.compile is True
    assert resolve_compile(auto, 1e10, "cpu").train.compile is False
    monkeypatch.setattr("sslkit.compiling._can_compile", lambda: False)
    assert resolve_compile(auto, 1e10, "cuda").train.compile is False
    assert resolve_compile(recipe("train.compile=true"), 1e6, "cpu").train.compile is True
