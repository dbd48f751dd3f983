"""What the contrastive losses share: similarities of unit vectors, and the comparison of all views of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sslkit.batch import Branches, Needs, ViewSpec
from sslkit.errors import UserError
from sslkit.nn import ScheduledNumber, all_views, chosen, unit


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the precision of their factors, also under autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def logits(anchors: Tensor, others: Tensor, temperature: float | Tensor) -> Tensor:
    """Inner products over the temperature: `[n, d]` and `[m, d]` -> `[n, m]`."""
    with without_autocast(anchors):
        return (anchors / temperature) @ others.mT  # the small matrix is divided, not the large one


def accuracy(positives: Tensor, negatives: Tensor) -> Tensor:
    """The share of anchors whose best positive is above all negatives; in a collapsed network they tie, and none is."""
    return (positives > negatives).to(positives.dtype).mean()


def refuse_one_image(images: int, name: str) -> None:
    """Refuse a batch without negatives.

    Raises:
        UserError: it has one image.
    """
    if images < 2:
        raise UserError(f"loss {name!r} compares the images of a batch with one another; set train.batch_size above 1")


def different(values: Tensor) -> Tensor:
    """Of values for all pairs of views, `[V, V, ...]`, those of different views, `[V - 1, V, ...]`."""
    views = len(values)
    # Without its first entry, a square in rows of one more than its side ends every row with a diagonal entry.
    rows: Tensor = values.flatten(0, 1)[1:].unflatten(0, (views - 1, views + 1))
    return rows[:, :-1]


class Contrast(NamedTuple):
    """All views of B images compared with one another; every value is a logit."""

    positives: Tensor
    """`[V, V, B]`: of two views of one image."""
    negatives: Tensor
    """`[V, B]`: log-sum-exp over all views of all other images."""
    accuracy: Tensor
    """How often the most similar other sample is a view of the same image."""


def contrast(vectors: Tensor, temperature: float | Tensor) -> Contrast:
    """Compare unit vectors `[V, B, d]` of V views."""
    views, images, _ = vectors.shape
    with without_autocast(vectors):
        positives = torch.einsum("vbd,ubd->vub", vectors / temperature, vectors)
    flat = vectors.flatten(0, 1)
    scores = logits(flat, flat, temperature).view(views, images, views, images)
    same = torch.eye(images, dtype=torch.bool, device=vectors.device)[:, None]
    others = scores.masked_fill(same, -math.inf).flatten(2)
    itself = torch.eye(views, dtype=torch.bool, device=vectors.device)[..., None]
    # Of the same matrix as the negatives: sums of another order would round otherwise and break ties.
    nearest = scores.detach().diagonal(dim1=1, dim2=3).masked_fill(itself, -math.inf).amax(1)
    return Contrast(positives, others.logsumexp(-1), accuracy(nearest, others.detach().amax(-1)))


class InBatch(nn.Module):
    """A loss on the projections of all views, whose negatives are the other images of the batch."""

    name: ClassVar[str]
    additive = False
    prevents_collapse = True

    def __init__(self, temperature: ScheduledNumber) -> None:
        super().__init__()
        self.temperature = temperature

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections of every view.

        Raises:
            UserError: there are fewer than two.
        """
        return Needs(projections=all_views(specs, self.name))

    def vectors(self, branches: Branches) -> Tensor:
        """The projections as unit vectors `[V, B, d]`.

        Raises:
            UserError: a view has no projection, or the batch has one image.
        """
        needed = self.needs(branches.specs).projections
        projections = chosen(branches.projections, needed, f"loss {self.name!r} has no projection")
        refuse_one_image(len(projections[0]), self.name)
        return torch.stack([unit(p) for p in projections])
