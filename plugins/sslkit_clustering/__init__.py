"""The loss of SwAV, which compares views by the prototypes that they are assigned to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from sslkit.api import Loss, RunInfo, Scheduled

if TYPE_CHECKING:
    from torch import nn


class SwAV(Loss):
    """A view predicts another view's soft assignment to prototypes, which all get equal shares (SwAV).

    Caron et al. 2020, arXiv 2006.09882, section 3. With projections z and prototypes c_k of length 1:

    - p_k = softmax over k of z . c_k / temperature: what a view predicts (equation 2).
    - q: its code, made of the scores z . c_k / epsilon of the whole batch by Sinkhorn-Knopp, which divides in turn so
      that every prototype gets an equal share of the batch and every image's code sums to 1 (equations 3 to 5).
    - The loss is the mean of - sum_k q_k log p_k over the ordered pairs of a global view, which gives q, and another
      view, global or local, which gives p (equation 6; the mean rather than the sum is the authors' code).

    No gradient flows through codes. The loss wants online projections alone: no predictor, no target. Its prototypes
    are trained as the part `loss` of the optimizer, and brought back to length 1 after every step. The equal shares
    keep collapse from paying: if all images look alike, their codes are uniform and the loss is log(prototypes) or
    more. A run may still stay there, with `kl` near 0; a lower epsilon (0.03, or 0.02) or a longer freeze helps.

    Metrics: `code_entropy` (mean entropy of a code in nats; log(prototypes) if the images cannot be told apart), `kl`
    (how far predictions are from codes: loss - code_entropy), `prototypes_used` (how many are the nearest to some
    global view of the batch; 1 if all views are alike).

    The defaults are the paper's for ImageNet, without its queue for small batches. solo-learn's CIFAR-10 recipe (1000
    epochs, batch 256) has `queue = 3840, queue_start_epochs = 50, freeze_prototypes_epochs = 2`.
    """

    prototypes: PositiveInt = 3000
    """Number of prototypes."""
    temperature: Scheduled = 0.1
    """Divides the scores that predictions are made of: a number or a schedule."""
    epsilon: Scheduled = 0.05
    """Divides the scores that codes are made of: a number or a schedule. The smaller, the harder the codes."""
    iterations: PositiveInt = 3
    """Rounds of Sinkhorn-Knopp."""
    queue: NonNegativeInt = 0
    """How many earlier projections of each global view join the batch when codes are made: for batches of fewer
    images than there are prototypes (section 3.1). 0: none. The authors use 3840 with batches of 256."""
    queue_start_epochs: NonNegativeFloat = 15.0
    """Epochs before the queue is used, if there is one. It is filled from the first step on, and never used before it
    is full."""
    freeze_prototypes_epochs: NonNegativeFloat = 1.0
    """Epochs during which the prototypes stay as they were drawn. The authors' 313 steps are one epoch of theirs."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_clustering.loss import SwAVLoss

        return SwAVLoss(self, dim, run)
