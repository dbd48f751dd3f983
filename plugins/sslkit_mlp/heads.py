"""The modules behind `head.mlp` and `head.identity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sslkit_mlp.iter_norm import IterNorm

if TYPE_CHECKING:
    from sslkit_mlp import MLP


class MLPHead(nn.Sequential):
    """Float `[B, in_dim]` -> `[B, out_dim]`. In training, B is 2 or more, as BatchNorm demands."""

    out_dim: int

    def __init__(self, in_dim: int, options: MLP) -> None:
        modules: list[nn.Module] = []
        width = in_dim
        for _ in range(options.layers - 1):
            modules.append(nn.Linear(width, options.hidden_dim, bias=options.bias))
            if options.hidden_norm == "batch":
                modules.append(nn.BatchNorm1d(options.hidden_dim))
            elif options.hidden_norm == "layer":
                modules.append(nn.LayerNorm(options.hidden_dim))
            modules.append(nn.ReLU(inplace=True))
            width = options.hidden_dim
        modules.append(nn.Linear(width, options.out_dim, bias=options.output_bias))
        if options.output_norm == "iter":
            modules.append(IterNorm(options.out_dim))
        elif options.output_norm != "none":
            modules.append(nn.BatchNorm1d(options.out_dim, affine=options.output_norm == "batch"))
        super().__init__(*modules)
        self.out_dim = options.out_dim


class IdentityHead(nn.Identity):
    """`[B, in_dim]` -> the same tensor."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.out_dim = in_dim
