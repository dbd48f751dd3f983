"""NT-Xent, the loss of SimCLR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sslkit.batch import Branches, LossTerms
from sslkit_contrastive.maths import InBatch, contrast, different


def nt_xent(vectors: Tensor, temperature: float | Tensor) -> LossTerms:
    """NT-Xent of unit vectors `[V, B, d]` of V views."""
    found = contrast(vectors, temperature)
    # log(p / (p + n)) of exponentials, without the cancellation where p is much the larger.
    total = -different(F.logsigmoid(found.positives - found.negatives[:, None])).mean()
    cosine = different(found.positives.detach()).mean() * temperature
    return LossTerms(total, {"contrastive_accuracy": found.accuracy, "cosine": cosine})


class NTXentLoss(InBatch):
    """Branches -> NT-Xent over all ordered pairs of views."""

    name = "nt_xent"

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, top-1 accuracy and mean cosine similarity of positives.

        Raises:
            UserError: a view has no projection, or the batch has one image.
        """
        return nt_xent(self.vectors(branches), self.temperature())
