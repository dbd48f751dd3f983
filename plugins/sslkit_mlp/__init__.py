"""Heads: the projector and predictor of most methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from sslkit.api import Head, RunInfo

if TYPE_CHECKING:
    from torch import nn


class MLP(Head):
    """Linear - BatchNorm - ReLU blocks and a last Linear: the projector and predictor of most methods.

    The defaults are BYOL's projector and predictor (Grill et al. 2020, section 3.3): Linear(in, 4096) with bias -
    BatchNorm - ReLU - Linear(4096, 256) without bias and without BatchNorm on the output, as in the authors' code.
    Elsewhere:

    - SimSiam's projector (Chen & He 2021, section 3): `layers = 3, hidden_dim = 2048, out_dim = 2048, bias = false,
      output_norm = "batch_no_affine"`; its predictor: `hidden_dim = 512, out_dim = 2048, bias = false,
      output_bias = true`.
    - solo-learn's BYOL has a bias in every Linear: `output_bias = true`.

    BatchNorm has PyTorch's momentum 0.1 and eps 1e-5, which are the authors' too.
    """

    layers: PositiveInt = 2
    """Number of Linear layers. One layer is a linear map: no hidden layer, so `hidden_dim` and `bias` say nothing."""
    hidden_dim: PositiveInt = 4096
    """Width of the hidden layers."""
    out_dim: PositiveInt = 256
    """Width of the output."""
    output_norm: Literal["none", "batch", "batch_no_affine"] = "none"
    """BatchNorm on the output: none, with a learned scale and shift, or without them."""
    bias: bool = True
    """Bias in the hidden Linear layers. BatchNorm, which follows, takes it out again, so it changes next to nothing."""
    output_bias: bool = False
    """Bias in the last Linear layer."""

    def build(self, in_dim: int, run: RunInfo) -> nn.Module:
        from sslkit_mlp.heads import MLPHead

        return MLPHead(in_dim, self)


class Identity(Head):
    """Passes its input on: for methods without this head (a loss that wants predictions, and no predictor)."""

    def build(self, in_dim: int, run: RunInfo) -> nn.Module:
        from sslkit_mlp.heads import IdentityHead

        return IdentityHead(in_dim)
