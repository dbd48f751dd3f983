"""How rules read curves: what is meant by now, by the start, by growing, by the quality of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sslkit.rules import Course, Points

NEWEST = 3
"""Records whose median stands for now: one alone may be an accident of its batch."""


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a record."""
    value = record.get(key)
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def now(values: Sequence[float]) -> float:
    """The median of the newest values."""
    return median(values[-NEWEST:])


def window(values: Sequence[float], most: int = 5) -> int:
    """How many values `smooth` takes a median of: fewer where there are few in all, as of a log with one an epoch."""
    return max(1, min(most, len(values) // 8))


def smooth(values: Sequence[float]) -> list[float]:
    """Medians of the newest values at each place."""
    width = window(values)
    return [median(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def since(points: Points, holds: Sequence[bool]) -> int | None:
    """The step from which on something has held without a break up to the newest record; None if it does not hold."""
    first = None
    for step, true in zip(reversed(points.steps), reversed(holds), strict=True):
        if not true:
            break
        first = step
    return first


def far(course: Course, share: float, epochs: float, key: str | None = None) -> bool:
    """Whether a share of the run is over; of a run whose length is not known, whether so many epochs are, and of one
    whose epochs are not known either, whether 100 steps for each are.

    With `key`, whether they were when that was measured last.
    """
    points = course.points(key) if key else Points([course.step], [course.epoch], [])
    step, epoch = points.steps[-1], points.epochs[-1]
    total = _total(course)
    if total:
        return step / total >= share
    return epoch >= epochs if epoch > 0 else step >= 100 * epochs


def lasted(course: Course, first: int, share: float, most: int) -> bool:
    """Whether something has lasted since step `first` for a share of the run, or for `most` steps.

    Of a run whose length is not known, the share is twice that of what there is so far, and some of it has to be.
    """
    length, total = course.step - first, _total(course)
    if total:
        return length >= min(most, share * total)
    return length >= most or (length >= 2 * share * course.step and far(course, share, 2))


def _total(course: Course) -> int | None:
    """How long the whole run is."""
    return course.facts.total_steps or (course.step if course.status.get("status") == "done" else None)


# ---------------------------------------------------------------- quality


@dataclass(frozen=True)
class Quality:
    """kNN accuracy so far, or the probe's."""

    key: str
    steps: list[int]
    values: list[float]
    noise: float
    """Two standard errors of one measurement: smaller differences are chance."""
    floor: float | None
    """The random network's, at step 0; None if it was not measured, or the run began with another's weights."""

    @property
    def best(self) -> float:
        """The highest so far."""
        return max(self.values)

    @property
    def last(self) -> float:
        """The newest."""
        return self.values[-1]

    @property
    def grew(self) -> bool:
        """Whether features are clearly better than the random network's, or than at first, and have not lost it."""
        # A probe gets better while features stay as they are, so it has to show more.
        start = self.values[0] + 2 * self.noise if self.floor is None else self.floor
        return self.last > start + self.noise and self.last >= self.best - max(self.noise, 0.1 * self.best)

    @property
    def lost(self) -> bool:
        """Whether features are no better than the random network's."""
        return self.floor is not None and len(self.values) > 2 and self.last <= self.floor + self.noise / 2

    @property
    def said(self) -> str:
        """`kNN .144 at step 0, .31 at step 168`."""
        name = "kNN" if self.key == "knn_top1" else "the probe"
        if len(self.values) == 1:
            return f"{name} {self.last:.3f} at step {self.steps[-1]}"
        return f"{name} {self.values[0]:.3f} at step {self.steps[0]}, {self.last:.3f} at step {self.steps[-1]}"


def quality(course: Course, key: str | None = None) -> Quality | None:
    """kNN where it was measured, else the probe; None where neither was."""
    for name in (key,) if key else ("knn_top1", "probe_top1"):
        points = course.points(name)
        if name == "probe_top1":  # at step 0 a probe has learnt nothing yet, and its accuracy is no floor
            none = points.steps.count(0)
            points = Points(points.steps[none:], points.epochs[none:], points.values[none:])
        if points.values:
            images = course.last("knn_queries") or 1000.0
            noise = max(0.01, 2 * math.sqrt(0.25 * 0.75 / max(images, 1.0)))
            random = points.steps[0] == 0 and not course.facts.begins_learnt
            floor = points.values[0] if name == "knn_top1" and random else None
            return Quality(name, points.steps, points.values, noise, floor)
    return None


def grew(course: Course) -> bool:
    """Whether kNN or the probe shows that something is being learnt."""
    return any(q.grew for q in (quality(course, "knn_top1"), quality(course, "probe_top1")) if q is not None)
