"""Name -> component class, through the entry points of every installed package.

A component is one entry point in the group `sslkit`, named `kind.name`. Names are read from package
metadata alone; only the one component that a recipe names is imported. First-party components come in
through the same door as anybody's.

`importlib.metadata` is used directly, not `pluggy.load_setuptools_entrypoints`: that call skips a second
provider of one name in silence, and here two providers are an error that names both.

Components in a file beside a recipe have no entry point; `sslkit.local` loads them, and here they look like any other.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path
from typing import Any, TypeVar

from sslkit import installed, local, words
from sslkit.errors import UserError, did_you_mean

GROUP = "sslkit"
KINDS = (
    "backbone",
    "head",
    "loss",
    "target_updater",
    "view_generator",
    "data_source",
    "optimizer",
    "schedule",
    "observer",
)
"""Kinds of components: what a recipe fills its slots with."""
RULE = "rule"
"""Health rules: no recipe names them, all that are installed are at work. Instances of `sslkit.rules.Rule`."""
LOCAL = "local file"
"""Stands in the place of a distribution where a component comes from a file beside the recipe."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_caches: list[Any] = []


def cached(function: _Function) -> _Function:
    """`functools.cache` for what follows from the installed packages: `clear` empties it."""
    made: Any = functools.cache(function)
    _caches.append(made)
    return made  # type: ignore[no-any-return]


def clear() -> None:
    """Forget what was read, for tests and for notebooks that install packages."""
    for cache in _caches:
        cache.cache_clear()


# ---------------------------------------------------------------- who offers what


@dataclass(frozen=True)
class Provider:
    """One entry point: who offers which component, and where its class lies. Or a class in a local file."""

    kind: str
    name: str
    target: str
    """`module:Class`, as the package's metadata gives it; of a local component, `file:Class`."""
    distribution: str
    version: str
    entry_point: EntryPoint | None
    disabled: str = ""
    """What leaves it out, such as `--no-plugin sslkit-x`."""
    problem: str = ""
    """Why it cannot be used, as far as the package's metadata tells."""

    @property
    def key(self) -> str:
        return f"{self.kind}.{self.name}"

    @property
    def top(self) -> str:
        """The package that its module is in."""
        return self.target.partition(":")[0].partition(".")[0]

    @property
    def origin(self) -> str:
        if self.distribution == LOCAL:
            return f"{local.shown(self.target).rpartition(':')[0]} ({self.version[:19]})"
        return f"{self.distribution} {self.version}"

    def provenance(self) -> dict[str, str]:
        """What a run records of where a component came from; of others' packages, also a digest of their code."""
        foreign = self.distribution not in (installed.OURS, LOCAL)
        digest = installed.source_digest(self.top) if foreign else ""
        short = self.name.rpartition(":")[2]  # a local component's name holds its path, which `target` tells
        return {
            "component": f"{self.kind}.{short}",
            "target": self.target,
            "distribution": self.distribution,
            "version": self.version,
            **({"source": digest} if digest else {}),
        }


@cached
def everything() -> tuple[Provider, ...]:
    """Every component that an installed package offers, left out or not, in the order of kinds and names."""
    facts: dict[int, tuple[str, str, str, str]] = {}
    found = []
    for entry in _entries():
        kind, _, name = entry.name.partition(".")
        key = id(entry.dist)  # its metadata is parsed anew at each access, and one package may offer a hundred
        if key not in facts:
            facts[key] = _facts(entry.dist)
        distribution, version, disabled, problem = facts[key]
        found.append(Provider(kind, name, entry.value, distribution, version, entry, disabled, problem))
    rank = {kind: position for position, kind in enumerate([*KINDS, RULE])}
    return tuple(sorted(found, key=lambda p: (rank.get(p.kind, len(rank)), p.kind, p.name, p.distribution)))


def _entries() -> list[EntryPoint]:
    _damaged.clear()
    try:
        return list(entry_points(group=GROUP))
    except Exception:  # one package's entry_points.txt is damaged; the others are there all the same
        sound: dict[str, list[EntryPoint]] = {}
        for distribution in distributions():
            name = installed.normalised(_facts(distribution)[0])
            try:
                sound.setdefault(name, list(distribution.entry_points.select(group=GROUP)))
            except Exception as error:
                _damaged.append(f"{name}: its entry_points.txt cannot be read: {local.in_short(error)}")
        return [entry for entries in sound.values() for entry in entries]


_damaged: list[str] = []


def damaged() -> list[str]:
    """A line for each installed package whose entry points cannot be read; nothing of it is offered."""
    everything()
    return list(_damaged)


def _facts(distribution: Distribution | None) -> tuple[str, str, str, str]:
    """`(name, version, what leaves it out, what is wrong with it)`, as its metadata tells."""
    try:
        metadata: Any = distribution.metadata if distribution is not None else {}
        name, version = metadata["Name"], metadata["Version"]
        requires: list[str] = metadata.get_all("Requires-Dist") or []
    except Exception:  # damaged, or not there
        name, version, requires = None, None, []
    name, version = name or "unknown", version or "unknown"
    return name, version, installed.disabled_by(name), installed.misfit(requires)


@cached
def providers() -> tuple[Provider, ...]:
    """Every component that may be used: what is offered and not left out."""
    return tuple(provider for provider in everything() if not provider.disabled)


@contextmanager
def without(names: Iterable[str]) -> Iterator[None]:
    """Leave distributions' components and rules out, here and in every process that is started meanwhile.

    Raises:
        UserError: for each name that is no distribution with components.
    """
    names = list(names)
    if not names:
        yield
        return
    offering = [provider.distribution for provider in everything()]
    problems = [(name, installed.cannot_be_left_out(name, offering)) for name in names]
    if any(problem for _, problem in problems):
        raise UserError(*(f"--no-plugin {name}: {problem}" for name, problem in problems if problem))
    with installed.left_out(names):
        clear()
        try:
            yield
        finally:
            clear()


def names(kind: str) -> list[str]:
    """The names of one kind, each once."""
    return sorted({p.name for p in providers() if p.kind == kind})


def find(kind: str, name: str) -> Provider:
    """The one provider of a component.

    Raises:
        UserError: nobody offers it (the valid names are listed), or two packages do (both are named).
    """
    if local.split(name):
        return provider_of(load(kind, name))
    offered = [p for p in providers() if p.kind == kind and p.name == name]
    if len(offered) > 1:
        raise UserError(
            f"{kind} {name!r} is offered by {' and by '.join(p.origin for p in offered)}; leave one of them out with "
            f"--no-plugin {offered[-1].distribution} or the like, or uninstall it"
        )
    if not offered:
        for provider in everything():
            if (provider.kind, provider.name) == (kind, name) and provider.disabled:
                raise UserError(f"{kind} {name!r} is from {provider.origin}, which is disabled by {provider.disabled}")
        other = next((f"; {p.origin} offers it as {p.key}" for p in everything() if p.name == name), "")
        valid = names(kind)
        listed = ", ".join(valid) if valid else "none is installed"
        raise UserError(
            f"no {kind} is named {name!r}{did_you_mean(name, valid)}{other} (installed: {listed}; after adding an "
            "entry point to a package, install it again)"
        )
    return offered[0]


def load(kind: str, name: str) -> Any:
    """Import one component's class, or one rule, and nothing else. A name such as `./file.py:Class` is a local one.

    Raises:
        UserError: as `find`, or the package that offers it fails to import, or is made for another sslkit.
    """
    if local.split(name):
        return check_kind(local.load(name), kind, local.shown(name))
    return _load(find(kind, name))


def check_kind(found: object, kind: str, called: str) -> type:
    """The class that was found under a name, if it is a component of the kind that is wanted.

    Raises:
        UserError: it is not; `called` is how the line begins.
    """
    if not isinstance(found, type):
        raise UserError(f"{called} is not a class")
    stated = getattr(found, "kind", None)
    derived = any(vars(base).get("kind") == kind for base in found.__mro__ if base.__module__ == "sslkit.api")
    if not derived or stated != kind:
        other = f" but a {stated}" if stated in KINDS and stated != kind else ""
        raise UserError(f"{called} is not a {kind}{other}; derive it from the {kind}'s class in sslkit.api")
    return found


@cached
def _load(provider: Provider) -> Any:
    called = f"{provider.kind} {provider.name!r} from {provider.origin}"
    if provider.problem:
        raise UserError(f"{called} {provider.problem}: install versions that fit each other")
    assert provider.entry_point is not None  # local components are not loaded here
    try:
        with local.importing(called, lambda: _source(provider.top)):
            loaded = provider.entry_point.load()
    except UserError:
        if problem := installed.wrong_api(_stated_api(provider.top)):  # it may import what only another version has
            raise UserError(f"{called} {problem}") from None
        raise
    if problem := installed.wrong_api(getattr(sys.modules.get(provider.top), "SSLKIT_API", None)):
        raise UserError(f"{called} {problem}")
    if provider.kind == RULE:
        return loaded
    return check_kind(loaded, provider.kind, f"{called}: {provider.target}")


def name_of(component: type) -> str:
    """The name a recipe uses for a component class: `timm` for `backbone.timm`, `/path/to/file.py:Class`.

    Raises:
        UserError: no installed package offers the class.
    """
    return provider_of(component).name


def short_name(component: type) -> str:
    """As `name_of`, but a class of a local file goes by its own name, wherever the file lies."""
    return component.__qualname__ if local.source_of(component) else name_of(component)


def provider_of(component: type) -> Provider:
    """Where a component class comes from.

    Raises:
        UserError: no installed package offers the class.
    """
    if source := local.source_of(component):
        use = local.use_of(component)
        return Provider(getattr(component, "kind", ""), use, use, LOCAL, f"sha256:{source.digest}", None)
    top = component.__module__.partition(".")[0]
    for provider in providers():
        likely = provider.target.partition(":")[2] == component.__qualname__ and provider.top == top
        if likely and _load(provider) is component:
            return provider
    raise UserError(
        f"{component.__module__}:{component.__qualname__} has no entry point in the group {GROUP!r}; add one to its "
        "package's pyproject.toml and install the package again, or put the class into a file of its own and name it "
        f"by use = './FILE.py:{component.__name__}' with {words.spoken().local_code}"
    )


def origin_of(module: str) -> str:
    """The package and version whose components are in a module's top package, or the local file; empty if neither."""
    if source := local.source_in(module):
        return local.near(source.path)
    top = module.partition(".")[0]
    owners = (p.origin for p in providers() if p.top == top)
    return next(owners, "")


# ---------------------------------------------------------------- read without importing


@cached
def described(provider: Provider) -> tuple[str, str]:
    """`(first line, what is wrong or "")` of a class's docstring or of what a rule says, read without importing it."""
    module, _, attribute = provider.target.partition(":")
    if provider.kind not in (*KINDS, RULE):
        return "", f"unknown kind {provider.kind!r}{did_you_mean(provider.kind, (*KINDS, RULE))}"
    if problem := provider.problem or installed.wrong_api(_stated_api(provider.top)):
        return "", problem
    path = _source(module)
    if path is None:
        return "", f"module {module} is not there"
    try:
        statements = _statements(path)
    except _UNREADABLE as error:
        return "", f"{path.name} cannot be read: {local.first_line(error)}"
    for node in statements:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0], ""
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == attribute for t in node.targets):
            return _said(node.value), ""
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == attribute for a in node.names):
            return "", ""  # re-exported: fine, but its text lies elsewhere
    return "", f"{module} has no {'rule' if provider.kind == RULE else 'class'} {attribute}"


_UNREADABLE = (OSError, SyntaxError, ValueError, RecursionError, MemoryError)


@cached
def _statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def _stated_api(top: str) -> object:
    """The `SSLKIT_API` of a plugin's top module, read without importing it; None where none stands there as it is."""
    path = _source(top)
    try:
        statements = _statements(path) if path else []
    except _UNREADABLE:
        return None
    for node in statements:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == "SSLKIT_API" for t in targets):
            value = getattr(node, "value", None)
            return value.value if isinstance(value, ast.Constant) else None
    return None


def _said(call: ast.expr) -> str:
    """What a rule says, as it stands in its source: `Rule(what="...")`."""
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        if keyword.arg == "what" and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return ""


@cached
def _source(module: str) -> Path | None:
    """A module's file. Finding the top package imports nothing; below it the path is walked by hand."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None
