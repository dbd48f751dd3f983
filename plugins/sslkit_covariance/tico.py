"""TiCo: invariance towards a target, and contrast with a moving second moment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.errors import UserError
from sslkit.nn import ScheduledNumber, chosen, pairs, sides, unit
from sslkit_covariance import TiCo
from sslkit_covariance.pairs import mean


class TiCoLoss(nn.Module):
    """Branches -> invariance + rho * contrast. The second moment `[d, d]` is saved with the run."""

    additive = False
    prevents_collapse = True
    second_moment: Tensor

    def __init__(self, options: TiCo, dim: int, run: RunInfo) -> None:
        super().__init__()
        self.symmetric = options.symmetric
        self.beta = ScheduledNumber(options.beta, run, "loss.beta", least=0, below=1)
        self.rho = ScheduledNumber(options.rho, run, "loss.rho", least=0)
        self.register_buffer("second_moment", torch.zeros(dim, dim))

    def pairs(self, specs: Sequence[ViewSpec]) -> list[tuple[int, int]]:
        """Ordered pairs of different views: (online, target), the target a global view.

        Raises:
            UserError: no view has a partner, or there are more views than two and `symmetric` is false.
        """
        found = pairs(specs, "tico")
        if len(specs) > 2 and not self.symmetric:
            raise UserError(
                "loss.symmetric: false compares one view with one other, and the view generator makes "
                f"{len(specs)}; set loss.symmetric = true"
            )
        return found if self.symmetric else found[:1]

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections and targets of the views that are paired.

        Raises:
            UserError: the views cannot be paired.
        """
        online, targets = sides(self.pairs(specs))
        return Needs(projections=online, targets=targets)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, and its two terms before they are weighted.

        Raises:
            UserError: a view has no projection or no target projection.
        """
        needs = self.needs(branches.specs)
        online = self._online(branches)
        projected = chosen(branches.targets, needs.targets, "loss 'tico' has no target projection")
        targets = {view: unit(t.detach()) for view, t in zip(needs.targets, projected, strict=True)}
        invariance = mean(
            1 - (online[view] * targets[target]).sum(-1).mean() for view, target in self.pairs(branches.specs)
        )
        moment = self._moved(list(online.values()))
        contrast = mean((z @ moment * z).sum(-1).mean() for z in online.values())
        total = invariance + self.rho() * contrast
        return LossTerms(total, {"invariance": invariance.detach(), "contrast": contrast.detach()})

    def commit(self, branches: Branches) -> None:
        """Take the projections of the step into the second moment."""
        self.second_moment.copy_(self._moved(list(self._online(branches).values())))

    def _online(self, branches: Branches) -> dict[int, Tensor]:
        views = self.needs(branches.specs).projections
        found = chosen(branches.projections, views, "loss 'tico' has no projection")
        return {view: unit(z) for view, z in zip(views, found, strict=True)}

    def _moved(self, online: list[Tensor]) -> Tensor:
        """The second moment after these projections, outside the graph."""
        rows = torch.cat(online).detach()
        beta, batch = self.beta(), rows.T @ rows / len(rows)
        moved: Tensor = beta * self.second_moment.to(rows.dtype) + (1 - beta) * batch
        return moved
