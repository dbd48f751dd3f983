"""W-MSE: the distance between projections that were whitened in random parts of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms
from sslkit.errors import UserError
from sslkit.nn import unit
from sslkit_covariance import WMSE
from sslkit_covariance.pairs import PairLoss, centred, mean, unordered


class WMSELoss(PairLoss):
    """Branches -> 2 - 2 cos of whitened projections, averaged over images, pairs of views and cuts of the batch.

    Raises:
        UserError: `sub_batch` is too small to whiten `dim` dimensions, or does not divide the batch.
    """

    name = "w_mse"

    def __init__(self, options: WMSE, dim: int, run: RunInfo) -> None:
        super().__init__()
        self.sub_batch, self.iterations, self.eps = options.sub_batch, options.iterations, options.eps
        if self.sub_batch <= dim:
            raise UserError(
                f"loss.sub_batch: is {self.sub_batch}, and so few images cannot whiten the projector's {dim} "
                f"dimensions; use more than {dim}, best {2 * dim} or more, or a smaller projector.out_dim"
            )
        self._check_batch(run.batch_size)

    def _check_batch(self, images: int) -> None:
        if images % self.sub_batch:
            raise UserError(
                f"loss.sub_batch: {self.sub_batch} does not divide the batch of {images} images; choose "
                f"train.batch_size a multiple of loss.sub_batch"
            )

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, the mean cosine similarity after whitening, and how ill-conditioned the covariances are.

        Raises:
            UserError: a view has no projection, or `sub_batch` does not divide the batch.
        """
        views = torch.stack(self.projections(branches))
        self._check_batch(views.shape[1])
        similarities, conditions = [], []
        for _ in range(self.iterations):
            order = torch.randperm(views.shape[1], device=views.device)
            parts = views[:, order].unflatten(1, (-1, self.sub_batch))
            white, condition = whitened(parts, self.eps)
            similarities += [(a * b).sum(-1).mean() for a, b in unordered(unit(white).unbind())]
            conditions.append(condition)
        cosine = mean(similarities)
        return LossTerms(2 - 2 * cosine, {"cosine": cosine.detach(), "condition": torch.stack(conditions).amax()})


def whitened(parts: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`[..., n, d]` -> the same with mean 0 and covariance 1 over the n images, and a bound of the condition number.

    Where a covariance has no Cholesky factor, its part is NaN.
    """
    centre = centred(parts)
    covariance = centre.mT @ centre / (parts.shape[-2] - 1)
    identity = torch.eye(parts.shape[-1], dtype=parts.dtype, device=parts.device)
    # torch.linalg.cholesky would make the host wait, to raise an error; a NaN is noticed without.
    factor, failed = torch.linalg.cholesky_ex((1 - eps) * covariance + eps * identity)
    factor = torch.where((failed == 0)[..., None, None], factor, torch.nan)
    white = torch.linalg.solve_triangular(factor, centre.mT, upper=False).mT
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1)
    # The ratio of two pivots is no larger than the factor's condition number, whose square is the covariance's.
    return white, (pivots.amax(-1) / pivots.amin(-1)).square().amax()
