"""Lines of a command that works: whoever reads them may go away, and the work goes on."""

from __future__ import annotations

import os
import sys
from typing import IO

from sslkit.errors import printable


def tell(text: str, *, error: bool = False) -> None:
    """Print lines at once, on stderr if `error`. Where nobody reads them any more, these and all later go nowhere."""
    stream = sys.stderr if error else sys.stdout
    try:
        print("\n".join(map(printable, text.split("\n"))), file=stream, flush=True)
    except OSError:  # a terminal that was closed is no broken pipe; nor is a full disk below `> log`
        to_nowhere(stream)


def to_nowhere(stream: IO[str]) -> None:
    """Let a stream of this process end in nothing, with what it still holds: at its end Python would fail on it."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def finish() -> None:
    """Print what is held back, so that nothing is left to fail when the process ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            to_nowhere(stream)
