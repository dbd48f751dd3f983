"""Checks of a spec: the class whose fields are the options. They need no torch."""

from __future__ import annotations

import functools
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sslkit import local, registry
from sslkit.api import KIND_CLASSES, Component
from sslkit.errors import UserError
from sslkit.testing.bench import Bench
from sslkit.testing.core import check
from sslkit.testing.outcome import Nonconforming, NotApplicable, require

HEAVY = ("torch", "torchvision", "timm", "sklearn", "pandas", "tensorflow", "jax")
"""What takes seconds to import. `sslkit --help` and `list-plugins` read specs, and have to answer at once."""
LINE = 120

_WATCH = """
import importlib, json, sys, traceback
name, path, heavy = json.loads(sys.argv[1])
sys.path[:] = path

class Watch:
    def find_spec(self, wanted, *_):
        if wanted.partition(".")[0] in heavy:
            stack = traceback.extract_stack()[:-1]
            frames = [f for f in stack if "importlib" not in f.filename and f.filename[0] != "<"]
            print(json.dumps([wanted.partition(".")[0], frames[-1].filename, frames[-1].lineno]), flush=True)
            import os
            os._exit(3)

sys.meta_path.insert(0, Watch())
try:
    importlib.import_module(name)
except BaseException as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0])
    sys.exit(4)
"""


@functools.cache
def _import_alone(module: str) -> tuple[int, str]:
    """Import a module in a fresh interpreter; one process serves all components of the module."""
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, json.dumps([module, sys.path, HEAVY])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.strip() or done.stderr.strip()


@check("importing the spec's module imports neither torch nor anything as slow")
def import_without_torch(bench: Bench) -> None:
    """In a fresh interpreter, for this one has torch already."""
    if local.source_of(bench.cls):
        raise NotApplicable("a class of a local file may import torch: nothing lists it")
    module = bench.cls.__module__
    code, said = _import_alone(module)
    if code == 3:
        name, file, line = json.loads(said.splitlines()[-1])
        raise Nonconforming(
            f"importing {module} imports {name} ({file}:{line}), which takes seconds and is done for every `describe` "
            "and every recipe; move that import into build(), and import the file that holds the maths there as well"
        )
    require(code == 0, f"{module} cannot be imported by itself in a fresh interpreter: {said}")


@check(f"the class has a docstring whose first line is a sentence of at most {LINE} characters")
def docstring(bench: Bench) -> None:
    """list-plugins shows the first line."""
    text = inspect.cleandoc(bench.cls.__dict__.get("__doc__") or "")
    first = text.partition("\n")[0]
    where = f"{bench.cls.__name__}: "
    require(first, where + 'has no docstring; add one below the class line: """What it does, in one sentence."""')
    require(
        len(first) <= LINE,
        where + f"the docstring's first line has {len(first)} characters; list-plugins shows that line, so keep it to "
        f"{LINE} and put the rest below an empty line",
    )
    require(first.endswith("."), where + f"the docstring's first line should end with a full stop: {first!r}")


@check("every option has help: a docstring under its field")
def options_documented(bench: Bench) -> None:
    """Those of tables inside options, too."""
    for model in models(bench.cls):
        for name, info in model.model_fields.items():
            require(
                (info.description or "").strip(),
                f'{model.__name__}.{name} has no help; put a docstring under the field: """What it does, its unit."""',
            )


@check("every option has a valid default, or has none and is required")
def defaults(bench: Bench) -> None:
    """An option that may be unset is unset by default."""
    for model in models(bench.cls):
        for name, info in model.model_fields.items():
            require(
                not info.is_required() or type(None) not in get_args(info.annotation),
                f"{model.__name__}.{name} may be None but has no default, so a recipe, which cannot say None, has to "
                "give it; add `= None`",
            )
    given = {n: getattr(bench.component, n) for n, info in bench.cls.model_fields.items() if info.is_required()}
    try:
        bench.cls.model_validate(given)
    except ValidationError as error:
        for problem in error.errors():
            option = problem["loc"][0] if problem["loc"] else None
            require(
                option is None or option in given,  # options that need one another are the spec's own affair
                f"{bench.cls.__name__}.{option}: its default is refused by its own type ({problem['msg']}); change "
                "the default or the type",
            )


@check("options survive being written to a recipe's lock file and read back")
def json_round_trip(bench: Bench) -> None:
    """Dump, drop what is unset as TOML does, validate: equal."""
    assert bench.name
    table = json.loads(bench.component.model_dump_json())
    table.pop("use", None)
    try:
        again = bench.cls.model_validate_json(json.dumps(_without_none(table)))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise Nonconforming(
            f"{bench.cls.__name__}.{where}: what model_dump_json() writes is refused when it is read back "
            f"({problem['msg']}); use types that JSON has, and for a field that holds a component "
            "Annotated[SerializeAsAny[Kind], slot('kind')]"
        ) from None
    lost = [n for n in bench.cls.model_fields if getattr(again, n) != getattr(bench.component, n)]
    require(
        not lost and again == bench.component,
        f"{bench.cls.__name__}.{', '.join(lost) or 'a private attribute'} is not what it was after being written as "
        "JSON and read back; a run could not be repeated from its lock file. Leave out custom serializers, let the "
        "default of an option that may be None be None, and keep no private attributes",
    )


@check("a spec can be pickled, for processes that are started afresh")
def pickle_round_trip(bench: Bench) -> None:
    """Pickle, unpickle: equal."""
    try:
        again = pickle.loads(pickle.dumps(bench.component))
    except Exception as error:  # pickle raises whatever it meets
        raise Nonconforming(
            f"{bench.cls.__name__} cannot be pickled ({type(error).__name__}: {error}); keep the class at the top "
            "level of its module, and functions, modules and open files out of its attributes"
        ) from None
    require(
        again == bench.component,
        f"{bench.cls.__name__} is not equal to itself after being pickled; keep all that it knows in its fields",
    )


@check("an unknown option is refused, so that no misspelt one goes unnoticed")
def unknown_option_refused(bench: Bench) -> None:
    """In tables inside options, too."""
    for model in models(bench.cls):
        extra = model.model_config.get("extra")
        require(
            extra == "forbid",
            f"{model.__name__} takes options that it does not have; "
            + (
                "remove extra= from its model_config"
                if issubclass(model, Component)
                else "set model_config = sslkit.api.Component.model_config in it"
            ),
        )
    values = {n: getattr(bench.component, n) for n in bench.cls.model_fields}
    try:
        bench.cls.model_validate({**values, "no_such_option": 1})
    except ValidationError:
        return
    raise Nonconforming(
        f"{bench.cls.__name__} takes the option 'no_such_option'; a validator of the whole model (mode='before') must "
        "not drop keys that it does not know"
    )


@check("a spec cannot be changed once it is made")
def frozen(bench: Bench) -> None:
    """What a run records is then what it used."""
    for model in models(bench.cls):
        require(
            model.model_config.get("frozen") is True,
            f"{model.__name__} can be changed after it was made, so that a run would not be what its lock file says; "
            "remove frozen=False from its model_config",
        )


@check("a JSON Schema can be made of the options, for editors")
def schema(bench: Bench) -> None:
    """`sslkit schema` needs one of every component."""
    try:
        json.dumps(bench.cls.model_json_schema())
    except Exception as error:  # pydantic raises several kinds
        first = str(error).strip().partition("\n")[0]
        raise Nonconforming(
            f"no JSON Schema can be made of {bench.cls.__name__} ({type(error).__name__}: {first}); use types for "
            "options that TOML has: text, numbers, true and false, lists, tables"
        ) from None


@check("an entry point offers the class, and its name begins with the class's kind")
def entry_point(bench: Bench) -> None:
    """One entry point, and nobody else's has the same name."""
    kind, cls = bench.kind, bench.cls
    found = [p for p in registry.providers() if p.target == f"{cls.__module__}:{cls.__qualname__}"]
    wrong = [p for p in found if p.kind != kind]
    if wrong:
        raise Nonconforming(
            f"{cls.__name__} is a {kind}, but its entry point is named {wrong[0].key!r}; name it "
            f"'{kind}.{wrong[0].name}' in pyproject.toml and install the package again (pip install -e .)"
        )
    require(
        isinstance(bench.component, KIND_CLASSES[kind]),
        f"{cls.__name__}.kind is {kind!r}, but it does not derive from sslkit.api.{KIND_CLASSES[kind].__name__}",
    )
    try:
        registry.find(kind, registry.name_of(cls))
    except UserError as error:
        line = f'"{kind}.{_snake(cls.__name__)}" = "{cls.__module__.partition(".")[0]}:{cls.__qualname__}"'
        raise Nonconforming(
            f"{error} (under [project.entry-points.sslkit], the quotes matter: {line}; then pip install -e .)"
        ) from None


def models(top: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A spec's class and the tables inside its options; not the components inside, which are examined themselves."""
    seen: set[Any] = set()

    def walk(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation in seen or (annotation is not top and issubclass(annotation, Component)):
                return
            seen.add(annotation)
            yield annotation
            for info in annotation.model_fields.values():
                yield from walk(info.annotation)
        for inner in get_args(annotation):
            yield from walk(inner)

    yield from walk(top)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def _snake(name: str) -> str:
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
    )
