"""LeJEPA: every view close to the mean of the global views, and projections like a standard normal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.nn import ScheduledNumber, chosen, global_views, pairs, precise
from sslkit_isotropy import LeJEPA


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularisation: the Epps-Pulley statistic along given directions, averaged.

    Args:
        knots: Points of the trapezoidal rule on [0, t_max].
        t_max: Half the width of the interval that is integrated over.
    """

    t: Tensor
    normal: Tensor
    weights: Tensor

    def __init__(self, knots: int, t_max: float) -> None:
        super().__init__()
        t = torch.linspace(0, t_max, knots, dtype=torch.float64)
        normal = torch.exp(-t.square() / 2)
        width = torch.full_like(t, 2 * t_max / (knots - 1))  # twice: the integrand is even
        width[[0, -1]] /= 2
        for name, values in {"t": t, "normal": normal, "weights": width * normal}.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, projections: Tensor, directions: Tensor) -> Tensor:
        """Projections `[..., n, d]`, directions of length 1 `[d, slices]` -> the mean over slices and leading axes."""
        t, normal, weights = (b.to(projections.dtype) for b in (self.t, self.normal, self.weights))
        angles = (projections @ directions)[..., None] * t  # [..., n, slices, knots]
        real, imaginary = angles.cos().mean(-3), angles.sin().mean(-3)
        distance = (real - normal).square() + imaginary.square()
        return projections.shape[-2] * (distance @ weights).mean()


class LeJEPALoss(nn.Module):
    """Branches -> (1 - lambda) * prediction + lambda * SIGReg."""

    additive = False
    prevents_collapse = True

    def __init__(self, options: LeJEPA, run: RunInfo) -> None:
        super().__init__()
        self.share = ScheduledNumber(options.sigreg, run, "loss.sigreg", above=0, most=1)
        self.sigreg = SIGReg(options.knots, options.t_max)
        self.slices = options.slices

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections of every view.

        Raises:
            UserError: there are fewer than two views, or none is global.
        """
        pairs(specs, "lejepa")  # refuses views of which none has a partner
        return Needs(projections=tuple(range(len(specs))))

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, the prediction term and SIGReg.

        Raises:
            UserError: a view has no projection.
        """
        views = chosen(branches.projections, range(len(branches.specs)), "loss 'lejepa' has no projection")
        with torch.autocast(views[0].device.type, enabled=False):
            z = precise(torch.stack(views))
            centre = torch.stack([z[view] for view in global_views(branches.specs)]).mean(0)
            prediction = (z - centre).square().mean()
            drawn = torch.randn(z.shape[-1], self.slices, dtype=z.dtype, device=z.device)
            sigreg = self.sigreg(z, drawn / drawn.norm(dim=0))
        share = self.share()
        total = (1 - share) * prediction + share * sigreg
        return LossTerms(total, {"prediction": prediction.detach(), "sigreg": sigreg.detach()})
