"""The spectral contrastive loss for sslkit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from sslkit.api import Loss, RunInfo

if TYPE_CHECKING:
    from torch import nn

SSLKIT_API = 1
"""The version of `sslkit.api` that this is written for."""


class Spectral(Loss):
    """Spectral contrastive loss: views of one image agree, different images are orthogonal.

    -2 E[z . z+] + E[(z . z')^2] (HaoChen et al. 2021, arXiv 2106.04156, equation 6): z and z+ are projections of two
    views of an image, z and z' of views of different images. Its minimum is a factorisation of the graph that joins
    views of one image. As in the authors' code, projections are not brought to length 1, but shortened where they are
    longer than sqrt(mu). Of more than two views, the mean over pairs is taken. It uses projections alone, neither a
    predictor nor a target.
    """

    mu: PositiveFloat = 1.0
    """Square of the length that projections have at most."""

    def build(self, dim: int, run: RunInfo) -> nn.Module:
        from .maths import SpectralLoss

        return SpectralLoss(self.mu)
