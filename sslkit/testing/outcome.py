"""How a check says no: what its code raises, and the words for what a component's code raised. No torch at import."""

from __future__ import annotations

import traceback
from pathlib import Path


class Nonconforming(AssertionError):
    """The component fails a check; the message says what to change."""


class NotApplicable(Exception):
    """The check asks nothing of this component; the message says why."""


def require(holds: object, advice: str) -> None:
    """Fail the check with advice, unless it holds.

    Raises:
        Nonconforming: it does not hold.
    """
    __tracebackhide__ = True
    if not holds:
        raise Nonconforming(advice)


def described(error: BaseException) -> str:
    """`TypeError: ... (maths.py:12, in forward)`: an error, and the last line of the component's own code in it."""
    first = (str(error).strip() or repr(error)).partition("\n")[0]
    ours = str(Path(__file__).parent.parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    own = [f for f in frames if "site-packages" not in f.filename and "<" not in f.filename] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name})" if own else ""
    return f"{type(error).__name__}: {first}{where}"
