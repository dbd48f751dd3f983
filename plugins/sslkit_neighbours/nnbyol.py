"""NNBYOL: nearest neighbours of target projections in the loss of BYOL and SimSiam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.nn import Queue, chosen, global_views, pairs, sides, unit
from sslkit_neighbours.neighbours import nearest


class NNBYOLLoss(nn.Module):
    """Branches -> 2 - 2 cos summed (`byol`) or -cos averaged (`simsiam`) over ordered pairs of views."""

    additive = True
    prevents_collapse = False

    def __init__(self, form: Literal["byol", "simsiam"], queue: Queue) -> None:
        super().__init__()
        self.form, self.queue = form, queue

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Predictions of every view that has a partner, targets of every global view.

        Raises:
            UserError: no view has a partner.
        """
        predicted, sought = sides(pairs(specs, "nnbyol"))
        return Needs(predictions=predicted, targets=sought)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss and mean cosine similarities.

        Raises:
            UserError: a view has no prediction or no target projection.
        """
        needs = self.needs(branches.specs)
        predicted = chosen(branches.predictions, needs.predictions, "loss 'nnbyol' has no prediction")
        projected = chosen(branches.targets, needs.targets, "loss 'nnbyol' has no target projection")
        predictions = dict(zip(needs.predictions, map(unit, predicted), strict=True))
        neighbours, near = {}, []
        for view, targets in zip(needs.targets, projected, strict=True):
            neighbours[view], similarity = nearest(targets, self.queue)
            near.append(similarity)
        cosine = torch.stack([
            (predictions[view] * neighbours[sought]).sum(-1).mean() for view, sought in pairs(branches.specs, "nnbyol")
        ])  # fmt: skip
        total = (2 - 2 * cosine).sum() if self.form == "byol" else -cosine.mean()
        return LossTerms(total, {"cosine": cosine.detach().mean(), "neighbour_cosine": torch.stack(near).mean()})

    def commit(self, branches: Branches) -> None:
        """Put the targets of the first global view into the queue.

        Raises:
            UserError: it has none.
        """
        first = global_views(branches.specs)[:1]
        for targets in chosen(branches.targets, first, "loss 'nnbyol' has no target projection"):
            self.queue.push(unit(targets))
