"""What the losses of this plugin share, above all unordered pairs of views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from sslkit.batch import Branches, Needs, ViewSpec
from sslkit.nn import all_views, chosen, precise


class PairLoss(nn.Module):
    """A loss of the online projections of two views; of more, the mean over all unordered pairs."""

    additive = False
    prevents_collapse = True
    name: str

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """The projections of every view.

        Raises:
            UserError: there are fewer than two views.
        """
        return Needs(projections=all_views(specs, self.name))

    def projections(self, branches: Branches) -> list[Tensor]:
        """The projections `[B, d]` of every view, in float32 or better.

        Raises:
            UserError: a view has none, or there are fewer than two views.
        """
        wanted = self.needs(branches.specs).projections
        found = chosen(branches.projections, wanted, f"loss {self.name!r} has no projection")
        return [precise(p) for p in found]


def unordered(views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """All unordered pairs of different views."""
    return list(combinations(views, 2))


def mean(scalars: Iterable[Tensor]) -> Tensor:
    """The mean of 0-dim tensors."""
    return torch.stack(list(scalars)).mean()


def centred(projections: Tensor) -> Tensor:
    """`[..., B, d]` less the mean over the B images."""
    return projections - projections.mean(-2, keepdim=True)
