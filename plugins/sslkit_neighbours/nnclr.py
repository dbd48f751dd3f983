"""NNCLR: nearest neighbours of projections as positives of predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.errors import UserError
from sslkit.nn import Queue, ScheduledNumber, chosen, global_views, pairs, sides, unit
from sslkit_neighbours.neighbours import nearest


class NNCLRLoss(nn.Module):
    """Branches -> cross-entropy of neighbours and predictions, averaged over ordered pairs of views."""

    additive = False
    prevents_collapse = True

    def __init__(self, temperature: ScheduledNumber, queue: Queue) -> None:
        super().__init__()
        self.temperature, self.queue = temperature, queue

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Predictions of every view that has a partner, projections of every global view.

        Raises:
            UserError: no view has a partner.
        """
        predicted, sought = sides(pairs(specs, "nnclr"))
        return Needs(projections=sought, predictions=predicted)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, top-1 accuracy, and mean cosine similarities.

        Raises:
            UserError: a view has no projection or no prediction, or the batch has one image.
        """
        needs, temperature = self.needs(branches.specs), self.temperature()
        projected = chosen(branches.projections, needs.projections, "loss 'nnclr' has no projection")
        predicted = chosen(branches.predictions, needs.predictions, "loss 'nnclr' has no prediction")
        images = len(predicted[0])
        if images < 2:
            raise UserError(
                "loss 'nnclr' compares the images of a batch with one another; set train.batch_size above 1"
            )
        predictions = dict(zip(needs.predictions, map(unit, predicted), strict=True))
        neighbours, near = {}, []
        for view, projections in zip(needs.projections, projected, strict=True):
            neighbours[view], similarity = nearest(projections, self.queue)
            near.append(similarity)
        own = torch.arange(images, device=predicted[0].device)
        same = torch.eye(images, dtype=torch.bool, device=own.device)
        losses, right, cosines = [], [], []
        for view, sought in pairs(branches.specs, "nnclr"):
            with torch.autocast(own.device.type, enabled=False):
                scores = (neighbours[sought] / temperature) @ predictions[view].mT
            losses.append(F.cross_entropy(scores, own))
            positives, others = scores.detach().diagonal(), scores.detach().masked_fill(same, -math.inf)
            right.append((positives > others.amax(1)).to(scores.dtype).mean())
            cosines.append(positives.mean() * temperature)
        explained = {"contrastive_accuracy": right, "cosine": cosines, "neighbour_cosine": near}
        return LossTerms(torch.stack(losses).mean(), {name: torch.stack(e).mean() for name, e in explained.items()})

    def commit(self, branches: Branches) -> None:
        """Put the projections of the first global view into the queue.

        Raises:
            UserError: it has none.
        """
        first = global_views(branches.specs)[:1]
        for projections in chosen(branches.projections, first, "loss 'nnclr' has no projection"):
            self.queue.push(unit(projections))
