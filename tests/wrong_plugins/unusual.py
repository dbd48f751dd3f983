"""Components that are right in ways that few are: no check may fail them."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from sslkit.api import DataInfo, DataSource, Loss, Optimizer, ParamGroup, RunInfo, ViewGenerator


class ThreeViews(Loss):
    """An anchor is nearer to the second view than to the third."""

    def build(self, dim: int, run: RunInfo) -> Any:
        from wrong_plugins.unusual_parts import Triplet

        return Triplet()


class ManyLocal(Loss):
    """Every view near the mean of all, of which four at least are local."""

    def build(self, dim: int, run: RunInfo) -> Any:
        from wrong_plugins.unusual_parts import NearTheMean

        return NearTheMean()


class OnEmbeddings(Loss):
    """Squared distance between what the backbone makes of two views; the projector is left alone."""

    def build(self, dim: int, run: RunInfo) -> Any:
        from wrong_plugins.unusual_parts import BelowTheProjector

        return BelowTheProjector()


class Lookahead(Optimizer):
    """Gradient descent, and slow weights that follow it, whatever the rate (Zhang et al. 2019, arXiv 1907.08610)."""

    every: PositiveInt = 2
    """After so many steps the slow weights go halfway, and the fast ones to them."""

    def build(self, groups: list[ParamGroup], run: RunInfo) -> Any:
        from wrong_plugins.unusual_parts import SlowWeights

        return SlowWeights([g.as_torch() for g in groups], self.every)


class Cutting(ViewGenerator):
    """Two views, of squares or of originals: mirrored at random, and brighter or darker."""

    strength: float = 0.4
    """How much brighter or darker."""

    def build(self, run: RunInfo) -> Any:
        from wrong_plugins.unusual_parts import CutMirrored

        return CutMirrored(run, self.strength)


class OfManySizes(DataSource):
    """Noise of many sizes, in two shards."""

    number: PositiveInt = 20
    """How many images."""

    def build(self, info: DataInfo) -> Any:
        from wrong_plugins.right_parts import Opened
        from wrong_plugins.unusual_parts import ManySizes

        opened = Opened(1)
        opened.train = ManySizes(self.number)
        return opened


UNUSUAL = [ThreeViews(), ManyLocal(), OnEmbeddings(), Lookahead(lr=0.1), Cutting(), OfManySizes()]
