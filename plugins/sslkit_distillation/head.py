"""The module behind `head.dino`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit.errors import UserError
from sslkit.nn import unit

if TYPE_CHECKING:
    from sslkit_distillation import DINOHead


class WeightNormLinear(nn.Module):
    """Float `[B, in_dim]` -> `[B, out_dim]` by a weight whose rows are normalised, and scaled if `learn_lengths`.

    Written out rather than with `torch.nn.utils.weight_norm`, whose hook keeps a copy of the module from being made.
    """

    def __init__(self, in_dim: int, out_dim: int, *, learn_lengths: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.length = nn.Parameter(torch.ones(out_dim, 1)) if learn_lengths else None

    def forward(self, vectors: Tensor) -> Tensor:
        rows = unit(self.weight)
        return F.linear(vectors, rows if self.length is None else rows * self.length)


class PrototypeHead(nn.Module):
    """Float `[B, in_dim]` -> cosines `[B, out_dim]`, in float32 or better also under autocast."""

    out_dim: int

    def __init__(self, in_dim: int, options: DINOHead, run: RunInfo) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        width = in_dim
        for _ in range(options.layers - 1):
            modules.append(nn.Linear(width, options.hidden_dim))
            if options.batch_norm:
                modules.append(nn.BatchNorm1d(options.hidden_dim))
            modules.append(nn.GELU())
            width = options.hidden_dim
        modules.append(nn.Linear(width, options.bottleneck_dim))
        for module in modules:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.mlp = nn.Sequential(*modules)
        self.last_layer = WeightNormLinear(
            options.bottleneck_dim, options.out_dim, learn_lengths=not options.norm_last_layer
        )
        self.frozen_steps = round(options.freeze_last_layer_epochs * run.steps_per_epoch)
        if self.frozen_steps >= run.total_steps:
            raise UserError(
                "projector.freeze_last_layer_epochs: the last layer would stay as it was drawn for all "
                f"{run.total_steps} steps; set fewer epochs"
            )
        self.out_dim = options.out_dim

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = self.mlp(features)
        with torch.autocast(features.device.type, enabled=False):
            cosines: Tensor = self.last_layer(unit(bottleneck))
        return cosines

    def after_backward(self, step: int) -> None:
        """Leave the last layer as it is for the first steps."""
        if step < self.frozen_steps:
            for parameter in self.last_layer.parameters():
                parameter.grad = None
