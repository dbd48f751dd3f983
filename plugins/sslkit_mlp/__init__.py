"""Heads: the projector and predictor of most methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

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
    - SimCLR (Chen et al. 2020, section 2.1) and MoCo v2 (Chen et al. 2020, arXiv 2003.04297) for a ResNet-50:
      `hidden_norm = "none", hidden_dim = 2048, out_dim = 128, output_bias = true`; the hidden layer is as wide as the
      features. solo-learn's SimCLR has that too. In the authors' code of SimCLR BatchNorm follows both layers, the
      second without a shift: `hidden_dim = 2048, out_dim = 128, bias = false, output_norm = "batch"` comes closest.
    - Barlow Twins (Zbontar et al. 2021, section 2.2): `layers = 3, hidden_dim = 8192, out_dim = 8192, bias = false`.
      VICReg's code (Bardes et al. 2022) has the same with bias in the hidden layers.
    - VIbCReg's code (Lee & Aune 2021): `layers = 3, out_dim = 4096, output_bias = true, output_norm = "iter"`.

    BatchNorm has PyTorch's momentum 0.1 and eps 1e-5, which are the authors' too.
    """

    layers: Annotated[int, Field(ge=1, le=1000)] = 2
    """Number of Linear layers. One layer is a linear map: no hidden layer, so `hidden_dim`, `hidden_norm` and `bias`
    say nothing."""
    hidden_dim: PositiveInt = 4096
    """Width of the hidden layers."""
    out_dim: PositiveInt = 256
    """Width of the output."""
    hidden_norm: Literal["batch", "layer", "none"] = "batch"
    """Normalisation between hidden Linear layers and their ReLU: BatchNorm, LayerNorm (for networks that should not
    depend on the rest of the batch), or none."""
    output_norm: Literal["none", "batch", "batch_no_affine", "iter"] = "none"
    """Normalisation of the output: none, BatchNorm with a learned scale and shift, BatchNorm without them, or IterNorm
    (Huang et al. 2019, arXiv 1904.03441): 64 groups of dimensions are whitened, each by 5 of Newton's iterations, then
    scaled and shifted as learned; an output of 64 dimensions or fewer is only standardised."""
    bias: bool = True
    """Bias in the hidden Linear layers. BatchNorm takes it out again, so with that it changes next to nothing."""
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
