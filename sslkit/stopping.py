"""How a run is asked to end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 set a flag, which the loop polls; the same signal again takes its usual course."""

    also: Callable[[], bool] = lambda: False
    """Another way to ask."""
    received: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignals:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            # A handler that is not Python's could not be put back, so it is left in place.
            if number is not None and signal.getsignal(number) is not None:
                try:
                    self._before[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread: whoever runs us there stops us in their own way
                    break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def word(self) -> int:
        """Why the run is to end: the signal that came, 1 if it was asked in the other way, 0 if it is to go on."""
        return self.received or int(self.also())

    def asked(self) -> bool:
        """True once a signal came, or once it was asked in the other way."""
        return self.received is not None or self.also()
