"""What a recipe requires of the installed packages, and which of those are switched off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import TINY, Install

from sslkit import doctor, installed, registry
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.recipe import Recipe, parse_recipe, read_recipe

SPEC = '''"""m"""
from sslkit.api import Loss
class Mine(Loss):
    """My loss."""
    def build(self, dim, run): ...
'''


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, "r.toml")
    return list(caught.value.lines)


# ---------------------------------------------------------------- requires


@pytest.mark.parametrize(
    ("required", "says"),
    [
        ("sslkit-gone>=0.2", "requires sslkit-gone>=0.2, which is not installed: pip install 'sslkit-gone>=0.2'"),
        ("sslkit-gone", "requires sslkit-gone, which is not installed: pip install sslkit-gone"),
        ("Sslkit.Mine>=2", "requires Sslkit.Mine>=2, but 1.0 is installed: pip install 'Sslkit.Mine>=2'"),
        ("sslkit>=99", f"requires sslkit>=99, but {installed._own_version()} is installed: pip install 'sslkit>=99'"),
        ("sslkit_mine~=1.0", ""),
        ("sslkit-mine[extra]", ""),
        ("sslkit-gone; python_version < '3'", ""),
    ],
)
def test_a_requirement_is_checked_at_its_line(install: Install, required: str, says: str) -> None:
    install("sslkit-mine", "loss.mine = req_mod:Mine")
    text = f'requires = [\n  "sslkit",\n  "{required}",\n]\n{TINY}'
    if says:
        assert lines(text) == [f"r.toml:3: {says}"]
    else:
        assert parse_recipe(text, "r.toml").requires == ("sslkit", required)


def test_what_a_missing_package_would_bring_is_said_before_anything_is_loaded(install: Install) -> None:
    install("broken", "backbone.broken = broken_here:X", {"broken_here": "raise SystemExit"})
    text = f'requires = ["sslkit-vicreg2>=0.2"]\n{TINY}'.replace(
        'use = "cosine"\n\n[target', 'use = "vicreg2"\n\n[target'
    )
    text = text.replace('use = "convnet"', 'use = "broken"')
    assert lines(text) == [
        "r.toml:1: requires sslkit-vicreg2>=0.2, which is not installed: pip install 'sslkit-vicreg2>=0.2' "
        "(nothing installed offers loss 'vicreg2')"
    ]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('["sslkit vicreg"]', "requires.0: should be a requirement such as 'sslkit-vicreg>=0.2' ("),
        ('[""]', "requires.0: should be a requirement such as"),
        ("[3]", "requires.0: should be a valid string, not 3"),
        ('"sslkit"', "requires: should be a list, not 'sslkit'"),
    ],
)
def test_what_is_no_requirement_is_told_at_its_line(value: str, says: str) -> None:
    (line,) = lines(f"\nrequires = {value}\n{TINY}")
    assert line.startswith(f"r.toml:2: {says}")


def test_requirements_are_joined_with_those_of_the_base_and_point_at_their_file() -> None:
    Path("base.toml").write_text(f'\nrequires = ["sslkit", "sslkit-a"]\n{TINY}')
    Path("over.toml").write_text('extends = "base.toml"\nrequires = [\n"sslkit-b",\n"torch"]\n')
    with pytest.raises(UserError) as caught:
        read_recipe("over.toml")
    assert [line.partition(",")[0] for line in caught.value.lines] == [
        "base.toml:2: requires sslkit-a",
        "over.toml:3: requires sslkit-b",
    ]
    Path("base.toml").write_text(f'requires = ["sslkit"]\n{TINY}')
    Path("over.toml").write_text('extends = "base.toml"\nrequires = ["torch"]\n')
    assert read_recipe("over.toml").requires == ("sslkit", "torch")


def test_requirements_change_nothing_that_is_computed_and_go_into_the_lock() -> None:
    plain, asking = parse_recipe(TINY, "r.toml"), parse_recipe(f'requires = ["sslkit"]\n{TINY}', "r.toml")
    assert plain.hash() == asking.hash()
    assert parse_recipe(asking.to_toml(), "r.toml").requires == ("sslkit",)
    assert Recipe.model_validate(dict(asking)) == asking


@pytest.mark.parametrize(
    ("version", "fits"), [("0.3.dev1", True), ("0.2rc1", False), ("0.2", True), ("0.1", False), ("unknown", False)]
)
def test_a_version_under_development_counts_as_a_version(
    monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    monkeypatch.setattr(installed, "_version", lambda name: version)
    assert (installed.unmet("sslkit-mine>=0.2") == "") is fits


# ---------------------------------------------------------------- the switches, from outside


def test_a_recipe_that_uses_what_is_left_out_is_one_line(install: Install, tiny: Path) -> None:
    install("sslkit-mine", "loss.mine = left_mod:Mine", {"left_mod": SPEC})
    tiny.write_text(TINY.replace('use = "cosine"\n\n[target', 'use = "mine"\n\n[target'))
    line = TINY.split("[loss]")[0].count("\n") + 1
    says = f"{tiny}:{line}: loss: loss 'mine' is from sslkit-mine 1.0, which is disabled by --no-plugin sslkit-mine\n"
    for words in (
        ["train", str(tiny), "--no-plugin", "Sslkit_Mine"],
        ["--no-plugin", "sslkit-mine", "check", str(tiny)],
    ):
        refused = run(*words)
        assert (refused.exit_code, refused.stderr) == (2, says)
    assert "SSLKIT_NO_PLUGIN" not in os.environ
    assert "mine" in registry.names("loss")
    tiny.write_text(f'requires = ["sslkit-mine"]\n{TINY}')
    refused = run("train", str(tiny), "--no-plugin", "sslkit-mine")
    assert refused.stderr == f"{tiny}:1: requires sslkit-mine, which is disabled by --no-plugin sslkit-mine\n"


@pytest.mark.parametrize("words", [["--no-plugin", "gone", "list-plugins"], ["list-plugins", "--no-plugin", "gone"]])
def test_an_unknown_distribution_is_one_line(words: list[str]) -> None:
    refused = run(*words)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("--no-plugin gone: no installed package of this name offers components")


def test_health_rules_are_left_out_with_the_rest(install: Install) -> None:
    rule = 'from sslkit.rules import Rule\nruled = Rule("W.", "info", "f", "s", before=lambda facts: None)\n'
    install("sslkit-ruled", "rule.ruled = ruled_mod:ruled", {"ruled_mod": rule})
    assert "ruled" in doctor.rules()[0]
    with registry.without(["sslkit-ruled"]):
        assert "ruled" not in doctor.rules()[0]
        shown = run("list-plugins", "--kind", "rule", "--json").output
    rows = {row["name"]: row["disabled"] for row in json.loads(shown)}
    assert rows["ruled"] == "--no-plugin sslkit-ruled"
    assert rows["collapse"] == ""


def test_processes_that_are_started_meanwhile_see_the_same(install: Install, tmp_path: Path) -> None:
    install("sslkit-mine", "loss.mine = spawned_mod:Mine", {"spawned_mod": SPEC})
    path = os.pathsep.join([str(tmp_path / "installed"), os.environ.get("PYTHONPATH", "")])

    def seen() -> str:
        code = "from sslkit import registry; print('mine' in registry.names('loss'))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert seen() == "True"
    with registry.without(["sslkit-mine"]):
        assert seen() == "False"


# ---------------------------------------------------------------- list-plugins


def test_broken_neighbours_are_marked_and_harm_nobody(install: Install, tiny: Path) -> None:
    install("a-gone", "loss.gone = gone_module:X")
    install("b-late", "loss.late = late_mod2:Mine", {"late_mod2": SPEC}, requires=["sslkit>=99"])
    install("c-one", "loss.twin = twin_mod:Mine", {"twin_mod": SPEC})
    install("d-two", "loss.twin = twin_mod:Mine")
    install("e-exits", "observer.exits = exiting_mod:X", {"exiting_mod": "import sys\nclass X: ...\nsys.exit(1)"})
    listed = run("list-plugins", "--json")
    assert listed.exit_code == 0
    told = {(r["distribution"], r["name"]): r["problem"] for r in json.loads(listed.stdout)}
    assert told["a-gone", "gone"] == "module gone_module is not there"
    assert told["b-late", "late"].startswith("needs sslkit>=99, and this is sslkit ")
    assert told["c-one", "twin"] == "offered twice, also by d-two 1.0; --no-plugin DIST leaves one of them out"
    assert told["d-two", "twin"] == "offered twice, also by c-one 1.0; --no-plugin DIST leaves one of them out"
    assert not told["e-exits", "exits"], "only an import tells"
    checked = run("list-plugins", "--check", "--no-plugin", "d-two")
    assert checked.exit_code == 2
    text = " ".join(checked.output.split())
    assert "d-two 1.0 DISABLED by --no-plugin d-two" in text
    assert "c-one 1.0 My loss." in text
    assert "BROKEN: observer 'exits' from e-exits 1.0 failed to import: SystemExit: 1" in text
    for broken, how in (
        ("gone", "failed to import"),
        ("late", "needs sslkit>=99"),
        ("twin", "is offered by c-one 1.0"),
    ):
        used = run("train", str(tiny), "--set", f"loss.use={broken}")
        assert (used.exit_code, len(used.stderr.splitlines())) == (2, 1)
        assert how in used.stderr
    assert run("train", str(tiny), "--steps", "1").exit_code == 0, "unused, they are harmless"


def test_a_damaged_package_is_told_beside_the_list(install: Install) -> None:
    (install("odd-dist", "loss.x = y:Z") / "entry_points.txt").write_text("[sslkit]\nloss.x\n")
    registry.clear()
    listed = run("list-plugins", "--json")
    assert "cosine" in {row["name"] for row in json.loads(listed.stdout)}
    assert listed.stderr.startswith("warning: odd-dist: its entry_points.txt cannot be read: ")
