from __future__ import annotations

import os
import sys

import pytest
from conftest import TINY, Install

from sslkit import registry
from sslkit.errors import UserError
from sslkit.recipe import parse_recipe

LOSS = '''"""m"""
from sslkit.api import Loss
class Mine(Loss):
    """My loss."""
    def build(self, dim, run): ...
'''


def test_a_strangers_component_comes_in_through_the_same_door(install: Install) -> None:
    install("sslkit-mine", "loss.mine = sslkit_mine_x:Mine", {"sslkit_mine_x": LOSS})
    provider = registry.find("loss", "mine")
    assert provider.origin == "sslkit-mine 1.0"
    assert registry.described(provider) == ("My loss.", "")
    assert "sslkit_mine_x" not in sys.modules, "listing imports nothing"
    cls = registry.load("loss", "mine")
    assert registry.name_of(cls) == "mine"


def test_two_providers_of_one_name_are_refused_naming_both(install: Install) -> None:
    install("a-dist", "loss.same = mod_a:X")
    install("b-dist", "loss.same = mod_b:X")
    with pytest.raises(UserError, match=r"offered by a-dist 1\.0 and by b-dist 1\.0"):
        registry.load("loss", "same")


def test_a_broken_neighbour_is_harmless_until_it_is_named(install: Install) -> None:
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
def test_what_is_broken_is_seen_without_importing(
    install: Install, entry: str, module: dict[str, str], problem: str
) -> None:
    install("odd-dist", entry, module)
    provider = next(p for p in registry.providers() if p.distribution == "odd-dist")
    assert problem in registry.described(provider)[1]


def test_what_is_no_component_of_its_kind_is_refused(install: Install) -> None:
    install("odd-dist", "loss.thing = here_mod2:X", {"here_mod2": "class X: ..."})
    text = TINY.replace('use = "cosine"\n\n[target', 'use = "thing"\n\n[target')
    with pytest.raises(
        UserError,
        match=r"loss 'thing' from odd-dist 1\.0: here_mod2:X is not a loss; derive it from the loss's class",
    ):
        parse_recipe(text, "r.toml")


# ---------------------------------------------------------------- what a neighbour may do at import


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("import sys\nsys.exit()", "SystemExit: SystemExit"),
        ("raise GeneratorExit('out')", "GeneratorExit: out"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("raise RuntimeError('one\\ntwo')", "RuntimeError: one"),
    ],
)
def test_whatever_its_import_raises_is_one_line(install: Install, source: str, says: str) -> None:
    install("odd-dist", "loss.odd = odd_raising:X", {"odd_raising": source})
    with pytest.raises(UserError) as caught:
        registry.load("loss", "odd")
    assert str(caught.value).startswith(f"loss 'odd' from odd-dist 1.0 failed to import: {says}")
    assert "(odd_raising.py, line " in str(caught.value)
    assert "\n" not in str(caught.value)
    sys.modules.pop("odd_raising", None)


def test_a_name_under_another_kind_is_pointed_at(install: Install) -> None:
    install("odd-dist", "projector.odd = odd_kind:X", {"odd_kind": ""})
    with pytest.raises(UserError, match=r"no head is named 'odd'; odd-dist 1\.0 offers it as projector\.odd"):
        registry.find("head", "odd")


def test_ctrl_c_during_an_import_is_ctrl_c(install: Install) -> None:
    install("odd-dist", "loss.odd = odd_interrupted:X", {"odd_interrupted": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        registry.load("loss", "odd")


def test_what_it_prints_at_import_goes_to_stderr(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("loud-dist", "loss.loud = loud_mod:Mine", {"loud_mod": "print('hello')\n" + LOSS})
    registry.load("loss", "loud")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("X = 3", "no_comp:X is not a class"),
        ("class X: kind = 'loss'", "no_comp:X is not a loss; derive it from the loss's class in sslkit.api"),
        ("from sslkit.api import Head\nclass X(Head): ...", "no_comp:X is not a loss but a head;"),
        ("from sslkit.api import Loss\nclass X(Loss): kind = 'los'", "no_comp:X is not a loss;"),
        ("from sslkit.api import Loss\nclass X(Loss): kind = 'head'", "no_comp:X is not a loss but a head;"),
        ("from sslkit.api import Loss\nclass X(Loss):\n    use: str = ''",
         "failed to import: TypeError: X: an option cannot be called 'use', which means something else"),
        ("from sslkit.api import Loss\nclass X(Loss):\n    kind: str = ''", "failed to import: "),
    ],
)  # fmt: skip
def test_what_is_no_component_is_told_by_its_package(
    install: Install, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    install("odd-dist", "loss.odd = no_comp:X", {"no_comp": source})
    monkeypatch.delitem(sys.modules, "no_comp", raising=False)
    with pytest.raises(UserError) as caught:
        registry.load("loss", "odd")
    assert "loss 'odd' from odd-dist 1.0" in str(caught.value)
    assert says in str(caught.value)
    sys.modules.pop("no_comp", None)


@pytest.mark.parametrize(
    ("name", "text"),
    [("entry_points.txt", "[sslkit]\nloss.x\n"), ("entry_points.txt", "loss.x = a:b\n[sslk"), ("METADATA", None),
     ("METADATA", "")],
)  # fmt: skip
def test_damaged_metadata_harms_nobody_else(install: Install, name: str, text: str | None) -> None:
    info = install("odd-dist", "loss.x = x_mod:X")
    install("sslkit-mine", "loss.mine = sslkit_mine_y:Mine", {"sslkit_mine_y": LOSS})
    (info / name).unlink()
    if text is not None:
        (info / name).write_text(text)
    registry.clear()
    assert registry.find("loss", "mine").origin == "sslkit-mine 1.0"
    assert registry.load("loss", "cosine").__name__ == "Cosine"
    assert len(registry.everything()) > 50
    told = registry.damaged()
    assert all("odd-dist: its entry_points.txt cannot be read" in line for line in told)
    assert bool(told) == (text == "[sslkit]\nloss.x\n")


# ---------------------------------------------------------------- made for another sslkit


@pytest.mark.parametrize(
    ("requirement", "says"),
    [
        ("sslkit>=99", "needs sslkit>=99, and this is sslkit"),
        ("SSLKit <0.0.1", "needs sslkit<0.0.1, and this is sslkit"),
        ("sslkit>=99; python_version < '3'", ""),
        ("sslkit>=99; extra == 'new'", ""),
        ("sslkit>=0.0.1", ""),
        ("sslkit", ""),
        ("sslkit-other>=99", ""),
        ("sslkit >= nonsense", ""),
    ],
)
def test_a_plugin_for_another_sslkit_is_refused_and_marked(install: Install, requirement: str, says: str) -> None:
    install("late-dist", "loss.late = late_mod:Mine", {"late_mod": LOSS}, requires=["torch", requirement])
    provider = registry.find("loss", "late")
    assert says in registry.described(provider)[1]
    if not says:
        assert registry.load("loss", "late").__name__ == "Mine"
        return
    with pytest.raises(UserError) as caught:
        registry.load("loss", "late")
    assert f"loss 'late' from late-dist 1.0 {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "says"),
    [("1", ""), ("2", "version 2 of sslkit.api, and this sslkit has 1: upgrade sslkit"),
     ("0", "version 0 of sslkit.api, and this sslkit has 1: upgrade the plugin"),
     ("'1'", "version '1' of sslkit.api"), ("True", "version True of sslkit.api")],
)  # fmt: skip
def test_a_plugin_may_say_for_which_api_it_was_written(
    install: Install, monkeypatch: pytest.MonkeyPatch, number: str, says: str
) -> None:
    install("api-dist", "loss.numbered = api_mod:Mine", {"api_mod": f"SSLKIT_API = {number}\n{LOSS}"})
    if not says:
        registry.load("loss", "numbered")
    else:
        with pytest.raises(UserError, match=says):
            registry.load("loss", "numbered")
    sys.modules.pop("api_mod", None)


@pytest.mark.parametrize("stated", ["SSLKIT_API = 2", "SSLKIT_API: int = 2"])
def test_a_plugin_for_a_later_api_says_so_where_its_import_fails(install: Install, stated: str) -> None:
    source = f"from sslkit.api import NotYetThere\n{stated}\n{LOSS}"
    install("later-dist", "loss.later = later_mod:Mine", {"later_mod": source})
    says = "is written for version 2 of sslkit.api, and this sslkit has 1: upgrade sslkit"
    with pytest.raises(UserError) as caught:
        registry.load("loss", "later")
    assert str(caught.value) == f"loss 'later' from later-dist 1.0 {says}"
    provider = next(p for p in registry.providers() if p.name == "later")
    assert registry.described(provider) == ("", says)


@pytest.mark.parametrize("stated", ["", "SSLKIT_API = 1", "SSLKIT_API = 1 + 1", "SSLKIT_API: int"])
def test_a_plugin_for_this_api_says_why_its_import_fails(install: Install, stated: str) -> None:
    source = f"{stated}\nfrom sslkit.api import NotYetThere\n{LOSS}"
    install("torn-dist", "loss.torn = torn_mod:Mine", {"torn_mod": source})
    with pytest.raises(UserError, match="failed to import: ImportError: cannot import name 'NotYetThere'"):
        registry.load("loss", "torn")


# ---------------------------------------------------------------- left out


def test_a_distribution_that_is_left_out_offers_nothing_until_the_block_ends(install: Install) -> None:
    install("Sslkit_Mine", "loss.mine = sslkit_mine_z:Mine\nrule.mine = sslkit_mine_z:rule", {"sslkit_mine_z": LOSS})
    with registry.without(["sslkit.mine"]):
        assert "mine" not in registry.names("loss")
        assert "mine" not in registry.names("rule")
        assert os.environ["SSLKIT_NO_PLUGIN"] == "sslkit.mine"
        with pytest.raises(UserError) as caught:
            registry.load("loss", "mine")
        assert caught.value.lines == (
            "loss 'mine' is from Sslkit_Mine 1.0, which is disabled by --no-plugin Sslkit_Mine",
        )
    assert "mine" in registry.names("loss")
    assert "SSLKIT_NO_PLUGIN" not in os.environ


def test_leaving_one_out_settles_two_of_one_name(install: Install) -> None:
    install("a-dist", "loss.same = same_mod:Mine", {"same_mod": LOSS})
    install("b-dist", "loss.same = mod_b:X")
    with pytest.raises(UserError, match=r"leave one of them out with --no-plugin b-dist or the like"):
        registry.find("loss", "same")
    with registry.without(["b-dist"]):
        assert registry.find("loss", "same").distribution == "a-dist"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sslkit", "--no-plugin sslkit: sslkit's own components are always there"),
        ("sslkit-mien", "did you mean 'sslkit-mine'? (those that do: sslkit-mine)"),
        ("pytest", "no installed package of this name offers components (those that do: sslkit-mine)"),
    ],
)
def test_what_cannot_be_left_out_is_told(install: Install, name: str, says: str) -> None:
    install("sslkit-mine", "loss.mine = x:Mine")
    with pytest.raises(UserError) as caught, registry.without([name]):
        pass
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "there"),
    [
        ("SSLKIT_PLUGINS", "", []),
        ("SSLKIT_PLUGINS", " A.Dist ,", ["a"]),
        ("SSLKIT_PLUGINS", "b-dist,a-dist,c", ["a", "b"]),
        ("SSLKIT_NO_PLUGIN", "", ["a", "b"]),
        ("SSLKIT_NO_PLUGIN", "b_dist", ["a"]),
    ],
)
def test_the_environment_allows_and_leaves_out(
    install: Install, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, there: list[str]
) -> None:
    install("a-dist", "loss.a = x:A")
    install("b-dist", "loss.b = x:B")
    monkeypatch.setenv(variable, value)
    registry.clear()
    assert [name for name in registry.names("loss") if len(name) == 1] == there
    assert "cosine" in registry.names("loss")
    if "b" not in there:
        with pytest.raises(UserError, match=f"disabled by {variable}="):
            registry.find("loss", "b")
