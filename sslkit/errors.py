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
        self.lines = tuple(printable(line) for line in lines)
        super().__init__(*self.lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class UserError(SslkitError):
    """The user can mend it: a recipe, an option, a path, a missing package."""

    exit_code = 2


class RunFailed(SslkitError):
    """A run that began and could not go on (a loss that is not finite, memory, disk)."""


def printable(text: str) -> str:
    """The text in one line, with what a terminal would obey or choke on escaped: it may come from a stranger's file."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_LONGEST = 200
"""Letters of a name that is compared with others: the time grows with their square."""


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest valid name, the first of equals, or an empty string."""
    if len(wrong) > _LONGEST:
        return ""
    matcher, near, best = difflib.SequenceMatcher(b=wrong), None, 0.6
    for name in valid:
        matcher.set_seq1(name)
        likeness = 0.7 if sorted(name) == sorted(wrong) else 0.0  # `rl` for `lr`, which difflib finds little in common
        if matcher.real_quick_ratio() > best - 1e-9:
            likeness = max(likeness, matcher.ratio())
        if likeness >= best and (near is None or likeness > best):
            near, best = name, likeness
    return f"; did you mean {near!r}?" if near else ""
