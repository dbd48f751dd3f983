"""The curves: frozen callables from the step to a value.

Each meets its end points exactly and stays between them in floating point. A target decay that rounds to more than 1
would push the target away from the online network, so the bounds are kept by construction and not by luck.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal


def _between(value: float, a: float, b: float) -> float:
    """`value`, moved into the interval that a and b span: rounding may have put it an ulp outside."""
    return min(max(value, min(a, b)), max(a, b))


def line(start: float, end: float, step: int, total: int) -> float:
    """A straight line: `start` at step 0 and before, `end` at step `total` and after."""
    if step >= total:
        return end
    if step <= 0:
        return start
    return _between(start + (end - start) * (step / total), start, end)


def half_cosine(start: float, end: float, step: int, total: int) -> float:
    """Half a cosine wave: `start` at step 0 and before, `end` at step `total` and after."""
    if step >= total:
        return end
    if step <= 0:
        return start
    return _between(end - (end - start) * (math.cos(math.pi * step / total) + 1) / 2, start, end)


@dataclass(frozen=True)
class Constant:
    """The same number at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """`line` over a whole run of `total` steps."""

    start: float
    end: float
    total: int

    def __call__(self, step: int) -> float:
        return line(self.start, self.end, step, self.total)


@dataclass(frozen=True)
class Cosine:
    """`half_cosine` over a whole run of `total` steps."""

    start: float
    end: float
    total: int

    def __call__(self, step: int) -> float:
        return half_cosine(self.start, self.end, step, self.total)


@dataclass(frozen=True)
class Step:
    """`start * factor ** n`, where n milestones (increasing fractions of `total`) have been reached."""

    start: float
    milestones: tuple[float, ...]
    factor: float
    total: int

    def __call__(self, step: int) -> float:
        # Rounded to a step: 0.29 * 100 is 28.999..., and the drop belongs to step 29.
        reached = bisect_right([round(fraction * self.total) for fraction in self.milestones], step)
        return self.start * self.factor**reached


@dataclass(frozen=True)
class WarmupCosine:
    """A line from `start` to `peak` over `warmup` steps, then half a cosine wave to `end` at step `total`."""

    start: float
    peak: float
    end: float
    warmup: int
    total: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return line(self.start, self.peak, step, self.warmup)
        return half_cosine(self.peak, self.end, step - self.warmup, self.total - self.warmup)


@dataclass(frozen=True)
class Piecewise:
    """`values[i]` at step `steps[i]` (never falling), and the shape between two of them; of equal steps the last."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    shape: Literal["linear", "cosine", "step"]

    def __call__(self, step: int) -> float:
        after = bisect_right(self.steps, step)
        if after == 0:
            return self.values[0]
        if after == len(self.steps) or self.shape == "step":
            return self.values[after - 1]
        curve = line if self.shape == "linear" else half_cosine
        begin, end = self.steps[after - 1], self.steps[after]
        return curve(self.values[after - 1], self.values[after], step - begin, end - begin)
