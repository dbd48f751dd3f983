"""VICReg and VIbCReg: invariance, variance and covariance terms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms
from sslkit.nn import ScheduledNumber, unit
from sslkit_covariance import VIbCReg, VICReg
from sslkit_covariance.pairs import PairLoss, centred, mean, unordered


class VICRegLoss(PairLoss):
    """Branches -> the weighted sum of three terms, averaged over pairs of views."""

    name = "vicreg"
    hinges = 1
    """How often the mean of the views' hinges counts: once, (v(A) + v(B)) / 2 for two views; VIbCReg has their sum."""

    def __init__(self, options: VICReg | VIbCReg, run: RunInfo) -> None:
        super().__init__()
        self.invariance = ScheduledNumber(options.invariance, run, "loss.invariance", least=0)
        self.variance = ScheduledNumber(options.variance, run, "loss.variance", least=0)
        self.covariance = ScheduledNumber(options.covariance, run, "loss.covariance", least=0)
        self.threshold = ScheduledNumber(options.threshold, run, "loss.threshold", least=0)
        self.eps = options.eps

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, and its three terms before they are weighted.

        Raises:
            UserError: a view has no projection.
        """
        views = self.projections(branches)
        invariance = mean(F.mse_loss(a, b) for a, b in unordered(views))
        # All views are in as many pairs: the mean over pairs of c(A) + c(B) is twice the mean over views of c(Z).
        variance = self.hinges * mean(self.hinge(z) for z in views)
        covariance = 2 * mean(self.dependence(z) for z in views)
        total = self.invariance() * invariance + self.variance() * variance + self.covariance() * covariance
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return LossTerms(total, {name: term.detach() for name, term in terms.items()})

    def hinge(self, projections: Tensor) -> Tensor:
        """How far the standard deviations of `[B, d]` lie below the threshold, on average."""
        deviations = (projections.var(0) + self.eps).sqrt()
        return F.relu(self.threshold() - deviations).mean()

    def dependence(self, projections: Tensor) -> Tensor:
        """Sum of the squared covariances of different dimensions, over the number of dimensions."""
        z = centred(projections)
        covariance = z.T @ z / (len(z) - 1)
        return covariance.square().fill_diagonal_(0).sum() / z.shape[1]


class VIbCRegLoss(VICRegLoss):
    """VICReg with correlations in place of covariances, averaged over all d^2 elements."""

    name = "vibcreg"
    hinges = 2

    def dependence(self, projections: Tensor) -> Tensor:
        """Mean of the squared correlations, those of a dimension with itself counted as 0."""
        dimensions = unit(centred(projections).T)
        correlation = dimensions @ dimensions.T
        return torch.mean(correlation.square().fill_diagonal_(0))
