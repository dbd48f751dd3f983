"""Cosine similarity between predictions and targets, over ordered pairs of views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.errors import UserError

EPS = 1e-6
"""Least norm that a vector is divided by: BYOL's code bounds the squared norm by 1e-12."""


def pairs(specs: Sequence[ViewSpec]) -> list[tuple[int, int]]:
    """Ordered pairs of different views: (predicted from, target), where the target is a global view."""
    return [
        (view, target)
        for view in range(len(specs))
        for target, spec in enumerate(specs)
        if spec.kind == "global" and target != view
    ]


def unit(vectors: Tensor) -> Tensor:
    """Vectors `[B, d]` of length 1, in float32 or better: half precision overflows in the sum of squares."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1, eps=EPS)


class CosineLoss(nn.Module):
    """Branches -> 2 - 2 cos summed (`byol`) or -cos averaged (`simsiam`) over ordered pairs of views."""

    additive = True

    def __init__(self, form: Literal["byol", "simsiam"]) -> None:
        super().__init__()
        self.form = form

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Predictions of every view that has a partner, targets of every global view.

        Raises:
            UserError: no view has a partner.
        """
        paired = pairs(specs)
        if not paired:
            raise UserError(
                "loss 'cosine' compares two or more views, one of them global, and the view generator makes "
                f"{len(specs)}; choose a view_generator such as 'two_crops'"
            )
        predicted, targets = (tuple(sorted(set(views))) for views in zip(*paired, strict=True))
        return Needs(predictions=predicted, targets=targets)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss and the mean cosine similarity.

        Raises:
            UserError: a view has no prediction or no target projection.
        """
        paired = pairs(branches.specs)
        predictions = {
            view: unit(vectors)
            for view, vectors in _present(
                branches.predictions, {view for view, _ in paired}, "prediction", "a predictor ('identity' for none)"
            )
        }
        targets = {
            view: unit(vectors.detach())
            for view, vectors in _present(
                branches.targets,
                {target for _, target in paired},
                "target projection",
                "a target_updater with a target",
            )
        }
        similarities = [(predictions[view] * targets[target]).sum(-1).mean() for view, target in paired]
        cosine = torch.stack(similarities)
        total = (2 - 2 * cosine).sum() if self.form == "byol" else -cosine.mean()
        return LossTerms(total, {"cosine": cosine.detach().mean()})

    def commit(self, branches: Branches) -> None:
        """Nothing to move: the loss has no state."""


def _present(tensors: Sequence[Tensor | None], views: set[int], what: str, remedy: str) -> Iterator[tuple[int, Tensor]]:
    for view in sorted(views):
        vectors = tensors[view]
        if vectors is None:
            raise UserError(f"loss 'cosine' has no {what} of view {view}; name {remedy} in the recipe")
        yield view, vectors
