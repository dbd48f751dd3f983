"""What a check is, how it ended, and the list of all of them. No torch at import."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sslkit.registry import KINDS
from sslkit.testing.outcome import Nonconforming, NotApplicable, described

if TYPE_CHECKING:
    from sslkit.testing.bench import Bench


@dataclass(frozen=True)
class Check:
    """One thing that every component of some kinds has to do."""

    name: str
    what: str
    """One line: what holds true of a component that passes."""
    kinds: tuple[str, ...]
    slow: bool
    """Whether it takes seconds: it starts processes, or compiles."""
    function: Callable[[Bench], None]

    def __call__(self, bench: Bench) -> None:
        """Examine the component on the bench.

        Raises:
            Nonconforming: it fails; the message says what to change.
            NotApplicable: the check asks nothing of it.
        """
        __tracebackhide__ = True
        try:
            self.function(bench)
        except (Nonconforming, NotApplicable):
            raise
        except Exception as error:  # whatever a stranger's code raises
            raise Nonconforming(
                f"{bench.key} raised {described(error)}, when it was tried whether this holds: {self.what}"
            ) from error


@dataclass(frozen=True)
class CheckResult:
    """How a check ended."""

    check: str
    what: str
    status: Literal["ok", "failed", "not applicable"]
    message: str
    """What to change, or why the check does not apply; empty where it is ok."""
    seconds: float


CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order in which they run."""


def check(what: str, *kinds: str, slow: bool = False) -> Callable[[Callable[[Bench], None]], Check]:
    """Make a function the check of its name, for these kinds or, without any, for all."""

    def add(function: Callable[[Bench], None]) -> Check:
        made = Check(function.__name__, what, kinds or KINDS, slow, function)
        assert made.name not in CHECKS, made.name
        CHECKS[made.name] = made
        return made

    return add


def attempt(one: Check, bench: Bench) -> CheckResult:
    """Run one check and tell how it ended."""
    start = time.perf_counter()
    status: Literal["ok", "failed", "not applicable"] = "ok"
    message = ""
    try:
        one(bench)
    except Nonconforming as error:
        status, message = "failed", str(error)
    except NotApplicable as error:
        status, message = "not applicable", str(error)
    return CheckResult(one.name, one.what, status, message, time.perf_counter() - start)
