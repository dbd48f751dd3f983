"""Writes a new plugin: a package that installs, trains and is tested as it stands.

`templates/shared/` has what every plugin has, `templates/KIND/` what differs: the spec (`__init__.py`), the file with
the torch code, and the tables of the recipe. They are `string.Template`s.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import keyword
import re
import shlex
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

import sslkit
from sslkit import registry
from sslkit.errors import UserError
from sslkit.installed import API_VERSION

LONGEST = 30
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_SUFFIX = ".tmpl"


def new_plugin(name: str, kind: str, into: str = ".") -> None:
    """Write the package `NAME/` into a folder, and say what to do next.

    Raises:
        UserError: the name is none or is taken, or there is such a folder already, which is left alone.
    """
    component = component_name(name)
    _check_free(component, kind)
    folder = Path(into) / name
    written = plugin_files(component, kind)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        for path, text in written.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        there = error.filename or folder
        raise UserError(f"{there}: is there already and was left alone; choose another name or --into") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    print(f"{folder}: a package that offers {kind}.{component}; next:")
    shown, recipe = shlex.quote(str(folder)), folder / "recipe.toml"
    print(f"  pip install -e {shown}\n  sslkit train {shlex.quote(str(recipe))} --steps 20\n  pytest {shown}")


def component_name(name: str) -> str:
    """The name that recipes use: `my-loss` and `sslkit-my-loss` are both `my_loss`.

    Raises:
        UserError: it cannot name a component, a package and a class.
    """
    bare = re.sub(r"^sslkit[-_]", "", name)
    if "/" in name or "\\" in name:
        raise UserError(f"{name}: is a path; give a name, and the folder with --into")
    if not _NAME.fullmatch(bare) or len(bare) > LONGEST or bare == "sslkit":
        better = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", bare).lower()
        better = re.sub(r"^[\d_]+|_+$", "", re.sub(r"\W+|_+", "_", better, flags=re.ASCII))[:LONGEST]
        near = f", such as {better!r}" if _NAME.fullmatch(better) and better != "sslkit" else ""
        raise UserError(
            f"{name!r}: should be lower-case letters, digits, dashes and underscores, beginning with a letter, at most "
            f"{LONGEST} of them{near}"
        )
    return bare.replace("-", "_")


def class_name(component: str) -> str:
    """`my_loss` -> `MyLoss`."""
    return "".join(word.capitalize() for word in component.split("_"))


def version_range(version: str) -> str:
    """The versions of sslkit that a plugin written today works with: `>=0.1,<0.2`, and from 1.0 on `>=1.4,<2`."""
    major, minor = (int(number) for number in version.split(".")[:2])
    return f">={major}.{minor},<{major + 1}" if major else f">=0.{minor},<0.{minor + 1}"


def plugin_files(component: str, kind: str) -> dict[str, str]:
    """The text of every file of a plugin, by its path in the plugin's folder.

    Raises:
        UserError: the class would have the name of something that its file imports.
    """
    templates = files("sslkit.scaffold") / "templates"
    package = f"sslkit_{component}"
    inside = {item.name.removesuffix(_SUFFIX): item for item in (templates / kind).iterdir()}
    recipe = inside.pop("recipe.toml")
    words = {
        "name": component,
        "kind": kind,
        "Class": class_name(component),
        "package": package,
        "distribution": package.replace("_", "-"),
        "range": version_range(sslkit.__version__),
        "api": API_VERSION,
        "options": "lr=0.001" if kind == "optimizer" else "",  # what it requires
        "live": next(file for file in inside if file != "__init__.py"),
    }

    def filled(template: Traversable) -> str:
        return Template(template.read_text(encoding="utf-8")).substitute(words)

    shared = {item.name.removesuffix(_SUFFIX): filled(item) for item in (templates / "shared").iterdir()}
    made = {
        "pyproject.toml": shared["pyproject.toml"],
        "README.md": shared["README.md"],
        ".gitignore": shared["gitignore"],
        "recipe.toml": f"{shared['recipe.toml']}\n{filled(recipe)}",
        **{f"{package}/{file}": filled(template) for file, template in sorted(inside.items())},
        f"{package}/py.typed": "",
        f"tests/test_{component}.py": shared["test.py"],
    }
    for path, text in made.items():
        if path.endswith(".py"):
            _check_names(component, text)
    return made


def _check_names(component: str, text: str) -> None:
    """A class that is called as something that its own file imports would hide it."""
    cls = class_name(component)
    if keyword.iskeyword(cls):
        raise UserError(f"{component!r}: its class would be {cls}, which Python keeps for itself; choose another name")
    tree = ast.parse(text)
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    outer = {alias.asname or alias.name for node in imports if not getattr(node, "level", 0) for alias in node.names}
    if hidden := sorted((defined | {cls}) & (outer - ({cls} - defined))):
        raise UserError(f"{component!r}: its class {hidden[0]} would hide one that it needs; choose another name")


def _check_free(component: str, kind: str) -> None:
    """Neither the component's name nor that of its package may be taken in this environment."""
    if component in registry.names(kind):
        origin = " and ".join(p.origin for p in registry.providers() if (p.kind, p.name) == (kind, component))
        raise UserError(f"{kind}.{component} is there already, from {origin}; choose another name")
    package = f"sslkit_{component}"
    if importlib.util.find_spec(package):
        origin = " and ".join(sorted(set(importlib.metadata.packages_distributions().get(package, ())))) or "a folder"
        raise UserError(f"a package {package} is there already, from {origin}; choose another name")
