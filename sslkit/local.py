"""Components in a file beside a recipe: `use = "./my_head.py:WideHead"`.

Such a file is code that a recipe makes run, so it needs leave (`--allow-local-code`). It is loaded by itself, as a
module that no import finds, and remembered with a digest of its source: what a run computes follows from that, not
from where the file lies.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sslkit import words
from sslkit.errors import UserError, did_you_mean

FOLDER = "local"
"""Where a run directory keeps the files that its components came from."""
_FORM = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)")


@dataclass(frozen=True)
class Source:
    """A file as it was when it was read."""

    path: Path
    text: bytes
    digest: str
    """SHA-256 of the text, in hex."""


_loaded: dict[str, Source] = {}
"""Names of the modules that were made here."""
_leave: ContextVar[bool | Path] = ContextVar("leave", default=False)
"""Which files may be run: all, none, or those below a folder. Each thread has its own."""


@contextmanager
def allowed(files: bool | Path = True) -> Iterator[None]:
    """Let recipes run code of local files, as `--allow-local-code` does; `allowed(False)` changes nothing.

    Args:
        files: A resolved folder allows those below it, and takes back the leave for any other.
    """
    token = _leave.set(files or _leave.get())
    try:
        yield
    finally:
        _leave.reset(token)


def is_allowed() -> bool:
    """Whether there is leave to run any file."""
    return _leave.get() is not False


# ---------------------------------------------------------------- names


def split(use: str) -> tuple[Path, str] | None:
    """The file and the class that a `use` names; None where it is the name of an installed component."""
    form = _FORM.fullmatch(use)
    return (Path(form["path"]), form["name"]) if form else None


def shown(use: str) -> str:
    """A local `use` as a reader would write it: from the working directory where the file lies below that."""
    parts = split(use)
    if parts is None:
        return use
    return f"{near(parts[0])}:{parts[1]}"


def near(path: Path) -> str:
    """A path as a reader would write it: from the working directory where it lies below that."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def anchored(tables: Any, folder: Path) -> Any:
    """A copy of a recipe's tables in which every local `use` has an absolute path, seen from a folder."""

    def absolute(use: str) -> str:
        parts = split(use)
        if parts is None:
            return use
        return f"{Path(os.path.normpath(Path.cwd() / folder / parts[0])).as_posix()}:{parts[1]}"

    return renamed(tables, absolute)


def renamed(tables: Any, name: Callable[[str], str]) -> Any:
    """A copy of a recipe's tables with another name for every `use`."""
    if isinstance(tables, dict):
        return {
            key: name(value) if key == "use" and isinstance(value, str) else renamed(value, name)
            for key, value in tables.items()
        }
    return [renamed(value, name) for value in tables] if isinstance(tables, list) else tables


# ---------------------------------------------------------------- loading


def load(use: str) -> type:
    """The class that a local `use` names, whatever kind it is of.

    Raises:
        UserError: leave was not given, or the file, its code or the class is not there.
    """
    path, name = split(use) or (Path(use), "")
    path = Path(os.path.normpath(Path.cwd() / path))
    leave = _leave.get()
    if leave is False:
        raise UserError(
            f"{shown(use)} is code in a file, which using it would run; add {words.spoken().local_code} to allow it"
        )
    if isinstance(leave, Path) and not path.resolve().is_relative_to(leave):
        raise UserError(f"{shown(use)} is code outside {near(leave)}, where a run keeps its own, and was not run")
    source = _read(path)
    module = _module(source, use)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        listed = f" (it has {', '.join(classes)})" if classes else ""
        raise UserError(f"{shown(use)}: the file has no class {name}{did_you_mean(name, classes)}{listed}")
    return found


def _read(path: Path) -> Source:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        alike = did_you_mean(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"{near(path)}: no such file{alike}") from None
    except OSError as error:
        raise UserError(f"{near(path)}: cannot be read: {error.strerror}") from None
    return Source(path, text, hashlib.sha256(text).hexdigest())


def _module(source: Source, use: str) -> ModuleType:
    """The file as a module of its own; the same source in the same place is run once."""
    key = hashlib.sha256(str(source.path).encode() + b"\0" + source.text).hexdigest()[:12]
    name = f"sslkit_local_{re.sub(r'[^0-9A-Za-z_]', '_', source.path.stem)}_{key}"
    if name in _loaded and name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(source.path)
    sys.modules[name] = module  # before the code runs: pydantic reads a class's source by its module
    with importing(shown(use), lambda: source.path):
        try:
            exec(compile(source.text, str(source.path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    _loaded[name] = source
    return module


@contextmanager
def importing(called: str, file: Callable[[], Path | None]) -> Iterator[None]:
    """Run a stranger's module inside: whatever it raises, `sys.exit()` too, is a UserError about what is called so,
    with the line of its file, or of the package whose `__init__.py` that is."""
    try:
        with redirect_stdout(sys.stderr):  # stdout may be JSON for another program
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{called} failed to import: {in_short(error)}{_place_in(error, file())}") from error


def in_short(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its repr where it has none."""
    return (str(error).strip() or repr(error)).partition("\n")[0]


def _place_in(error: BaseException, file: Path | None) -> str:
    """` (net.py, line 3)`; empty if that is not known."""
    if file is None or isinstance(error, SyntaxError):  # whose text says it
        return ""
    folder = file.parent if file.name == "__init__.py" else None
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if f.filename == str(file) or (folder and Path(f.filename).is_relative_to(folder))]
    return f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""


# ---------------------------------------------------------------- what was loaded


def source_of(component: type) -> Source | None:
    """The file that a class was loaded from here; None for every other class."""
    return _loaded.get(component.__module__)


def source_in(module: str) -> Source | None:
    """The file that was loaded as a module of this name; None for every other module."""
    return _loaded.get(module)


def use_of(component: type) -> str:
    """How a recipe anywhere names a class that was loaded here."""
    return f"{_loaded[component.__module__].path.as_posix()}:{component.__qualname__}"


def computed_name(component: type) -> str:
    """How the recipe's hash knows such a class: by its source, not by its place."""
    return f"{component.__qualname__}, local code {_loaded[component.__module__].digest[:12]}"


def kept_names(sources: list[Source]) -> dict[Path, str]:
    """The name in a run directory of each file, below FOLDER; of two files with one name the later has a digest."""
    names: dict[Path, str] = {}
    for source in sources:
        name = source.path.name
        if source.path not in names:
            taken = name in names.values()
            names[source.path] = f"{source.path.stem}-{source.digest[:12]}.py" if taken else name
    return names
