"""The decoupled contrastive loss, plain (DCL) and weighted (DCLW)."""

from __future__ import annotations

from sslkit.batch import Branches, LossTerms
from sslkit.nn import ScheduledNumber
from sslkit_contrastive.maths import InBatch, contrast, different


class DCLLoss(InBatch):
    """Branches -> DCL over all ordered pairs of views; weighted if `sigma` is given."""

    name = "dcl"

    def __init__(self, temperature: ScheduledNumber, sigma: ScheduledNumber | None) -> None:
        super().__init__(temperature)
        self.sigma = sigma

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, top-1 accuracy and mean cosine similarity of positives.

        Raises:
            UserError: a view has no projection, or the batch has one image.
        """
        temperature = self.temperature()
        found = contrast(self.vectors(branches), temperature)
        cosines = found.positives.detach() * temperature
        attraction = found.positives
        if self.sigma is not None:
            # An exponential over the mean of all is their number times the softmax.
            attraction = attraction * (2 - cosines.shape[-1] * (cosines / self.sigma()).softmax(-1))
        total = different(found.negatives[:, None] - attraction).mean()
        return LossTerms(total, {"contrastive_accuracy": found.accuracy, "cosine": different(cosines).mean()})
