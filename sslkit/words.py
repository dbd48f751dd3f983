"""What the command line and Python call one thing, so that a message names what its reader can give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """How one of the two is told of its options."""

    run_dir: str
    resume_never: str
    fork: str
    stop_on: str
    more_steps: str
    local_code: str
    cuda: str
    cpu_or_auto: str
    again: str
    """What goes on with a run that was ended."""
    accept: str
    """How a finding is accepted; `{id}` stands for its id."""
    restart: str
    replay: str
    """What makes an update again; `{run}`, `{quoted}` and `{step}` stand for the run's directory, the same as
    a shell wants it, and the update."""


COMMAND = Words(
    run_dir="--run-dir",
    resume_never="--resume never",
    fork="--fork",
    stop_on="--stop-on",
    more_steps="a larger --steps",
    local_code="--allow-local-code",
    cuda="--device cuda",
    cpu_or_auto="--device cpu or auto",
    again="the same command",
    accept="--set train.accept='[\"{id}\"]'",
    restart="--restart",
    replay="sslkit replay {quoted} --step {step}",
)
PYTHON = Words(
    run_dir="run_dir",
    resume_never='resume="never"',
    fork="fork=True",
    stop_on="stop_on",
    more_steps="a larger value of steps",
    local_code="allow_local_code=True",
    cuda='device="cuda"',
    cpu_or_auto='device="cpu" or "auto"',
    again="the same call",
    accept='accept=("{id}",) in train',
    restart="restart=True",
    replay="sslkit.replay({run!r}, {step})",
)

_spoken: ContextVar[Words] = ContextVar("spoken", default=PYTHON)


def spoken() -> Words:
    """The words of whoever is told here: Python's, unless the command line has taken over."""
    return _spoken.get()


@contextmanager
def speaking(words: Words) -> Iterator[None]:
    """Tell everything in these words while the block runs, in this thread."""
    token = _spoken.set(words)
    try:
        yield
    finally:
        _spoken.reset(token)
