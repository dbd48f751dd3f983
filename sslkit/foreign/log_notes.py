"""What a curve of losses says by itself: facts of a log in words, one line each. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Literal

from sslkit.rules import Points, Trajectory

LogLoss = Literal["byol", "simsiam", "other"]
COSINE: Mapping[LogLoss | None, Callable[[float], float]] = {
    "byol": lambda loss: 1 - loss / 4,
    "simsiam": lambda loss: -loss,
}
"""The mean cosine that a loss stands for: BYOL's sum of 2 - 2 cos over both directions, SimSiam's mean of -cos."""
FORMS: Mapping[LogLoss | None, str] = {
    "byol": "BYOL's sum of 2 - 2 cos over both directions",
    "simsiam": "SimSiam's mean of -cos",
}
UNLEARNT = 5.0
"""Above 4, which is BYOL's loss of vectors that have nothing to do with each other, by what chance makes of it where
all outputs are nearly one vector: the cosine of two random ones of 128 dimensions is seldom below -.25."""
NEARLY_NONE = 0.05
"""The cosine of outputs that have nothing to do with each other is about 0, on either side."""
SHOWN = 24
"""At most how many figures of a curve are written out."""
RISEN = 1.5
"""How many times the minimum a later loss has to be, to speak of a rise; less is common."""


def stands_for(losses: Sequence[float], form: LogLoss | None) -> list[float] | None:
    """The losses as cosines, by what the user says that they are; None if they are not, or it was not said."""
    convert = COSINE.get(form)
    found = [convert(loss) for loss in losses] if convert else []
    return found if found and all(abs(value) <= 1 + 1e-6 for value in found) else None


def may_be_byols(losses: Sequence[float]) -> bool:
    """Whether losses that nothing was said of may be BYOL's: those of networks that know nothing are about 4."""
    return bool(losses) and all(0 <= loss <= UNLEARNT for loss in losses)


def may_be_simsiams(losses: Sequence[float]) -> bool:
    """Whether losses that nothing was said of may be a mean of -cos: no other loss here stays between -1 and 0."""
    return bool(losses) and all(-1 - 1e-6 <= loss <= NEARLY_NONE for loss in losses) and min(losses) < -NEARLY_NONE


def cosine(losses: Sequence[float], form: LogLoss | None) -> list[str]:
    """The losses as cosines; as BYOL's if they may be that and it is not known what they are, and said so."""
    if form in COSINE and losses and stands_for(losses, form) is None:
        worst = max((COSINE[form](loss) for loss in losses), key=abs)
        return [
            f"the losses are not {FORMS[form]}: they would stand for a cosine of {worst:.3g}; they were taken for "
            "another loss (--loss other)"
        ]
    taken = form or ("simsiam" if may_be_simsiams(losses) else "byol")
    found = stands_for(losses, taken)
    if found is None or (form is None and taken == "byol" and not may_be_byols(losses)):
        return []
    shown = [f"{value:.3f}".replace("0.", ".") for value in found[:: math.ceil(len(found) / SHOWN)]]
    words = "-loss" if taken == "simsiam" else f"1 - loss/4, for {FORMS['byol']}"
    if form is None and taken == "simsiam":
        words += f": losses between -1 and 0 were taken for {FORMS['simsiam']}; --loss says otherwise"
    elif form is None:
        words += ", if the loss is that: --loss"
    return [f"cosine {' '.join(shown)} ({words})"]


# ---------------------------------------------------------------- what knowing nothing costs

QUEUES = tuple(2**power for power in range(12, 17))
"""Lengths of queues, and numbers of prototypes, that are usual: 4096 to 65536."""
EXACT, ROUGHLY = 0.001, 0.01
"""How near the first losses have to be to ln M, as a share: where M is a guess, and where it follows from the batch."""


def blank(losses: Sequence[float], batch: int | None) -> tuple[float, str] | None:
    """What outputs that say nothing of the image cost, with the formula: ln M, if the first losses are that.

    M is 2 batch - 1 for NT-Xent, the batch for losses over it, and the length of a queue, where one more makes no
    difference, or the number of prototypes. Without a batch only 65536 is thought of: MoCo's queue, DINO's prototypes.
    """
    if not losses:
        return None
    candidates = [(size, EXACT) for size in (QUEUES if batch else QUEUES[-1:])]
    if batch and batch > 1:
        candidates += [(2 * batch - 1, ROUGHLY), (batch, ROUGHLY)]
    first = median(losses[:3])
    near = [
        (abs(first - math.log(number)), number)
        for number, share in candidates
        if abs(first - math.log(number)) <= share * math.log(number)
    ]
    if not near:
        return None
    _, number = min(near)
    return math.log(number), f"ln {number}"


def byols_tau(base: float, epochs: int | None) -> str:
    """What tau should have been, where only its base is known."""
    half = f" (epoch {epochs / 2:g})" if epochs else ""
    return (
        f"tau is not known; BYOL's own, 1 - (1 - base) (cos(pi k/K) + 1) / 2, is {base:.4f} at the start, "
        f"{(1 + base) / 2:.4f} halfway{half} and 1 at the end"
    )


@dataclass(frozen=True)
class _Curve:
    """The loss by epochs, or by steps where epochs are not known; means where there are several records of one."""

    places: list[int]
    values: list[float]
    unit: str

    @classmethod
    def of(cls, points: Points, unit: str) -> _Curve:
        """Collect records."""
        places = [math.floor(epoch) for epoch in points.epochs] if unit == "epoch" else points.steps
        groups = [
            (place, [value for _, value in group])
            for place, group in groupby(zip(places, points.values, strict=True), key=lambda point: point[0])
        ]
        return cls([place for place, _ in groups], [sum(v) / len(v) for _, v in groups], unit)

    @property
    def bottom(self) -> int:
        """Where the loss is least."""
        return min(range(len(self.values)), key=self.values.__getitem__)

    @property
    def top(self) -> int:
        """Where it is largest from there on."""
        return max(range(self.bottom, len(self.values)), key=self.values.__getitem__)

    @property
    def risen(self) -> bool:
        """Whether that is a rise to speak of."""
        return self.values[self.bottom] > 0 and self.values[self.top] >= RISEN * self.values[self.bottom]

    def said(self, number: int) -> str:
        """`epoch 4 (0.0054)`."""
        return f"{self.unit} {self.places[number]} ({self.values[number]:.4g})"


def curve(
    points: Points, tau: Trajectory | None, *, whole: int | None, per_epoch: int, first: int, may_be_byol: bool
) -> list[str]:
    """Minimum, peak, where the rise begins, and what the fall afterwards is worth.

    Args:
        points: the losses.
        tau: how the target's tau went, if that is known.
        whole: epochs of the run, if that is known.
        per_epoch: steps of an epoch.
        first: what the log calls its first epoch.
        may_be_byol: whether the loss is, or may be, BYOL's.
    """
    losses = _Curve.of(points, "epoch" if whole is not None else "step")
    if len(losses.values) < 3:
        return []
    low, high, last = losses.bottom, losses.top, len(losses.values) - 1
    if not losses.risen:
        after = "" if high == low else f"; afterwards at most {losses.values[high]:.4g}"
        return [f"loss minimum at {losses.said(low)}{after}"]
    times = losses.values[high] / losses.values[low]
    notes = [f"loss minimum at {losses.said(low)}, peak at {losses.said(high)} = {times:.{0 if times > 10 else 1}f}x"]
    onset = None
    if whole is not None:
        onset = _onset(losses.places[low + 1], first, tau, whole, per_epoch, may_be_byol)
    notes += [onset] if onset else []
    if last > high and losses.values[last] <= losses.values[high] / RISEN:
        places = f"{losses.unit} {losses.places[high + 1]}"
        if last > high + 1:
            places = f"{losses.unit}s {losses.places[high + 1]}-{losses.places[last]}"
        notes.append(
            f"the fall at {places} is probably a frozen target, not recovery: weights that have grown hardly turn any "
            "more, and BatchNorm hides their size" if onset
            else f"the fall at {places} is not by itself a recovery: a metric of quality would tell"
        )  # fmt: skip
    return notes


def _onset(
    begins: int, first: int, tau: Trajectory | None, whole: int, per_epoch: int, may_be_byol: bool
) -> str | None:
    """Whether the loss begins to rise where tau reaches 1, or would by a formula without the `+ 1`; in words."""
    place = begins - first
    if tau is not None:
        if tau.above_one is None:
            return None
        crossing = tau.above_one[0] / per_epoch
        # A tau of exactly 1, which the thread's formula has for an epoch before it is above, already stops the target.
        if not crossing - 1.5 <= place <= crossing + 1:
            return None
        above = f"{crossing + first:.3g}"
        return f"the onset matches tau: the rise begins at epoch {begins}, tau is above 1 from epoch {above} on"
    if not may_be_byol or abs(place - whole / 2) > 0.5:
        return None
    return (
        f"the rise begins at epoch {begins}, halfway through {whole}: there cos(pi k/K) passes 0, and BYOL's tau "
        "without its '+ 1', 1 - (1 - base) cos(pi k/K) / 2, passes 1; look at that first (--tau-formula examines it)"
    )
