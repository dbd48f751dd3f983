"""One component of each kind that does everything right, in as few lines as it takes."""

from __future__ import annotations

from typing import Any

from sslkit.api import (
    Backbone,
    DataInfo,
    DataSource,
    Head,
    Loss,
    Observer,
    Optimizer,
    ParamGroup,
    RunInfo,
    Schedule,
    TargetUpdater,
    ViewGenerator,
)


class RightBackbone(Backbone):
    """Mean and spread of each channel, and a linear map."""

    width: int = 6
    """Width of the features."""

    def build(self, run: RunInfo) -> Any:
        from wrong_plugins.right_parts import Moments

        return Moments(run.channels, self.width)


class RightHead(Head):
    """A linear map and BatchNorm."""

    out_dim: int = 5
    """Width of the output."""

    def build(self, in_dim: int, run: RunInfo) -> Any:
        from wrong_plugins.right_parts import Linear

        return Linear(in_dim, self.out_dim)


class RightLoss(Loss):
    """Squared distance between two views and from a moving centre."""

    momentum: float = 0.9
    """How much of the centre remains at each step."""

    def build(self, dim: int, run: RunInfo) -> Any:
        from wrong_plugins.right_parts import Distance

        return Distance(dim, self.momentum)


class RightTarget(TargetUpdater):
    """A moving average."""

    keep: float = 0.9
    """How much of the target remains at each step."""

    def build(self, run: RunInfo) -> Any:
        from wrong_plugins.right_parts import Average

        return Average(self.keep)


class RightViews(ViewGenerator):
    """Two views: mirrored at random, and brighter or darker."""

    strength: float = 0.4
    """How much brighter or darker."""

    def build(self, run: RunInfo) -> Any:
        from wrong_plugins.right_parts import Mirrored

        return Mirrored(run, self.strength)


class RightSource(DataSource):
    """Noise in two classes."""

    number: int = 12
    """How many images."""

    def build(self, info: DataInfo) -> Any:
        from wrong_plugins.right_parts import Opened

        return Opened(self.number)


class RightOptimizer(Optimizer):
    """Gradient descent with momentum."""

    momentum: float = 0.9
    """How much of the last step remains."""

    def build(self, groups: list[ParamGroup], run: RunInfo) -> Any:
        from wrong_plugins.right_parts import Descent

        return Descent([g.as_torch() for g in groups], self.momentum)


class RightSchedule(Schedule):
    """A straight line from 1 to 0."""

    def build(self, run: RunInfo) -> Any:
        return lambda step: 1 - step / run.total_steps


class RightObserver(Observer):
    """Counts steps."""

    def build(self, run: RunInfo) -> Any:
        from wrong_plugins.right_parts import Counter

        return Counter()


RIGHT = [
    RightBackbone(), RightHead(), RightLoss(), RightTarget(), RightViews(), RightSource(), RightOptimizer(lr=0.1),
    RightSchedule(), RightObserver(),
]  # fmt: skip
