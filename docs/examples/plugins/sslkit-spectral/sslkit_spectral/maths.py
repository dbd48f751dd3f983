"""The formula behind the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from sslkit.api import Branches, LossTerms, Needs, ViewSpec
from sslkit.nn import EPS, all_views, chosen, precise

NAME = "spectral"


class SpectralLoss(nn.Module):
    """Branches -> -2 E[z . z+] + E[(z . z')^2]."""

    additive = False  # it compares the images of a batch with one another
    prevents_collapse = True  # equal outputs cost as much as they gain

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.longest = math.sqrt(mu)

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """The projections of all views; with fewer than two it raises a UserError."""
        return Needs(projections=all_views(specs, NAME))

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, and its two terms."""
        views = self.needs(branches.specs).projections
        found = chosen(branches.projections, views, f"loss {NAME!r} has no projection")
        shortened = [self.shortened(precise(z)) for z in found]
        paired = list(combinations(shortened, 2))
        attraction = torch.stack([-2 * (a * b).sum(1).mean() for a, b in paired]).mean()
        repulsion = torch.stack([mean_off_diagonal((a @ b.T).square()) for a, b in paired]).mean()
        terms = {"attraction": attraction.detach(), "repulsion": repulsion.detach()}
        return LossTerms(attraction + repulsion, terms)

    def shortened(self, z: Tensor) -> Tensor:
        """Rows `[B, d]` of at most the longest length allowed."""
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(EPS)
        scale: Tensor = (self.longest / length).clamp(max=1)
        return z * scale


def mean_off_diagonal(square: Tensor) -> Tensor:
    """Mean of `[B, B]` without its diagonal."""
    n = len(square)
    others = ~torch.eye(n, dtype=torch.bool, device=square.device)
    return torch.where(others, square, 0).sum().div(n * (n - 1))
