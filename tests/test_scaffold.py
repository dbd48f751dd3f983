"""A new plugin, of any kind: it installs, trains and conforms as it is written."""

from __future__ import annotations

import ast
import fnmatch
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import OFFLINE, ROOT, call, fresh_environment

from sslkit import registry
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.recipe import read_recipe
from sslkit.registry import KINDS
from sslkit.scaffold import LONGEST, component_name, plugin_files, version_range

SHORT, LONG = "q", "a" * LONGEST
"""Names at the ends of what is allowed: a line must neither fall short of its formatting nor outgrow it."""


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_is_whole(kind: str, here: Path) -> None:
    done = run("new-plugin", "my-part", "--kind", kind)
    assert done.exit_code == 0, done.output
    files = {str(p.relative_to("my-part")) for p in Path("my-part").rglob("*") if p.is_file()}
    live = files - {
        "pyproject.toml", "README.md", ".gitignore", "recipe.toml", "tests/test_my_part.py",
        "sslkit_my_part/__init__.py", "sslkit_my_part/py.typed",
    }  # fmt: skip
    assert len(live) == 1
    project = tomllib.loads(Path("my-part/pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "sslkit-my-part"
    assert project["project"]["entry-points"]["sslkit"] == {f"{kind}.my_part": "sslkit_my_part:MyPart"}
    assert project["build-system"]["build-backend"] == "setuptools.build_meta"
    assert "$" not in "".join(p.read_text(encoding="utf-8") for p in Path("my-part").rglob("*") if p.is_file())
    readme = Path("my-part/README.md").read_text(encoding="utf-8")
    assert all(f"\n## {title}\n" in readme for title in ("Install", "Use", "Test", "Publish"))
    assert live.pop() in readme


@pytest.mark.parametrize("kind", KINDS)
def test_the_spec_has_one_documented_option_and_no_torch(kind: str) -> None:
    text = plugin_files("my_part", kind)["sslkit_my_part/__init__.py"]
    tree = ast.parse(text)
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    options = [(a, b) for a, b in pairwise(cls.body) if isinstance(a, ast.AnnAssign)]
    assert len(options) == 1
    assert isinstance(options[0][1], ast.Expr), "the docstring below the option"
    described = ast.get_docstring(cls)
    assert described
    assert described.partition("\n")[0].endswith(".")
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "typing", "pydantic", "sslkit.api"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [SHORT, LONG])
def test_it_is_formatted_and_lints(kind: str, name: str, here: Path) -> None:
    pytest.importorskip("ruff")
    run("new-plugin", name, "--kind", kind)
    for words in (["format", "--check"], ["check", "--extend-select=E501,D1,I", "--ignore=D102,D105,D107"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--isolated", "--no-cache", "."],
            cwd=name,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_is_typed_strictly(here: Path) -> None:
    pytest.importorskip("mypy")
    for kind in KINDS:
        run("new-plugin", f"a-{kind.replace('_', '-')}", "--kind", kind)
    sources = [path for kind in KINDS for path in (f"a-{kind.replace('_', '-')}/sslkit_a_{kind}",)]
    config = here / "mypy.ini"
    folders = ":".join(str(here / Path(path).parent) for path in sources)
    config.write_text(f"[mypy]\nmypy_path = {folders}:{ROOT}\nstrict = true\nfollow_imports = silent\n")
    tests = [f"a-{kind.replace('_', '-')}/tests/test_a_{kind}.py" for kind in KINDS]
    words = [sys.executable, "-m", "mypy", "--config-file", str(config), *sources, *tests]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_template_is_in_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    (pattern,) = setuptools["package-data"]["sslkit.scaffold"]
    folder = ROOT / "sslkit" / "scaffold"
    templates = [p.relative_to(folder) for p in (folder / "templates").rglob("*") if p.is_file()]
    assert {path.parts[1] for path in templates} == {"shared", *KINDS}
    for path in templates:
        assert len(path.parts) == 3
        assert fnmatch.fnmatch(str(path), pattern)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "component"),
    [("align", "align"), ("my-loss", "my_loss"), ("my_loss", "my_loss"), ("sslkit-align", "align"), ("v2", "v2")],
)
def test_names_are_made_into_identifiers(name: str, component: str) -> None:
    assert component_name(name) == component


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "should be lower-case letters"),
        ("MyLoss", "such as 'my_loss'"),
        ("my loss", "such as 'my_loss'"),
        ("2views", "such as 'views'"),
        ("my--loss", "such as 'my_loss'"),
        ("loss-", "such as 'loss'"),
        ("my.loss", "such as 'my_loss'"),
        ("größe", "should be lower-case letters"),
        ("sslkit", "should be lower-case letters"),
        ("sslkit-", "should be lower-case letters"),
        ("a" * (LONGEST + 1), f"at most {LONGEST}"),
        ("plugins/align", "is a path; give a name, and the folder with --into"),
    ],
)
def test_a_bad_name_is_refused_in_one_line(name: str, says: str, here: Path) -> None:
    done = run("new-plugin", name, "--kind", "loss")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("cosine", "loss", "loss.cosine is there already, from sslkit"),
        ("ema", "loss", "a package sslkit_ema is there already, from"),
        ("none", "loss", "its class would be None, which Python keeps for itself"),
        ("loss", "loss", "its class Loss would hide one that it needs"),
        ("run-info", "head", "its class RunInfo would hide one that it needs"),
        ("image", "data_source", ""),
    ],
)
def test_a_name_that_is_taken_is_refused(name: str, kind: str, says: str, here: Path) -> None:
    done = run("new-plugin", name, "--kind", kind)
    assert done.exit_code == (2 if says else 0), done.output
    assert says in done.output
    assert not says or not list(here.iterdir())


def test_what_is_there_is_left_alone(here: Path) -> None:
    Path("align").mkdir()
    done = run("new-plugin", "align", "--kind", "loss")
    assert (done.exit_code, list(Path("align").iterdir())) == (2, [])
    assert "align: is there already and was left alone" in done.stderr
    Path("file").write_text("mine")
    done = run("new-plugin", "other", "--kind", "loss", "--into", "file")
    assert (done.exit_code, Path("file").read_text()) == (2, "mine")
    assert done.stderr.count("\n") == 1


def test_it_says_what_to_do_next(here: Path) -> None:
    done = run("new-plugin", "align", "--kind", "loss", "--into", "of mine/plugins")
    assert done.output.splitlines() == [
        "of mine/plugins/align: a package that offers loss.align; next:",
        "  pip install -e 'of mine/plugins/align'",
        "  sslkit train 'of mine/plugins/align/recipe.toml' --steps 20",
        "  pytest 'of mine/plugins/align'",
    ]
    assert Path("of mine/plugins/align/recipe.toml").is_file()


@pytest.mark.parametrize(
    ("version", "allowed"), [("0.1.0", ">=0.1,<0.2"), ("0.12.3.dev1", ">=0.12,<0.13"), ("1.4.2", ">=1.4,<2")]
)
def test_the_versions_it_asks_for(version: str, allowed: str) -> None:
    assert version_range(version) == allowed


# ---------------------------------------------------------------- what it does


@pytest.fixture
def installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plugin of each kind, `fresh_KIND`, found as if pip had installed them."""
    for kind in KINDS:
        name = f"fresh-{kind.replace('_', '-')}"
        assert run("new-plugin", name, "--kind", kind).exit_code == 0
        project = tomllib.loads((here / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = here / name / f"sslkit_fresh_{kind}-0.1.0.dist-info"
        info.mkdir()
        needed = "".join(f"Requires-Dist: {requirement}\n" for requirement in project["dependencies"])
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n{needed}")
        lines = "".join(f"{key} = {target}\n" for key, target in project["entry-points"]["sslkit"].items())
        (info / "entry_points.txt").write_text(f"[sslkit]\n{lines}")
        monkeypatch.syspath_prepend(str(here / name))
    registry.clear()
    yield here
    registry.clear()
    for name in [name for name in sys.modules if name.startswith("sslkit_fresh_")]:
        del sys.modules[name]


def test_every_recipe_names_its_component_and_every_component_is_sound(installed: Path) -> None:
    for kind in KINDS:
        recipe = read_recipe(f"fresh-{kind.replace('_', '-')}/recipe.toml")
        assert f"{kind}.fresh_{kind}" in {used["component"] for used in recipe.provenance()}
        assert recipe.name == f"fresh_{kind}"
    listed = run("list-plugins", "--check")
    assert listed.output.count("sslkit-fresh-") == len(KINDS)
    assert not [line for line in listed.output.splitlines() if "fresh" in line and "BROKEN" in line]
    with pytest.raises(UserError, match=r"loss\.fresh_loss is there already, from sslkit-fresh-loss 0\.1\.0"):
        plugin_of("fresh-loss", "loss")


def plugin_of(name: str, kind: str) -> None:
    from sslkit.scaffold import new_plugin

    new_plugin(name, kind, "elsewhere")


@pytest.mark.parametrize("kind", ["loss", "view_generator"])
def test_its_recipe_trains(kind: str, installed: Path) -> None:
    few = ["data_source.prints=1", "data_source.test_prints=1", "train.compile=false", "observers.report.enabled=false"]
    words = [word for change in few for word in ("--set", change)]
    done = run("train", f"fresh-{kind.replace('_', '-')}/recipe.toml", "--steps", 2, *words)
    assert done.exit_code == 0, done.output


# ---------------------------------------------------------------- in an environment of its own


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_environment(tmp_path_factory.mktemp("environment"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_that_it_prints_work_at_once(kind: str, environment: Path, tmp_path: Path) -> None:
    name = f"new-{kind.replace('_', '-')}"
    said = call(environment / "python", "-m", "sslkit", "new-plugin", name, "--kind", kind, cwd=tmp_path)
    commands = [shlex.split(line) for line in said.splitlines()[1:]]
    assert [words[0] for words in commands] == ["pip", "sslkit", "pytest"]
    for words in commands:
        call(environment / "python", "-m", *words, *(OFFLINE if words[0] == "pip" else []), cwd=tmp_path)
    assert (tmp_path / "runs" / f"new_{kind}" / "report.html").is_file()
