"""Every check finds somebody out, and says what to change."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from wrong_plugins import Case, losses, networks, originals, others, right, slow_import, specs, training, unusual, views

import sslkit.testing
from sslkit import registry
from sslkit.api import KIND_CLASSES, Component
from sslkit.testing.bench import Bench
from sslkit.testing.core import CHECKS, attempt

sslkit.testing.checks()
MODULES = (slow_import, specs, networks, losses, views, others, originals, training)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Entry points of the classes, on the path of this process and of those that it starts."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "wrong_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong-plugins\nVersion: 1.0\n")
    lines = []
    for module in (right, unusual, *MODULES):
        for name, cls in vars(module).items():
            own = isinstance(cls, type) and issubclass(cls, Component) and cls.__module__ == module.__name__
            if own and name not in specs.UNINSTALLED:
                kind = specs.ELSEWHERE.get(name, cls.kind)
                lines.append(f"{kind}.{name.lower()} = {module.__name__}:{name}")
    (info / "entry_points.txt").write_text("[sslkit]\n" + "\n".join(lines) + "\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    registry.clear()
    yield
    sys.path.remove(str(folder))
    registry.clear()


def params(slow: bool) -> list[Any]:
    return [
        pytest.param(case, id=f"{type(case.component).__name__}-{case.check}")
        for case in CASES
        if CHECKS[case.check].slow is slow
    ]


def found_out(case: Case) -> None:
    result = attempt(CHECKS[case.check], Bench(case.component))
    assert result.status == "failed", f"{case.check}: {result.status} {result.message}"
    assert re.search(case.says, result.message), result.message


@pytest.mark.parametrize("case", params(slow=False))
def test_a_wrong_component_is_found_out(case: Case) -> None:
    found_out(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", params(slow=True))
def test_a_wrong_component_is_found_out_slowly(case: Case) -> None:
    found_out(case)


def test_every_check_can_fail() -> None:
    assert {case.check for case in CASES} == set(CHECKS)


@pytest.mark.parametrize("component", [*right.RIGHT, *unusual.UNUSUAL], ids=lambda c: type(c).__name__)
def test_a_right_component_passes_everything(component: Component) -> None:
    """So that what the wrong ones fail by is their fault."""
    results = sslkit.testing.run_checks(component, slow=False)
    assert not [f"{r.check}: {r.message}" for r in results if r.status == "failed"]
    assert not [f"{r.check}: {r.message}" for r in results if r.message.startswith("needs")]


@pytest.mark.slow
@pytest.mark.parametrize("component", right.RIGHT, ids=lambda c: c.kind)
def test_a_right_component_passes_everything_slowly(component: Component) -> None:
    results = sslkit.testing.run_checks(component)
    assert not [f"{r.check}: {r.message}" for r in results if r.status == "failed"]


def test_there_is_a_right_component_of_every_kind() -> None:
    assert {c.kind for c in right.RIGHT} == set(KIND_CLASSES)
