"""The loss of BYOL and SimSiam: cosine similarity between predictions and target projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sslkit.api import Loss, RunInfo

if TYPE_CHECKING:
    from torch import nn


class Cosine(Loss):
    """Cosine distance between the prediction of one view and the target projection of another (BYOL, SimSiam).

    Over all ordered pairs of different views, with the target under stop-gradient, averaged over the batch:

    - `byol`: the sum of 2 - 2 cos (Grill et al. 2020, section 3.1), 0..8 for two views.
    - `simsiam`: the mean of -cos (Chen & He 2021, section 3), -1..1.

    The two forms differ by a factor of 4 in the gradient (for two views), so a learning rate found with one does not
    suit the other. Predictions are made of every view; targets of every global view. The loss uses predictions: a
    recipe without a predictor names `predictor.use = "identity"`. Normalisation is in float32 at least, also under
    autocast.
    """

    form: Literal["byol", "simsiam"] = "byol"
    """`byol`: the sum of 2 - 2 cos over the ordered pairs of views; `simsiam`: the mean of -cos."""
    targets: Literal["each", "mean"] = "each"
    """`each`: every other global view is a target of its own. `mean`: one target for each view, the mean of the others'
    target projections (FastSiam; Pototzky et al. 2022, section 3); with two views there is no difference."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from sslkit_cosine.loss import CosineLoss

        return CosineLoss(self.form, self.targets)
