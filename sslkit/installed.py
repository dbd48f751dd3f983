"""Which installed packages may take part: what is switched off, what a recipe requires, what fits this sslkit.

The switches are kept in the environment, so that every process that this one starts sees the same components.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sslkit.errors import did_you_mean

ALLOWED = "SSLKIT_PLUGINS"
"""The distributions whose components are offered, separated by commas, besides sslkit's own; all, where it is unset."""
LEFT_OUT = "SSLKIT_NO_PLUGIN"
"""The distributions whose components are left out, separated by commas; `--no-plugin` adds to it."""
OURS = "sslkit"

API_VERSION = 1
"""Raised when a plugin written for the old number would no longer work."""
SUPPORTED = range(1, API_VERSION + 1)
"""The numbers that plugins may have been written for."""


def normalised(distribution: str) -> str:
    """A distribution's name as PEP 503 compares it: `SSLkit_X` is `sslkit-x`."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _listed(text: str) -> set[str]:
    return {normalised(name) for name in text.split(",") if name.strip()}


# ---------------------------------------------------------------- switched off

_flags: list[str] = []
"""What `--no-plugin` names in this process, to tell it from what the environment said before."""


def disabled_by(distribution: str) -> str:
    """What leaves a distribution's components out, such as `--no-plugin sslkit-x`; empty if nothing does."""
    name = normalised(distribution)
    if name == OURS:
        return ""
    if name in _listed(os.environ.get(LEFT_OUT, "")):
        flagged = name in map(normalised, _flags)
        return f"--no-plugin {distribution}" if flagged else f"{LEFT_OUT}={shlex.quote(os.environ[LEFT_OUT])}"
    allowed = os.environ.get(ALLOWED)
    if allowed is not None and name not in _listed(allowed):
        return f"{ALLOWED}={shlex.quote(allowed)}, which does not list it"
    return ""


def cannot_be_left_out(name: str, offering: Iterable[str]) -> str:
    """Why `--no-plugin NAME` makes no sense where these distributions offer components; empty if it does."""
    known = sorted({normalised(distribution) for distribution in offering} - {OURS})
    if normalised(name) == OURS:
        return "sslkit's own components are always there"
    if normalised(name) in known:
        return ""
    near = did_you_mean(normalised(name), known)
    return f"no installed package of this name offers components{near} (those that do: {', '.join(known) or 'none'})"


@contextmanager
def left_out(names: Iterable[str]) -> Iterator[None]:
    """Leave distributions out, here and in every process that is started meanwhile."""
    names, before, flags = list(names), os.environ.get(LEFT_OUT), list(_flags)
    os.environ[LEFT_OUT] = ",".join([*filter(None, [before]), *names])
    _flags.extend(names)
    try:
        yield
    finally:
        _flags[:] = flags
        if before is None:
            del os.environ[LEFT_OUT]
        else:
            os.environ[LEFT_OUT] = before


# ---------------------------------------------------------------- requirements


def malformed(requirement: str) -> str:
    """Why a text is no requirement as pip reads it (PEP 508); empty if it is one."""
    from packaging.requirements import InvalidRequirement, Requirement  # here, since most commands need none of it

    try:
        Requirement(requirement)
    except InvalidRequirement as error:
        return str(error).partition("\n")[0]
    return ""


def unmet(requirement: str) -> str:
    """What is wrong here with what a recipe requires, and the command that mends it; empty if nothing is."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return ""
    pip = f"pip install {shlex.quote(requirement)}"
    found = _version(wanted.name)
    if found is None:
        return f"requires {requirement}, which is not installed: {pip}"
    if not _satisfies(found, requirement):
        return f"requires {requirement}, but {found} is installed: {pip}"
    disabled = disabled_by(wanted.name)
    return f"requires {requirement}, which is disabled by {disabled}" if disabled else ""


def misfit(requirements: Iterable[str]) -> str:
    """The first of a plugin's requirements that is about sslkit and that this sslkit does not meet; empty if none."""
    for requirement in requirements:
        named = re.match(r"[A-Za-z0-9._-]+", requirement)
        if named is None or normalised(named[0]) != OURS or requirement == OURS or malformed(requirement):
            continue  # a bare `sslkit` asks nothing, and packaging takes a while to import
        from packaging.requirements import Requirement

        wanted, here = Requirement(requirement), _own_version()
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if applies and here is not None and not _satisfies(here, requirement):
            return f"needs sslkit{wanted.specifier}, and this is sslkit {here}"
    return ""


def wrong_api(number: object) -> str:
    """What is wrong with the `SSLKIT_API` that a plugin's module states; empty if this sslkit supports it."""
    if number is None or (type(number) is int and number in SUPPORTED):
        return ""
    supported = " and ".join(map(str, SUPPORTED))
    todo = "upgrade sslkit" if type(number) is int and number >= SUPPORTED.start else "upgrade the plugin"
    return f"is written for version {number!r} of sslkit.api, and this sslkit has {supported}: {todo}"


def _satisfies(found: str, requirement: str) -> bool:
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    try:
        return Requirement(requirement).specifier.contains(found, prereleases=True)
    except InvalidVersion:
        return False


@functools.cache
def _own_version() -> str | None:
    return _version(OURS)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except (PackageNotFoundError, KeyError, TypeError):  # the latter two: its metadata is damaged
        return None


def source_digest(package: str) -> str:
    """Twelve hex digits over the Python files of a package, which is not imported; empty if there are none."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return ""
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    alone = [Path(spec.origin)] if spec and spec.origin and not folders else []
    files = [*alone, *(file for folder in folders for file in sorted(folder.rglob("*.py")))]
    try:
        parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    except OSError:
        return ""
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12] if parts else ""
