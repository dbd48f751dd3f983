"""The rules of the house: where things are, what may import what, and that everything is documented."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from sslkit import registry
from sslkit.api import KIND_CLASSES, Component
from sslkit.recipe import Recipe, Train

FLOORS: list[set[str]] = [
    {
        "errors",
        "files",
        "randomness",
        "positions",
        "batch",
        "rules",
        "stopping",
        "words",
        "launcher",
        "environment",
        "telling",
    },
    {"installed", "local", "registry", "contracts", "looking"},
    {"api", "starting_point"},
    {"complaints", "sources", "nn", "batch_norm", "page", "charts", "view_words"},
    {"recipe"},
    {
        "health",
        "panel",
        "anomaly",
        "features",
        "compiling",
        "data",
        "viewing",
        "freezing",
        "weights_files",
        "opened_run",
        "image_files",
        "feature_files",
        "evaluation_file",
        "siamese",
        "checkpoint",
        "run_directory",
        "events",
        "doctor",
        "distributed",
        "describe",
        "attending",
        "snapshot",
        "result",
        "encoder",
        "schema",
        "scaffold",
        "initialise",
    },
    {"bf16"},
    {"build", "progress", "diff"},
    {"objective", "state", "measuring", "failing"},
    {"trainer", "nonfinite", "facts", "loss_facts", "view_grid"},
    {"summary", "preparation", "forking"},
    {"resuming"},
    {"launch", "compare", "compare_groups", "recorded", "foreign", "testing"},
    {"report", "replaying", "evaluation", "exporting", "embedding", "run_list"},
    {"searching", "sweeping"},
    {"plan", "checkup", "scripting", "suggesting"},
    {"__init__"},
    {"cli_options"},
    {"cli_plugins", "cli_use", "cli_many"},
    {"cli"},
    {"__main__"},
]
"""Bottom first. A module or package imports from its own floor or from below."""

CORE = sorted((ROOT / "sslkit").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
FOLDERS = sorted(p.name for p in (ROOT / "plugins").iterdir() if p.name.startswith("sslkit_"))


def top(path: Path) -> str:
    """The module that a file of the core is, or the package directly below `sslkit` that it is in."""
    return path.relative_to(ROOT / "sslkit").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, `from a import b` as `a.b`, relative imports left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda p: "/".join(p.relative_to(ROOT / "sslkit").parts))
def test_imports_point_down(path: Path) -> None:
    own = top(path)
    floor = next(i for i, modules in enumerate(FLOORS) if own in modules)
    names = {m for modules in FLOORS for m in modules}
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "sslkit" and len(parts) > 1 and parts[1] in names:
            other = next(i for i, modules in enumerate(FLOORS) if parts[1] in modules)
            assert other <= floor, f"{own} (floor {floor}) imports {parts[1]} (floor {other})"


def test_every_module_has_a_floor() -> None:
    assert {top(p) for p in CORE} == {m for modules in FLOORS for m in modules}


@pytest.mark.parametrize("path", CORE, ids=lambda p: "/".join(p.relative_to(ROOT / "sslkit").parts))
def test_the_core_imports_no_plugin(path: Path) -> None:
    assert not {n for n in imported(path) if n.startswith("sslkit_")}


@pytest.mark.parametrize("path", PLUGINS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_plugin_imports_no_other_plugin(path: Path) -> None:
    assert {n.split(".")[0] for n in imported(path) if n.startswith("sslkit_")} <= {path.parent.name}


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_file_outgrows_its_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_specs_import_nothing_heavy() -> None:
    code = f"""
import sys
import sslkit.api, sslkit.recipe
for name in {FOLDERS!r}:
    __import__(name)
heavy = {{"torch", "torchvision", "timm", "numpy", "sklearn", "pyarrow", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- one door


def test_every_plugin_folder_is_in_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inner = {f"sslkit.{p.parent.name}" for p in (ROOT / "sslkit").glob("*/__init__.py")}
    assert set(setuptools["packages"]) == {"sslkit", "sslkit.recipes", *inner, *FOLDERS}
    assert all(setuptools["package-dir"][name] == f"plugins/{name}" for name in FOLDERS)
    assert not (ROOT / "plugins" / "__init__.py").exists(), "plugins/ is a shelf, not a package"


def test_first_party_components_are_declared_like_anybodys() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["sslkit"]
    installed = {p.key: p.target for p in registry.providers() if p.distribution == "sslkit"}
    assert installed == declared, "install the package again: pip install -e ."


OURS = [p for p in registry.providers() if p.distribution == "sslkit" and p.kind != registry.RULE]


@pytest.mark.parametrize("provider", OURS, ids=lambda p: p.key)
def test_every_component_and_option_is_documented(provider: registry.Provider) -> None:
    cls = registry.load(provider.kind, provider.name)
    assert issubclass(cls, KIND_CLASSES[provider.kind])
    description, problem = registry.described(provider)
    assert not problem
    assert description.endswith((".", ")", ":"))
    assert len(description) <= 120
    documented(cls)


@pytest.mark.parametrize("model", [Recipe, Train])
def test_every_key_of_a_recipe_is_documented(model: type) -> None:
    documented(model)


def documented(model: type) -> None:
    for name, info in model.model_fields.items():  # type: ignore[attr-defined]
        assert info.description, f"{model.__name__}.{name} has no help text"


@pytest.mark.parametrize("kind", KIND_CLASSES)
def test_every_kind_says_what_build_takes_and_gives(kind: str) -> None:
    build = KIND_CLASSES[kind].build  # type: ignore[attr-defined]
    assert inspect.signature(build).return_annotation is not inspect.Signature.empty
    assert issubclass(KIND_CLASSES[kind], Component)


def test_kinds_are_the_same_everywhere() -> None:
    assert set(registry.KINDS) == set(KIND_CLASSES)


def test_cores_are_counted_in_one_place() -> None:
    """`os.cpu_count` has those of the machine, of which a scheduler may have given this process a few."""
    counting = re.compile(r"sched_getaffinity|cpu_count")
    found = [path.name for path in [*CORE, *PLUGINS] if counting.search(path.read_text(encoding="utf-8"))]
    assert found == ["environment.py"]


def test_nothing_private_is_told() -> None:
    """No absolute path of anybody's machine, and no host of a package registry, in any file that ships."""
    pattern = re.compile(
        r"/(?:home|root|work|Users)/\w+|pypi\.org|pythonhosted|huggingface\.co/(?!docs)|\bTODO\b|\bFIXME\b"
    )
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yml", "") and path.is_file() and name != "tests/test_house.py":
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{name}: {found}"
