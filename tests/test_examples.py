"""The packages in docs/examples/plugins/: a stranger's, built as wheels, installed away from the clone, and used."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import OFFLINE, ROOT, call, fresh_environment

from sslkit import registry, scaffold

PLUGINS = sorted(path.parent for path in (ROOT / "docs" / "examples" / "plugins").glob("*/pyproject.toml"))
each = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)


def project(plugin: Path) -> dict:
    return tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def component(plugin: Path) -> tuple[str, str]:
    """Kind and name of what a plugin offers."""
    (key,) = project(plugin)["entry-points"]["sslkit"]
    kind, name = key.split(".")
    return kind, name


def test_there_is_a_loss_and_a_view_generator() -> None:
    assert sorted(component(plugin)[0] for plugin in PLUGINS) == ["loss", "view_generator"]


def test_they_are_not_sslkits_own() -> None:
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    offered = {".".join(component(plugin)) for plugin in PLUGINS}
    assert not offered & set(own["project"]["entry-points"]["sslkit"])
    assert not offered & {p.key for p in registry.providers()}
    assert not any(folder.startswith("docs") for folder in own["tool"]["setuptools"]["package-dir"].values())


@each
def test_they_have_the_files_that_new_plugin_writes(plugin: Path) -> None:
    kind, name = component(plugin)
    there = {p.relative_to(plugin) for p in plugin.rglob("*") if p.is_file()}
    left_by_use = re.compile(r"__pycache__|build|dist|runs|.*[._]cache|.*\.egg-info")
    ours = {str(p) for p in there if not any(left_by_use.fullmatch(part) for part in p.parts)}
    assert ours == set(scaffold.plugin_files(name, kind))


def commands(plugin: Path) -> list[list[str]]:
    """What a plugin's README has in its blocks."""
    text = (plugin / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in found for line in block.splitlines()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with both packages, installed from their wheels; the folder of its programs."""
    place = tmp_path_factory.mktemp("examples")
    programs = fresh_environment(place / "env")
    for plugin in PLUGINS:
        copy = shutil.copytree(plugin, place / plugin.name)  # building leaves files beside the sources
        offline = [word for word in OFFLINE if word != "--no-index"]
        call(programs / "python", "-m", "pip", "wheel", *offline, "-w", place / "dist", copy, cwd=place)
    wheels = sorted((place / "dist").glob("*.whl"))
    assert len(wheels) == len(PLUGINS)
    call(programs / "python", "-m", "pip", "install", *OFFLINE, *wheels, cwd=place)
    return programs


@pytest.mark.slow
def test_list_plugins_shows_them_beside_sslkits_own(environment: Path, tmp_path: Path) -> None:
    listed = json.loads(call(environment / "python", "-m", "sslkit", "list-plugins", "--json", cwd=tmp_path))
    found = {(row["kind"], row["name"]): row["distribution"] for row in listed}
    assert found["loss", "nt_xent"] == "sslkit"
    for plugin in PLUGINS:
        assert found[component(plugin)] == project(plugin)["name"]


@pytest.mark.slow
@each
def test_what_its_readme_says_works(plugin: Path, environment: Path, tmp_path: Path) -> None:
    for name in ("recipe.toml", "pyproject.toml"):
        shutil.copy(plugin / name, tmp_path)
    shutil.copytree(plugin / "tests", tmp_path / "tests")  # and not the package: it is imported from its wheel
    said = commands(plugin)
    assert {words[1] for words in said if words[0] == "sslkit"} >= {"describe", "train", "check-plugin"}
    for words in said:
        if words[0] != "pip":  # the environment has it
            call(environment / "python", "-m", *words, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    lock = tomllib.loads((run / "recipe.lock.toml").read_text(encoding="utf-8"))
    kind, name = component(plugin)
    assert lock[kind]["use"] == name
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss is not None]
