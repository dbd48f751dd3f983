"""The supervised contrastive loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslkit.batch import Branches, LossTerms
from sslkit.errors import UserError
from sslkit.nn import ScheduledNumber
from sslkit_contrastive.maths import InBatch, accuracy, logits, without_autocast


def supcon(vectors: Tensor, labels: Tensor, temperature: float | Tensor) -> LossTerms:
    """SupCon of unit vectors `[V, B, d]` of V views and labels `[B]`."""
    views, images, _ = vectors.shape
    flat = vectors.flatten(0, 1)
    alike = labels[:, None] == labels
    # The inner products with all positives add up to one with their sum: no second matrix of all pairs.
    with without_autocast(vectors):
        positives = alike.to(vectors.dtype) @ vectors.sum(0) - vectors
    cosines = (vectors * positives).sum(-1) / (views * alike.sum(1) - 1)

    scores = logits(flat, flat, temperature)
    scores = scores.masked_fill(torch.eye(len(flat), dtype=torch.bool, device=scores.device), -math.inf)
    total = (scores.logsumexp(1).view(views, images) - cosines / temperature).mean()

    seen = scores.detach().view(views, images, views, images)
    negatives = seen.masked_fill(alike[:, None], -math.inf)
    right = accuracy(seen.amax((2, 3)), negatives.amax((2, 3)))  # the nearest of all is no negative
    return LossTerms(total, {"contrastive_accuracy": right, "cosine": cosines.detach().mean()})


class SupConLoss(InBatch):
    """Branches -> SupCon over all views and, with labels, over all images of one label."""

    name = "supcon"

    def __init__(self, temperature: ScheduledNumber, use_labels: bool) -> None:
        super().__init__(temperature)
        self.use_labels = use_labels

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, top-1 accuracy and mean cosine similarity of positives.

        Raises:
            UserError: the data has no labels, a view has no projection, or the batch has one image.
        """
        vectors, labels = self.vectors(branches), branches.labels
        if not self.use_labels:
            labels = torch.arange(vectors.shape[1], device=vectors.device)
        if labels is None:
            raise UserError("loss 'supcon' has no labels: the data_source gives none; set loss.use_labels = false")
        return supcon(vectors, labels, self.temperature())
