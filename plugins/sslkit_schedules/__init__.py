"""Schedules: numbers that change over a run, as pure functions of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError

from sslkit.api import RunInfo, Schedule
from sslkit.errors import UserError

Fraction = Annotated[float, Field(gt=0, lt=1)]


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
