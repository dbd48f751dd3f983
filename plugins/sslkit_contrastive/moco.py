"""Losses of a query and the key that the target makes of another view: MoCo and MoCo v3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.nn import Queue, ScheduledNumber, chosen, global_views, pairs, sides, unit
from sslkit_contrastive.maths import accuracy, logits, refuse_one_image


class MoCoLoss(nn.Module):
    """Branches -> cross-entropy of the key among the queue."""

    additive = True
    prevents_collapse = True

    def __init__(self, temperature: ScheduledNumber, queue: Queue, symmetric: bool) -> None:
        super().__init__()
        self.temperature, self.queue, self.symmetric = temperature, queue, symmetric

    def pairs(self, specs: Sequence[ViewSpec]) -> list[tuple[int, int]]:
        """Ordered pairs of different views: (query, key).

        Raises:
            UserError: there is none.
        """
        last = global_views(specs)[-1:]
        return [pair for pair in pairs(specs, "moco") if self.symmetric or pair[1:] == last]

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections of the queries' views, targets of the keys'.

        Raises:
            UserError: no view has a partner.
        """
        queries, keys = sides(self.pairs(specs))
        return Needs(projections=queries, targets=keys)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, top-1 accuracy and mean cosine similarity of query and key.

        Raises:
            UserError: a view has no projection or no target projection.
        """
        needs, temperature = self.needs(branches.specs), self.temperature()
        projected = chosen(branches.projections, needs.projections, "loss 'moco' has no projection")
        targets = chosen(branches.targets, needs.targets, "loss 'moco' has no target projection")
        keys = {view: unit(t.detach()) for view, t in zip(needs.targets, targets, strict=True)}
        compared = {}
        for view, vectors in zip(needs.projections, map(unit, projected), strict=True):
            scores = logits(vectors, self.queue.rows.to(vectors.dtype), temperature)
            compared[view] = vectors, scores.logsumexp(1), scores.detach().amax(1)
        losses, right, cosines = [], [], []
        for query, key in self.pairs(branches.specs):
            vectors, negatives, strongest = compared[query]
            cosine = (vectors * keys[key]).sum(-1)
            positives = cosine / temperature
            # log(p / (p + n)) of exponentials, without the cancellation where p is much the larger.
            losses.append(-F.logsigmoid(positives - negatives).mean())
            right.append(accuracy(positives.detach(), strongest))
            cosines.append(cosine.detach().mean())
        explained = {"contrastive_accuracy": torch.stack(right).mean(), "cosine": torch.stack(cosines).mean()}
        return LossTerms(torch.stack(losses).mean(), explained)

    def commit(self, branches: Branches) -> None:
        """Put the step's keys into the queue, view by view.

        Raises:
            UserError: a view has no target projection.
        """
        views = self.needs(branches.specs).targets
        for keys in chosen(branches.targets, views, "loss 'moco' has no target projection"):
            self.queue.push(unit(keys))


class MoCoV3Loss(nn.Module):
    """Branches -> cross-entropy of the key among the keys of the batch, summed over ordered pairs of views."""

    additive = False
    prevents_collapse = True

    def __init__(self, temperature: ScheduledNumber) -> None:
        super().__init__()
        self.temperature = temperature

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Predictions of every view that has a partner, targets of every global view.

        Raises:
            UserError: no view has a partner.
        """
        queries, keys = sides(pairs(specs, "moco_v3"))
        return Needs(predictions=queries, targets=keys)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, top-1 accuracy and mean cosine similarity of query and key.

        Raises:
            UserError: a view has no prediction or no target projection, or the batch has one image.
        """
        needs, temperature = self.needs(branches.specs), self.temperature()
        predicted = chosen(branches.predictions, needs.predictions, "loss 'moco_v3' has no prediction")
        targets = chosen(branches.targets, needs.targets, "loss 'moco_v3' has no target projection")
        refuse_one_image(len(predicted[0]), "moco_v3")
        queries = dict(zip(needs.predictions, map(unit, predicted), strict=True))
        keys = {view: unit(t.detach()) for view, t in zip(needs.targets, targets, strict=True)}
        own = torch.arange(len(predicted[0]), device=predicted[0].device)
        same = torch.eye(len(own), dtype=torch.bool, device=own.device)
        losses, right, cosines = [], [], []
        for query, key in pairs(branches.specs, "moco_v3"):
            scores = logits(queries[query], keys[key], temperature)
            losses.append(F.cross_entropy(scores, own))
            seen = scores.detach()
            right.append(accuracy(seen.diagonal(), seen.masked_fill(same, -math.inf).amax(1)))
            cosines.append(seen.diagonal().mean() * temperature)
        explained = {"contrastive_accuracy": torch.stack(right).mean(), "cosine": torch.stack(cosines).mean()}
        return LossTerms(2 * temperature * torch.stack(losses).sum(), explained)
