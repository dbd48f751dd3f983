"""Cosine similarity between predictions and targets, over ordered pairs of views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.nn import chosen, pairs, precise, sides, unit


class CosineLoss(nn.Module):
    """Branches -> 2 - 2 cos summed (`byol`) or -cos averaged (`simsiam`) over views and their targets."""

    additive = True
    prevents_collapse = False

    def __init__(self, form: Literal["byol", "simsiam"], targets: Literal["each", "mean"]) -> None:
        super().__init__()
        self.form, self.averages = form, targets == "mean"

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Predictions of every view that has a partner, targets of every global view.

        Raises:
            UserError: no view has a partner.
        """
        predicted, targets = sides(pairs(specs, "cosine"))
        return Needs(predictions=predicted, targets=targets)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss and the mean cosine similarity.

        Raises:
            UserError: a view has no prediction or no target projection.
        """
        paired = pairs(branches.specs, "cosine")
        needs = self.needs(branches.specs)
        predicted = chosen(branches.predictions, needs.predictions, "loss 'cosine' has no prediction")
        projected = chosen(branches.targets, needs.targets, "loss 'cosine' has no target projection")
        predictions = dict(zip(needs.predictions, map(unit, predicted), strict=True))
        targets = {view: precise(t.detach()) for view, t in zip(needs.targets, projected, strict=True)}
        if self.averages:
            partners = [(view, [target for v, target in paired if v == view]) for view in needs.predictions]
        else:
            partners = [(view, [target]) for view, target in paired]
        similarities = [
            (predictions[view] * unit(torch.stack([targets[o] for o in others]).mean(0))).sum(-1).mean()
            for view, others in partners
        ]
        cosine = torch.stack(similarities)
        total = (2 - 2 * cosine).sum() if self.form == "byol" else -cosine.mean()
        return LossTerms(total, {"cosine": cosine.detach().mean()})
