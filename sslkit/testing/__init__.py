"""What every component has to do, as checks for pytest and for `sslkit check-plugin`.

    import sslkit.testing
    from sslkit_mine import Mine

    @sslkit.testing.parametrize(Mine(), Mine(form="other"))
    def test_conforms(check):
        check()

Each check makes a test of its own, `loss.Mine-pure`. A component that cannot pass one says so, by name and with the
reason, and its test fails when it does pass: `expected_failures={"views_differ": "the views are the image itself"}`.
Checks that take seconds (they start processes or compile) carry pytest's mark `slow`: `-m "not slow"` leaves them out.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sslkit import registry
from sslkit.api import Component, RunInfo
from sslkit.errors import UserError, did_you_mean
from sslkit.registry import KINDS
from sslkit.testing.core import CHECKS, Check, CheckResult, attempt
from sslkit.testing.outcome import Nonconforming, NotApplicable

if TYPE_CHECKING:
    import pytest

    from sslkit.testing.bench import Bench

__all__ = ["Check", "CheckResult", "Nonconforming", "NotApplicable", "checks", "parametrize", "run_checks", "run_info"]


_MODULES = ("spec", "networks", "losses", "targets", "views", "sources", "optimizers", "training", "devices")
"""Where the checks are, in the order in which they run."""


def checks(kind: str | None = None) -> tuple[Check, ...]:
    """The checks of a kind, in the order in which they run; all of them without a kind."""
    for module in _MODULES:
        import_module(f"sslkit.testing.{module}")  # here, since they bring torch
    return tuple(one for one in CHECKS.values() if kind is None or kind in one.kinds)


def run_info(image_size: int = 32, channels: int = 3) -> RunInfo:
    """The facts of the small run that components are tried in, for components that need other images."""
    from sslkit.testing import bench

    return bench.run_info(image_size, channels)


def run_checks(component: Component, *, run: RunInfo | None = None, slow: bool = True) -> list[CheckResult]:
    """Run every check of the component's kind, and tell how each ended.

    Args:
        component: The spec, with the options that it requires.
        run: The facts of the run; images of 32 px with 3 channels without it.
        slow: Whether to run those that take seconds, too.
    """
    bench = bench_of(component, run)
    return [attempt(one, bench) for one in checks(component.kind) if slow or not one.slow]


@dataclass(frozen=True)
class Bound:
    """A check of one component, to be called in a test."""

    check: Check
    bench: Bench

    def __call__(self) -> None:
        """Run it; skips the test, with the reason, where the check asks nothing of the component."""
        __tracebackhide__ = True
        import pytest

        try:
            self.check(self.bench)
        except NotApplicable as error:
            reason = str(error)
        else:
            return
        pytest.skip(reason)


def parametrize(
    *components: Component, expected_failures: Mapping[str, str] | None = None, run: RunInfo | None = None
) -> pytest.MarkDecorator:
    """Decorate a test with the argument `check`, to run every check of these components.

    Args:
        components: Specs, with the options that they require. Of several, each is checked.
        expected_failures: Name of a check -> why the component does not pass it. The test then counts as an expected
            failure, and fails if the check passes.
        run: The facts of the run; images of 32 px with 3 channels without it.
    """
    import pytest

    expected = dict(expected_failures or {})
    if not components:
        raise TypeError("parametrize() takes specs to check: parametrize(Mine())")
    found = []
    for name, bench in zip(_ids(components), [bench_of(c, run) for c in components], strict=True):
        for one in checks(bench.kind):
            marks: list[Any] = [*_slow_mark()] if one.slow else []
            if one.name in expected:
                marks.append(pytest.mark.xfail(reason=expected[one.name], strict=True, raises=Nonconforming))
            found.append(pytest.param(Bound(one, bench), id=f"{name}-{one.name}", marks=marks))
    known = {one.name for component in components for one in checks(component.kind)}
    for name in expected:
        if name not in known:
            raise ValueError(f"expected_failures: no check is named {name!r}{did_you_mean(name, known)}")
    return pytest.mark.parametrize("check", found)


def _ids(components: tuple[Component, ...]) -> list[str]:
    """`loss.cosine`, and where several are of one class `loss.cosine`, `loss.cosine-2`."""
    found: list[str] = []
    for component in components:
        try:
            name = f"{component.kind}.{registry.name_of(type(component))}"
        except (UserError, AttributeError):  # what is wrong with it is told below, or by the check entry_point
            name = f"{getattr(component, 'kind', '?')}.{type(component).__name__}"
        count = sum(1 for other in found if other.partition("-")[0] == name)
        found.append(f"{name}-{count + 1}" if count else name)
    return found


def bench_of(component: Component, run: RunInfo | None = None) -> Bench:
    """The place where a component is tried out.

    Raises:
        TypeError: it is no component.
    """
    if isinstance(component, type) and issubclass(component, Component):
        raise TypeError(f"give an instance: {component.__name__}(), with the options that it requires")
    if not isinstance(component, Component) or component.kind not in KINDS:
        raise TypeError(
            f"{component!r} is no component; give an instance of a class that derives from one of sslkit.api's kinds, "
            "such as sslkit.api.Loss"
        )
    from sslkit.testing.bench import Bench

    return Bench(component, run)


def _slow_mark() -> list[Any]:
    """pytest's mark `slow`, in whatever way the project treats marks that it has not declared."""
    import pytest

    with warnings.catch_warnings(), contextlib.suppress(pytest.fail.Exception):
        warnings.simplefilter("ignore")
        return [pytest.mark.slow]
    return []
