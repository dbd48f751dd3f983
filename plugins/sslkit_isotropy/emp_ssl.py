"""EMP-SSL: every view close to the mean of all views, and a high total coding rate of every view's batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.nn import ScheduledNumber, all_views, chosen, unit
from sslkit_isotropy import EMPSSL


def coding_rate(vectors: Tensor, eps: float | Tensor) -> Tensor:
    """1/2 log det(I + d / (n eps) Z^T Z) of each batch Z: `[..., n, d]` -> `[...]`, in nats.

    Where rounding leaves a matrix that is not positive definite (an eps far below the precision of the numbers), the
    rate is NaN.
    """
    n, d = vectors.shape[-2:]
    # Z^T Z and Z Z^T have the same eigenvalues but for zeros, which add log 1 = 0: the smaller one will do.
    gram = vectors @ vectors.mT if n < d else vectors.mT @ vectors
    identity = torch.eye(min(n, d), dtype=gram.dtype, device=gram.device)
    # cholesky() would make the host wait for the device, to ask whether it succeeded.
    factor, failed = torch.linalg.cholesky_ex(identity + d / (n * eps) * gram)
    rate = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(failed == 0, rate, torch.nan)


class EMPSSLLoss(nn.Module):
    """Branches -> minus the coding rate, minus `invariance` times the cosine similarity to the mean of the views."""

    additive = False
    prevents_collapse = True

    def __init__(self, options: EMPSSL, run: RunInfo) -> None:
        super().__init__()
        self.invariance = ScheduledNumber(options.invariance, run, "loss.invariance", above=0)
        self.eps = ScheduledNumber(options.eps, run, "loss.eps", above=0)

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections of every view.

        Raises:
            UserError: there are fewer than two views.
        """
        return Needs(projections=all_views(specs, "emp_ssl"))

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, the coding rate (in nats) and the cosine similarity, both averaged over views.

        Raises:
            UserError: a view has no projection.
        """
        views = chosen(branches.projections, range(len(branches.specs)), "loss 'emp_ssl' has no projection")
        with torch.autocast(views[0].device.type, enabled=False):
            z = unit(torch.stack(views))
            rate = coding_rate(z, self.eps()).mean()
            cosine = (z * unit(z.mean(0))).sum(-1).mean()
        total = -rate - self.invariance() * cosine
        return LossTerms(total, {"coding_rate": rate.detach(), "cosine": cosine.detach()})
