"""Barlow Twins: the cross-correlation of two views against the identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms
from sslkit.nn import ScheduledNumber
from sslkit_covariance import BarlowTwins
from sslkit_covariance.pairs import PairLoss, mean, unordered


class BarlowTwinsLoss(PairLoss):
    """Branches -> scale * (invariance + off_diagonal * redundancy), averaged over pairs of views."""

    name = "barlow_twins"

    def __init__(self, options: BarlowTwins, run: RunInfo) -> None:
        super().__init__()
        self.off_diagonal = ScheduledNumber(options.off_diagonal, run, "loss.off_diagonal", least=0)
        self.scale = ScheduledNumber(options.scale, run, "loss.scale", above=0)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, and its two sums before they are weighted.

        Raises:
            UserError: a view has no projection.
        """
        views = [standardised(p) for p in self.projections(branches)]
        correlations = [cross_correlation(a, b) for a, b in unordered(views)]
        invariance = mean((1 - torch.diagonal(c)).square().sum() for c in correlations)
        redundancy = mean(c.square().fill_diagonal_(0).sum() for c in correlations)
        total = self.scale() * (invariance + self.off_diagonal() * redundancy)
        return LossTerms(total, {"invariance": invariance.detach(), "redundancy": redundancy.detach()})


def standardised(projections: Tensor) -> Tensor:
    """`[B, d]` with mean 0 and variance 1 over the batch, as BatchNorm without scale and shift does it."""
    return F.batch_norm(projections, None, None, training=True)


def cross_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Two standardised `[B, d]` -> `[d, d]`."""
    return a.T @ b / len(a)
