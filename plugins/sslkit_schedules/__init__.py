"""Schedules: numbers that change over a run, as pure functions of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError

from sslkit.api import RunInfo, Schedule
from sslkit.errors import UserError

Fraction = Annotated[float, Field(gt=0, lt=1)]


def _pairs(points: object) -> tuple[tuple[float, float], ...]:
    """A recipe's lists as tuples; and one line about what is no list of pairs, where pydantic has one a number."""

    def is_pair(point: object) -> bool:
        return (
            isinstance(point, list | tuple)
            and len(point) == 2
            and all(isinstance(number, int | float) and not isinstance(number, bool) for number in point)
        )

    if not isinstance(points, list | tuple) or not all(map(is_pair, points)):
        raise PydanticCustomError("points", "should be pairs of a position and a value, [[0.0, 0.04], [0.3, 0.07]]")
    return tuple((position, value) for position, value in points)


class Constant(Schedule):
    """The same number at every step."""

    value: float
    """The number."""

    def build(self, run: RunInfo) -> Callable[[int], float]:
        from sslkit_schedules.curves import Constant as Curve

        return Curve(self.value)


class Linear(Schedule):
    """A straight line from `start` at step 0 to `end` at the end of the run."""

    start: float
    """Value at step 0."""
    end: float
    """Value at the last step."""

    def build(self, run: RunInfo) -> Callable[[int], float]:
        from sslkit_schedules.curves import Linear as Curve

        return Curve(self.start, self.end, run.total_steps)


class Cosine(Schedule):
    """Half a cosine wave from `start` at step 0 to `end` at the end of the run.

    At step k of K: end - (end - start) * (cos(pi * k / K) + 1) / 2. With `end = 1` this is the target decay of BYOL
    (Grill et al. 2020, section 3.3), which lies in [start, 1] and never falls. It depends on the
    optimizer step, not on the epoch.
    """

    start: float
    """Value at step 0."""
    end: float
    """Value at the last step."""

    def build(self, run: RunInfo) -> Callable[[int], float]:
        from sslkit_schedules.curves import Cosine as Curve

        return Curve(self.start, self.end, run.total_steps)


class Step(Schedule):
    """A staircase: multiplied by `factor` at each milestone.

    The milestones are fractions of the run, so that a longer run keeps its shape: MoCo's drops at epochs 120 and 160
    of 200 (He et al. 2020, section 4) are `milestones = [0.6, 0.8]`.
    """

    start: float
    """Value before the first milestone."""
    milestones: tuple[Fraction, ...]
    """Where the value drops, as increasing fractions of the run, between 0 and 1."""
    factor: PositiveFloat = 0.1
    """What the value is multiplied by at each milestone."""

    @model_validator(mode="after")
    def _in_order(self) -> Step:
        if not self.milestones or any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise PydanticCustomError(
                "milestones", "'milestones' should be one or more increasing fractions of the run"
            )
        return self

    def build(self, run: RunInfo) -> Callable[[int], float]:
        from sslkit_schedules.curves import Step as Curve

        return Curve(self.start, self.milestones, self.factor, run.total_steps)


class WarmupCosine(Schedule):
    """A straight line from `start` to `peak`, then half a cosine wave to `end`.

    The learning rate of BYOL (Grill et al. 2020, section 3.3), SimCLR and most that followed: a linear warm-up of 10
    epochs from 0, then a cosine to 0 without restarts (Loshchilov & Hutter 2017). Exactly one of `warmup_epochs` and
    `warmup_steps` says how long the warm-up is. Update s takes the value at step s - 1, so with `start = 0` the first
    update moves nothing; solo-learn starts at 3e-5.
    """

    peak: float
    """Value at the end of the warm-up, where the cosine begins."""
    warmup_epochs: NonNegativeFloat | None = None
    """Length of the warm-up in epochs; instead of `warmup_steps`."""
    warmup_steps: NonNegativeInt | None = None
    """Length of the warm-up in optimizer steps; instead of `warmup_epochs`."""
    start: float = 0.0
    """Value at step 0."""
    end: float = 0.0
    """Value at the last step."""

    @model_validator(mode="after")
    def _one_length(self) -> WarmupCosine:
        if (self.warmup_epochs is None) == (self.warmup_steps is None):
            raise PydanticCustomError("warmup", "needs exactly one of 'warmup_epochs' and 'warmup_steps'")
        return self

    def build(self, run: RunInfo) -> Callable[[int], float]:
        from sslkit_schedules.curves import WarmupCosine as Curve

        warmup = self.warmup_steps
        if warmup is None:
            warmup = round((self.warmup_epochs or 0.0) * run.steps_per_epoch)
        if warmup >= run.total_steps:
            option = "warmup_steps" if self.warmup_epochs is None else "warmup_epochs"
            raise UserError(
                f"schedule 'warmup_cosine': a warm-up of {warmup} steps leaves nothing of a run of {run.total_steps} "
                f"steps; lower {option} or train longer"
            )
        return Curve(self.start, self.peak, self.end, warmup, run.total_steps)


class Piecewise(Schedule):
    """Given values at given positions of the run, and a line, half a cosine wave or a step between them.

    Before the first point the value is the first point's, after the last the last's. Positions are rounded to whole
    optimizer steps, where the values are met exactly; of points that fall on the same step the last counts. Uses:

    - The teacher's temperature of DINO (Caron et al. 2021, arXiv 2104.14294, section 3.2), 0.04 to 0.07 over the first
      30 epochs: `{ use = "piecewise", unit = "epochs", points = [[0, 0.04], [30, 0.07]] }`.
    - A warm-up without a decay: `points = [[0, 0], [0.1, 0.3]]`; with one: `[[0, 0], [0.1, 0.3], [0.8, 0.3], [1, 0]]`.
    - A tau in stages: `shape = "step"`, `points = [[0, 0.99], [0.5, 0.996], [0.8, 0.999]]`.
    """

    points: Annotated[tuple[tuple[float, float], ...], BeforeValidator(_pairs)]
    """Two or more pairs of a position and the value there, with increasing positions: `[[0.0, 0.04], [0.3, 0.07]]`."""
    unit: Literal["fraction", "epochs", "steps"] = "fraction"
    """What positions count. `fraction`: 0 is the start and 1 the end of the run, and a longer run keeps its shape.
    `epochs` and `steps` (of the optimizer, whole numbers): a point stays where it is, and has to lie within the run."""
    shape: Literal["linear", "cosine", "step"] = "linear"
    """How the value gets from one point to the next: on a line, on half a cosine wave, or in one jump as it is met."""

    @model_validator(mode="after")
    def _in_order(self) -> Piecewise:
        positions = [position for position, _ in self.points]
        if len(positions) < 2 or any(later <= earlier for earlier, later in pairwise(positions)):
            raise PydanticCustomError("points", "'points' should be two or more [position, value] of rising position")
        if positions[0] < 0:
            raise PydanticCustomError("points", "'points' should not begin before position 0, the start of the run")
        if self.unit == "fraction" and positions[-1] > 1:
            raise PydanticCustomError(
                "points",
                "'points' should end at position 1, the end of the run, or before; for positions in epochs or in "
                "steps say so: unit = 'epochs'",
            )
        if self.unit == "steps" and not all(position.is_integer() for position in positions):
            raise PydanticCustomError("points", "'points' should have whole numbers for positions in steps")
        return self

    def build(self, run: RunInfo) -> Callable[[int], float]:
        from sslkit_schedules.curves import Piecewise as Curve

        scale = {"fraction": run.total_steps, "epochs": run.steps_per_epoch, "steps": 1}[self.unit]
        steps = tuple(round(position * scale) for position, _ in self.points)
        if steps[-1] > run.total_steps:
            length = f"{run.total_steps / run.steps_per_epoch:g} epochs of {run.steps_per_epoch} steps"
            raise UserError(
                f"schedule 'piecewise': the point at {self.points[-1][0]:g} {self.unit} lies beyond the end of the run "
                f"({length}); lower it, train longer, or give positions as fractions of the run: unit = 'fraction'"
            )
        return Curve(steps, tuple(value for _, value in self.points), self.shape)
