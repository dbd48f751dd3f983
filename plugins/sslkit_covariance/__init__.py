"""Losses that keep dimensions apart: Barlow Twins, VICReg, VIbCReg, W-MSE and TiCo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from sslkit.api import Loss, RunInfo, Scheduled

if TYPE_CHECKING:
    from torch import nn


class BarlowTwins(Loss):
    """Cross-correlation of two views' projections, driven to the identity (Barlow Twins).

    total = scale * (sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2), where C = A^T B / n for the projections A
    and B of two views, each dimension normalised over the n images of the batch (Zbontar et al. 2021, arXiv 2103.03230,
    equations 1 and 2). As in the authors' code the normalisation is BatchNorm's: the variance is the biased one and
    1e-5 is added to it. The terms that are recorded, `invariance` and `redundancy`, are the two sums.

    More than two views, global or local: the mean over all unordered pairs. No predictor, no target branch.
    """

    off_diagonal: Scheduled = 0.0051
    """Weight of the off-diagonal elements, the paper's lambda: 0.0051 in the authors' code, 5e-3 in the paper."""
    scale: Scheduled = 1.0
    """Factor of the whole loss. LARS undoes it for weights, not for biases and normalisation parameters: the authors'
    rates for those, 0.2 and 0.0048, amount to a scale of 0.024. solo-learn takes 0.1 for CIFAR."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_covariance.barlow_twins import BarlowTwinsLoss

        return BarlowTwinsLoss(self, run)


class VICReg(Loss):
    """Variance, invariance and covariance of the projections of two views (VICReg).

    total = invariance * s + variance * v + covariance * c, for the projections A and B of two views, n images and d
    dimensions (Bardes et al. 2022, arXiv 2105.04906, equations 1 to 6), with the factors of the authors' code:

    - s = mean over images and dimensions of (A - B)^2. Equation 5 has no 1/d.
    - v = (v(A) + v(B)) / 2, v(Z) = mean over dimensions of max(0, threshold - sqrt(var + eps)), var unbiased. Equation
      6 has no 1/2.
    - c = c(A) + c(B), c(Z) = sum over i != j of cov(Z)_ij^2 / d, cov with 1 / (n - 1). As in equations 3, 4 and 6.

    The terms that are recorded are s, v and c, before they are weighted.

    More than two views, global or local: the mean of that over all unordered pairs. No predictor, no target branch.
    """

    invariance: Scheduled = 25.0
    """Weight of the distance between the views, the paper's lambda."""
    variance: Scheduled = 25.0
    """Weight of the hinge on the standard deviation, the paper's mu."""
    covariance: Scheduled = 1.0
    """Weight of the squared covariances, the paper's nu."""
    threshold: Scheduled = 1.0
    """Standard deviation that each dimension should reach, the paper's gamma."""
    eps: PositiveFloat = 1e-4
    """Added to the variance under the root, whose gradient it keeps finite."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_covariance.vicreg import VICRegLoss

        return VICRegLoss(self, run)


class VIbCReg(Loss):
    """VICReg with a covariance term that does not depend on the scale of the dimensions (VIbCReg).

    total = invariance * s + variance * v + covariance * c, for the projections A and B of two views and d dimensions
    (Lee & Aune 2021, arXiv 2109.00783), with the factors of the authors' code:

    - s = mean over images and dimensions of (A - B)^2.
    - v = v(A) + v(B), v(Z) = mean over dimensions of max(0, threshold - sqrt(var + eps)), var unbiased. Twice VICReg's.
    - c = c(A) + c(B), c(Z) = sum over i != j of R_ij^2 / d^2, where R is the matrix of correlations: each dimension is
      centred and brought to length 1 over the batch before the products.

    The terms that are recorded are s, v and c, before they are weighted. The paper's projector ends in IterNorm:
    `output_norm = "iter"` of head.mlp.

    More than two views, global or local: the mean of that over all unordered pairs. No predictor, no target branch.
    """

    invariance: Scheduled = 25.0
    """Weight of the distance between the views, the paper's lambda."""
    variance: Scheduled = 25.0
    """Weight of the hinge on the standard deviation, the paper's mu."""
    covariance: Scheduled = 200.0
    """Weight of the squared correlations, the paper's nu: 200 in the authors' code and solo-learn's."""
    threshold: Scheduled = 1.0
    """Standard deviation that each dimension should reach."""
    eps: PositiveFloat = 1e-4
    """Added to the variance under the root, whose gradient it keeps finite."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_covariance.vicreg import VIbCRegLoss

        return VIbCRegLoss(self, run)


class WMSE(Loss):
    """Distance between whitened projections of two views (W-MSE).

    total = mean over images of 2 - 2 cos(W a, W b), 0..4. The batch is cut at random into parts of `sub_batch` images;
    in each part, and in each view apart, the projections are centred and multiplied by the inverse of the Cholesky
    factor of their covariance (Ermolov et al. 2021, arXiv 2007.06346, section 3). That is done `iterations` times, each
    with a new cut, and averaged. The terms that are recorded are `cosine`, of the whitened projections, and
    `condition`, a lower bound of the largest condition number of the covariances: towards 1e6 float32 can no longer
    whiten.

    A covariance that has no Cholesky factor makes the loss NaN, at which a run stops. The authors never needed
    `eps`: to them this has always pointed at a mistake elsewhere. Where there is none, `eps` or a larger `sub_batch`
    helps.

    More than two views, global or local: the mean over all unordered pairs (the paper's W-MSE 4 has four views). No
    predictor, no target branch. The paper's CIFAR settings are a projector 1024-64 and `sub_batch = 128`.
    """

    sub_batch: PositiveInt = 128
    """Images whitened together. More than the projector's out_dim, for which the authors use twice that; it has to
    divide the batch."""
    iterations: PositiveInt = 1
    """How often the batch is cut and whitened in each step. The authors use 4 for STL-10 and Tiny ImageNet."""
    eps: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the identity in the covariance that is factorised, (1 - eps) * covariance + eps * identity. The authors
    use 0."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_covariance.w_mse import WMSELoss

        return WMSELoss(self, dim, run)


class TiCo(Loss):
    """Invariance, and contrast with a moving average of the projections' second moment (TiCo).

    total = mean of 1 - z.t + rho * mean of z^T C z, over the images of a batch; z are the online projections of one
    view, t the target projections of another, all of length 1. C = beta * C_old + (1 - beta) * Z^T Z / n starts at zero
    and takes in each batch before it is used (Zhu et al. 2022, arXiv 2206.10698, algorithm 1). No gradient flows
    through C, as in the paper's figure and in lightly's code. The terms that are recorded, `invariance` and
    `contrast`, are the two means.

    While C fills, over some 1 / (1 - beta) steps, the loss rises. Local views are never targets. The loss needs a
    target branch, `target_updater.use = "ema"`, and no predictor.
    """

    beta: Scheduled = 0.9
    """How much of C remains at each step, 0 or more and below 1."""
    rho: Scheduled = 8.0
    """Weight of the contrast: 8 in the paper, as lightly cites it; earlier versions of lightly had 20."""
    symmetric: bool = False
    """False, as in lightly's code: z of the first view, t of the second, and no more than two views. True: the mean
    over all ordered pairs of views, t of a global one; C then comes from the projections of all views."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_covariance.tico import TiCoLoss

        return TiCoLoss(self, dim, run)
