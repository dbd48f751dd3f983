from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sslkit import registry
from sslkit.errors import UserError


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Puts a package with entry points on the path, as pip would."""

    def put(distribution: str, entries: str, modules: dict[str, str] | None = None) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[sslkit]\n{entries}\n")
        for name, source in (modules or {}).items():
            (tmp_path / f"{name}.py").write_text(source)
        registry.clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    registry.clear()


LOSS = '''"""m"""
from sslkit.api import Loss
class Mine(Loss):
    """My loss."""
    def build(self, dim, run): ...
'''


def test_a_strangers_component_comes_in_through_the_same_door(install) -> None:  # type: ignore[no-untyped-def]
    install("sslkit-mine", "loss.mine = sslkit_mine_x:Mine", {"sslkit_mine_x": LOSS})
    provider = registry.find("loss", "mine")
    assert provider.origin == "sslkit-mine 1.0"
    assert registry.described(provider) == ("My loss.", "")
    assert "sslkit_mine_x" not in sys.modules, "listing imports nothing"
    cls = registry.load("loss", "mine")
    assert registry.name_of(cls) == "mine"


def test_two_providers_of_one_name_are_refused_naming_both(install) -> None:  # type: ignore[no-untyped-def]
    install("a-dist", "loss.same = mod_a:X")
    install("b-dist", "loss.same = mod_b:X")
    with pytest.raises(UserError, match=r"offered by a-dist 1\.0 and by b-dist 1\.0"):
        registry.load("loss", "same")


def test_a_broken_neighbour_is_harmless_until_it_is_named(install) -> None:  # type: ignore[no-untyped-def]
    install("broken-dist", "loss.broken = broken_mod:X", {"broken_mod": "1 / 0"})
    assert registry.load("loss", "cosine").__name__ == "Cosine"
    with pytest.raises(UserError, match=r"loss 'broken' from broken-dist 1\.0 failed to import: ZeroDivisionError"):
        registry.load("loss", "broken")


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"no loss is named 'cosin'; did you mean 'cosine'\? \(installed: .*cosine"):
        registry.load("loss", "cosin")


def test_hiding_a_first_party_plugin_gives_the_ordinary_message(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = registry.providers()
    monkeypatch.setattr(registry, "providers", lambda: tuple(p for p in everything if p.key != "backbone.timm"))
    with pytest.raises(UserError, match="no backbone is named 'timm'"):
        registry.load("backbone", "timm")


@pytest.mark.parametrize(
    ("entry", "module", "problem"),
    [
        ("loss.x = gone_mod:X", {}, "module gone_mod is not there"),
        ("loss.x = here_mod:X", {"here_mod": "class Y: ..."}, "here_mod has no class X"),
        ("loss.x = bad_mod:X", {"bad_mod": "class X("}, "bad_mod.py cannot be read"),
        ("los.x = here_mod:X", {"here_mod": "class X: ..."}, "unknown kind 'los'; did you mean 'loss'?"),
    ],
)
def test_what_is_broken_is_seen_without_importing(install, entry, module, problem) -> None:  # type: ignore[no-untyped-def]
    install("odd-dist", entry, module)
    provider = next(p for p in registry.providers() if p.distribution == "odd-dist")
    assert problem in registry.described(provider)[1]


def test_what_is_no_component_of_its_kind_is_refused(install) -> None:  # type: ignore[no-untyped-def]
    from conftest import TINY

    from sslkit.recipe import parse_recipe

    install("odd-dist", "loss.thing = here_mod2:X", {"here_mod2": "class X: ..."})
    text = TINY.replace('use = "cosine"\n\n[target', 'use = "thing"\n\n[target')
    with pytest.raises(UserError, match="X is not a loss"):
        parse_recipe(text, "r.toml")
