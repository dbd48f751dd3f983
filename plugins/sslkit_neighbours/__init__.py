"""Losses whose positive is not another view of the image but its nearest neighbour in a queue of earlier images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from sslkit.api import Loss, RunInfo, Scheduled

if TYPE_CHECKING:
    from torch import nn


class NNCLR(Loss):
    """Cross-entropy of a prediction and the nearest neighbour of the image's other view in a queue (NNCLR).

    For the projection z of view i, its nearest neighbour n in the queue by cosine similarity, and the predictions p of
    view j of all images, of which p+ is of the same image (Dwibedi et al. 2021, arXiv 2104.14548, equations 3 and 4):

        -log( exp(n p+ / t) / sum_p exp(n p / t) )

    with all vectors of length 1, averaged over the batch and over both directions; for more than two views, over all
    ordered pairs of different views. Neighbours are sought for every global view, and every view is predicted from. The
    queue starts with random vectors; after each step the projections of the first global view enter it, as in the
    paper's algorithm. Gradient flows through the predictions alone, and there is no target branch.

    Named terms: `contrastive_accuracy`, how often a neighbour is more similar to its own image's prediction than to
    those of all others; `cosine`, their mean similarity; `neighbour_cosine`, the mean similarity of a projection and
    its neighbour.
    """

    temperature: Scheduled = 0.1
    """What similarities are divided by."""
    queue: PositiveInt = 98304
    """How many projections are kept: the paper's support set."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit.nn import Queue, ScheduledNumber
        from sslkit_neighbours.nnclr import NNCLRLoss

        temperature = ScheduledNumber(self.temperature, run, "loss.temperature", above=0)
        return NNCLRLoss(temperature, Queue(self.queue, dim))


class NNBYOL(Loss):
    """Cosine distance between a prediction and the nearest neighbour of the other view's target (NNBYOL, NNSiam).

    The loss of BYOL or SimSiam in which a target projection is replaced by its nearest neighbour, by cosine similarity,
    in a queue of target projections (Dwibedi et al. 2021, arXiv 2104.14548). Over all ordered pairs of different views,
    averaged over the batch:

    - `byol`: the sum of 2 - 2 cos (Grill et al. 2020, section 3.1), 0..8 for two views.
    - `simsiam`: the mean of -cos (Chen & He 2021, section 3), -1..1.

    Predictions are made of every view; targets of every global view. The queue starts with random vectors; after each
    step the targets of the first global view enter it, as in solo-learn. Named terms: `cosine`, the mean similarity of
    a prediction and the neighbour, and `neighbour_cosine`, that of a target and its neighbour.
    """

    form: Literal["byol", "simsiam"] = "byol"
    """`byol`: the sum of 2 - 2 cos over the ordered pairs of views; `simsiam`: the mean of -cos."""
    queue: PositiveInt = 65536
    """How many target projections are kept."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit.nn import Queue
        from sslkit_neighbours.nnbyol import NNBYOLLoss

        return NNBYOLLoss(self.form, Queue(self.queue, dim))
