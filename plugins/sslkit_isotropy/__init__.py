"""Losses that spread a batch over all directions alike: LeJEPA and EMP-SSL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from sslkit.api import Loss, RunInfo, Scheduled

if TYPE_CHECKING:
    from torch import nn


class LeJEPA(Loss):
    """Views predict the mean of the global views, and projections follow a standard normal (LeJEPA).

    (1 - sigreg) * prediction + sigreg * SIGReg (Balestriero & LeCun 2025, arXiv 2511.08544), where

    - prediction is the squared distance between a view's projection and the mean of the global views' projections,
      averaged over views, images and dimensions as in the paper's algorithm 2 (its formula sums over dimensions). The
      mean takes gradient as well.
    - SIGReg is n times the integral over t of |phi_n(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), averaged over random
      directions and over views. phi_n is the empirical characteristic function, over the n images of the batch, of one
      view's projections along one direction of length 1 (algorithm 1; the statistic of Epps & Pulley 1983). Directions
      are drawn anew at every step.

    For projections that are standard normal SIGReg is about 1, whatever the size of the batch; where all are equal it
    grows with n. Every view is used, local or global; at least one has to be global. There is no target and no
    predictor: use `target_updater.none`. The paper takes 2 global and 8 local views and batches of 128 or more. SIGReg
    sets the scale of the projections, so that the projector's last layer should be linear, without normalisation.
    """

    sigreg: Scheduled = 0.05
    """Share of SIGReg in the loss, the paper's lambda, above 0 and at most 1. The paper recommends 0.05; the authors'
    minimal example (ImageNette, 16 dimensions) uses 0.02."""
    slices: PositiveInt = 1024
    """Random directions a step. The paper recommends 1024; the authors' minimal example uses 256."""
    knots: Annotated[int, Field(ge=2)] = 17
    """Points of the trapezoidal rule from t = 0 to `t_max`. The integrand is even, so that they count for -t as well:
    `knots = 9` with `t_max = 5.0` are the 17 points on [-5, 5] of the paper."""
    t_max: PositiveFloat = 3.0
    """Where the integral ends: 3 in the authors' code, 5 in the paper. A larger one looks at finer detail of the
    distribution."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_isotropy.lejepa import LeJEPALoss

        return LeJEPALoss(self, run)


class EMPSSL(Loss):
    """Views agree with their mean, and every view's batch keeps a high total coding rate (EMP-SSL).

    Minimises the mean over views of -R(Z) - invariance * cos (Tong et al. 2023, arXiv 2304.03977), where

    - R(Z) = 1/2 log det(I + d / (n eps) Z^T Z) is the total coding rate of one view's projections Z, `[n, d]`, of
      length 1 (Yu et al. 2020): large where they fill all directions, and the reason that they do not collapse.
    - cos is the cosine similarity between a projection and the mean over all views of the same image's projections,
      averaged over the batch.

    Every view counts alike, local or global, and there may be any number of two or more: the paper takes 20 to 200
    patches of one size. There is no target and no predictor: use `target_updater.none`. The loss is negative, and lower
    is better. The coding rate grows with `dim` and with the batch, so that runs which differ in these cannot be
    compared by it.
    """

    invariance: Scheduled = 200.0
    """Weight of the cosine similarity, above 0: the paper's lambda."""
    eps: Scheduled = 0.2
    """Precision to which the projections are coded, above 0: what the paper's formula calls epsilon squared, and sets
    to 0.2. Smaller asks for more spread."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_isotropy.emp_ssl import EMPSSLLoss

        return EMPSSLLoss(self, run)
