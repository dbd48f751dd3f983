"""The modules behind `head.mlp` and `head.identity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from sslkit_mlp import MLP


class MLPHead(nn.Sequential):
    """Float `[B, in_dim]` -> `[B, out_dim]`. In training, B is 2 or more, as BatchNorm demands."""

    out_dim: int

    def __init__(self, in_dim: int, options: MLP) -> None:
        modules: list[nn.Module] = []
        width = in_dim
        for _ in range(options.layers - 1):
            modules += [
                nn.Linear(width, options.hidden_dim, bias=options.bias),
                nn.BatchNorm1d(options.hidden_dim),
                nn.ReLU(inplace=True),
            ]
            width = options.hidden_dim
        modules.append(nn.Linear(width, options.out_dim, bias=options.output_bias))
        if options.output_norm != "none":
            modules.append(nn.BatchNorm1d(options.out_dim, affine=options.output_norm == "batch"))
        super().__init__(*modules)
        self.out_dim = options.out_dim


class IdentityHead(nn.Identity):
    """`[B, in_dim]` -> the same tensor."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.out_dim = in_dim
