"""Optimizers: SGD, Adam, AdamW and LARS.

All of them keep a step whose gradients are not finite from changing anything without asking the host: they read
`found_inf`, and torch's three are the fused ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError

from sslkit.api import Optimizer, ParamGroup, RunInfo

if TYPE_CHECKING:
    import torch

Decay = Annotated[float, Field(ge=0, lt=1)]


class SGD(Optimizer):
    """Stochastic gradient descent with momentum; weight decay is added to the gradient.

    torch.optim.SGD, fused. The optimizer of SimSiam and MoCo.
    """

    momentum: Decay = 0.9
    """Decay of the running sum of gradients; 0 for none."""
    nesterov: bool = False
    """Nesterov's momentum."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise PydanticCustomError("nesterov", "'nesterov' needs a 'momentum' above 0")
        return self

    def build(self, groups: list[ParamGroup], run: RunInfo) -> torch.optim.Optimizer:
        from sslkit_optimizers.sgd import fused_sgd

        return fused_sgd(groups, self)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015); weight decay is added to the gradient. torch.optim.Adam, fused."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""

    def build(self, groups: list[ParamGroup], run: RunInfo) -> torch.optim.Optimizer:
        import torch

        tables = [group.as_torch() for group in groups]
        return torch.optim.Adam(tables, lr=0.0, betas=self.betas, eps=self.eps, fused=True)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): each step takes lr * weight_decay off the weights.

    torch.optim.AdamW, fused. The usual choice for vision transformers.
    """

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""

    def build(self, groups: list[ParamGroup], run: RunInfo) -> torch.optim.Optimizer:
        import torch

        tables = [group.as_torch() for group in groups]
        return torch.optim.AdamW(tables, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=0.0, fused=True)


class LARS(Optimizer):
    """SGD whose gradient is scaled to the size of the weights, tensor by tensor (You et al. 2017): for large batches.

    With weights w, gradient g, weight decay d and learning rate lr, for each tensor:

        r = eta * |w| / (|g| + d * |w| + eps)         clip_lr: r = min(r / lr, 1)
        v = momentum * v + r * (g + d * w)
        w = w - lr * v

    r is 1 where w is zero, and such a tensor stays where it is where g is zero. Groups of bias and normalisation
    parameters (see `exclude_bias_and_norm`) take r = 1. Momentum is applied to the scaled gradient, as in PyTorch's SGD
    and in the code of solo-learn and lightly; the paper has lr inside v. BYOL's code divides by |g + d * w| instead of
    |g| + d * |w|, which at its weight decay of 1.5e-6 is the same to three digits. BYOL: `eta = 0.001`; solo-learn's
    CIFAR recipes: `eta = 0.02, clip_lr = true`.
    """

    momentum: Decay = 0.9
    """Decay of the running sum of scaled gradients; 0 for none."""
    eta: PositiveFloat = 0.001
    """Trust coefficient: the length of a step relative to the length of the weights, at lr 1 and without momentum."""
    clip_lr: bool = False
    """Take the scaled rate only where it is below lr, and plain SGD elsewhere (LARC)."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""

    def build(self, groups: list[ParamGroup], run: RunInfo) -> torch.optim.Optimizer:
        from sslkit_optimizers.lars import LARSOptimizer

        return LARSOptimizer(
            [group.as_torch() for group in groups],
            momentum=self.momentum,
            eta=self.eta,
            clip_lr=self.clip_lr,
            eps=self.eps,
        )
