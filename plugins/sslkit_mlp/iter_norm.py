"""IterNorm: whitening by Newton's iterations, without an eigendecomposition."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IterNorm(nn.Module):
    """Whitens the dimensions of a batch in groups (Huang et al. 2019, arXiv 1904.03441, algorithms 1 and 2).

    `[B, width]` -> `[B, width]`, in float32 or better, also under autocast. In training, for the B vectors x of a
    group: S = cov(x) + eps, cov with 1 / B; P_0 = 1, P_k = (3 P_{k-1} - P_{k-1}^3 S / tr S) / 2; the output is
    P_T / sqrt(tr S) (x - mean), times `weight`, plus `bias`. With many iterations that becomes ZCA,
    S^(-1/2) (x - mean); with few, directions of little variance stay short. In evaluation, mean and matrix are their
    moving averages.

    The defaults are those of VIbCReg's code (Lee & Aune 2021). A group has width / groups dimensions, rounded up; if
    that does not divide the width, the greatest number below it that does.
    """

    batch_statistics = True
    """Seen by `train.batch_norm = "split:N"`, which cannot split it and says so."""
    running_mean: Tensor
    running_whitening: Tensor

    def __init__(
        self, width: int, groups: int = 64, iterations: int = 5, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.size = next(size for size in range(-(-width // groups), 0, -1) if width % size == 0)
        self.iterations, self.eps, self.momentum = iterations, eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_whitening", torch.eye(self.size).repeat(width // self.size, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, width]` -> the same shape; in training the moving averages take the batch in."""
        # Under autocast the products would be in bfloat16, too coarse for iterations that build on one another.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            mean = x.mean(0) if self.training else self.running_mean
            grouped = (x - mean).unflatten(1, (-1, self.size)).transpose(0, 1)
            matrix = self._whitening(grouped) if self.training else self.running_whitening
            white = (grouped @ matrix.mT.to(x.dtype)).transpose(0, 1).flatten(1)
            if self.training:
                self._move(mean.detach(), matrix.detach())
            output: Tensor = white * self.weight + self.bias
            return output

    def _move(self, mean: Tensor, matrix: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_whitening.lerp_(matrix.to(self.running_whitening.dtype), self.momentum)

    def _whitening(self, grouped: Tensor) -> Tensor:
        """Centred `[groups, B, size]` -> P_T / sqrt(tr S) of each group, `[groups, size, size]`."""
        identity = torch.eye(self.size, dtype=grouped.dtype, device=grouped.device)
        covariance = grouped.mT @ grouped / grouped.shape[1] + self.eps * identity
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        # P_k and S commute, so that the root Y_k = S P_k / tr S may be carried along: the same numbers for as many
        # products, and rounding errors do not grow from step to step as they do in P^3 S (Higham 2008, chapter 6).
        root = covariance / trace  # its eigenvalues are in 0..1, where the iterations converge
        matrix = identity.expand_as(covariance)
        for _ in range(self.iterations):
            step = (3 * identity - matrix @ root) / 2
            root, matrix = root @ step, step @ matrix
        return matrix / trace.sqrt()
