"""What a user reads when something is wrong: lines, never tracebacks.

Exit codes of the command line: 0 done (also when preempted by SIGTERM), 1 a run that failed,
2 the user's mistake, 130 Ctrl-C.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SslkitError(Exception):
    """One or more lines that say what is wrong, where, and what to do."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class UserError(SslkitError):
    """The user can mend it: a recipe, an option, a path, a missing package."""

    exit_code = 2


class RunFailed(SslkitError):
    """A run that began and could not go on (a loss that is not finite, memory, disk)."""


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest valid name, or an empty string."""
    near = difflib.get_close_matches(wrong, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
