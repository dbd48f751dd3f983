"""What a check is, how it ends, and the list of all of them. No torch at import."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sslkit.registry import KINDS

if TYPE_CHECKING:
    from sslkit.testing.bench import Bench


class Nonconforming(AssertionError):
    """The component fails a check; the message says what to change."""


class NotApplicable(Exception):
    """The check asks nothing of this component; the message says why."""


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
class Result:
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


def require(holds: object, advice: str) -> None:
    """Fail the check with advice, unless it holds.

    Raises:
        Nonconforming: it does not hold.
    """
    __tracebackhide__ = True
    if not holds:
        raise Nonconforming(advice)


def attempt(one: Check, bench: Bench) -> Result:
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
    return Result(one.name, one.what, status, message, time.perf_counter() - start)


def described(error: BaseException) -> str:
    """`TypeError: ... (maths.py:12, in forward)`: an error, and the last line of the component's own code in it."""
    first = (str(error).strip() or repr(error)).partition("\n")[0]
    ours = str(Path(__file__).parent.parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    own = [f for f in frames if "site-packages" not in f.filename and "<" not in f.filename] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name})" if own else ""
    return f"{type(error).__name__}: {first}{where}"
