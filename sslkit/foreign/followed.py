"""A number that was seen at some steps of a run. No torch."""

from __future__ import annotations

from array import array

from sslkit.rules import Trajectory


class Followed:
    """A number that may be another one at each step; only its changes are kept."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")

    def note(self, step: int, value: float) -> None:
        """The value that the update after `step` used."""
        if not self.values or value != self.values[-1]:
            self.steps.append(step)
            self.values.append(value)

    @property
    def constant(self) -> bool:
        """Whether it has been the same at every step so far."""
        return len(self.values) == 1

    def trajectory(self, steps: int) -> Trajectory:
        """All of it, up to a step."""
        at = 0

        def value(step: int) -> float:
            nonlocal at
            if self.steps[at] > step:
                at = 0
            while at + 1 < len(self.steps) and self.steps[at + 1] <= step:
                at += 1
            return self.values[at]

        return Trajectory.of(value, steps)
