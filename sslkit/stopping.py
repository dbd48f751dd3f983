"""How a run is asked to end, and how a process ends with the one that started it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
"""Signals that ask a run to end."""


class Stopped(BaseException):
    """Raised where a signal comes while nothing would be lost; below `Exception`, so that nobody takes it for a fault.

    `StopSignals` raises it; whoever holds the run's directory says so in `status.json`.
    """


class LeftEarly(BaseException):
    """Raised between the parts of a measurement that is not finished because the run has to end."""


@dataclass
class StopSignals:
    """Signals set a flag, which the loop polls. Before there is anything to save, they end the run at once.

    SIGINT a second time takes its usual course: somebody sits there and does not want to wait. The others come again
    by themselves, from SLURM to every process and from torchrun to its workers, so again they change nothing.
    """

    also: Callable[[], bool] = lambda: False
    """Another way to ask; once it said yes, it is not asked again."""
    received: int | None = None
    """The first signal that came."""
    settled: bool = False
    """Whether there is something to save."""
    shared: bool = False
    """Whether this is one of several processes."""
    _asked: bool = False
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignals:
        for name in ASKING:
            number = getattr(signal, name, None)  # Windows has neither SIGUSR1 nor SIGHUP
            # A handler that is not Python's could not be put back, so it is left in place.
            if number is None or (handler := signal.getsignal(number)) is None:
                continue
            # nohup, and a shell that starts something in the background, ask by this to be left alone.
            if handler is signal.SIG_IGN and name in ("SIGHUP", "SIGINT"):
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever runs us there stops us in their own way
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        first = self.received is None
        self.received = number if first else self.received
        if number == signal.SIGINT and not self.shared:
            signal.signal(number, self._before[number])
            if not self.settled:
                raise KeyboardInterrupt
        elif first and not self.settled:
            raise Stopped

    def settle(self) -> None:
        """From here on there is something to save: signals are waited for by whoever polls."""
        self.settled = True

    def saved(self) -> None:
        """Nothing is left to save: Ctrl-C ends at once, the others have had their way."""
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def word(self) -> int:
        """Why the run is to end: the signal that came, 1 if it was asked in the other way, 0 if it is to go on."""
        return self.received or int(self.asked())

    def share(self) -> None:
        """This is one of several processes, which end together: never at once, and not by a launcher's repetition of
        Ctrl-C."""
        self.settled = self.shared = True

    def hear(self, word: int) -> None:
        """Take over what another process said."""
        if word > 1:
            self.received = self.received or word

    def asked(self) -> bool:
        """True once a signal came, or once it was asked in the other way."""
        self._asked = self._asked or self.also() or self.received is not None
        return self._asked

    @property
    def status(self) -> Literal["interrupted", "preempted"]:
        """What a run that ends for this is: one that goes on when somebody, or when a scheduler, repeats it."""
        return "interrupted" if self.received in (None, signal.SIGINT) else "preempted"

    @property
    def reason(self) -> str:
        """The signal's name, or `should_stop`."""
        return "should_stop" if self.received is None else signal.Signals(self.received).name


PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Let the system send SIGTERM to this process when the one that started it dies, however it dies.

    On Linux; elsewhere nothing happens. What counts is the thread that started the process: it has to live as long
    as the parent does.

    Args:
        parent: The process that started this one, as it knows itself: it may have died already. Without it, one that
            dies while this is called is noticed, but not one that died before.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    expected = os.getppid() if parent is None else parent
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        return
    if os.getppid() != expected:  # it died before the system knew
        signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":  # `PID MODULE ...`: becomes `python -m MODULE ...`, asked to end when PID dies
    die_with_parent(int(sys.argv[1]))
    # What the system was told outlives `exec`, so what follows is an ordinary process.
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
