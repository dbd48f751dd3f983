"""A small plain network, for small pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from sslkit.api import Backbone, RunInfo
from sslkit.errors import UserError

if TYPE_CHECKING:
    from torch import nn


class ConvNet(Backbone):
    """A few 3x3 convolutions, each with normalisation and ReLU, and average pooling: for small pictures.

    Trains in seconds on a CPU and does not import timm. `feature_dim` is `widths[-1] * pool ** 2`: 384 by default.
    """

    widths: tuple[PositiveInt, ...] = (24, 48, 96)
    """Channels of each convolution."""
    strides: tuple[PositiveInt, ...] = (2, 2, 1)
    """Stride of each convolution; as many as `widths`."""
    pool: PositiveInt = 2
    """Side, in cells, of the map that average pooling leaves."""
    norm: Literal["batch", "group"] = "batch"
    """`batch`: BatchNorm. `group`: GroupNorm of at most 8 groups, which treats each image alone, so that the network
    computes the same however a batch is divided over processes."""

    @model_validator(mode="after")
    def _as_many(self) -> ConvNet:
        if not self.widths or len(self.widths) != len(self.strides):
            raise PydanticCustomError(
                "strides",
                "'widths' and 'strides' should be of one length, one or more, not {widths} and {strides}",
                {"widths": len(self.widths), "strides": len(self.strides)},
            )
        return self

    def build(self, run: RunInfo) -> nn.Module:
        from sslkit_convnet.network import Network

        for size in sorted({view.size for view in run.views} or {run.image_size}):
            side = size
            for stride in self.strides:
                side = -(-side // stride)  # a 3x3 convolution with padding 1 rounds up
            if side < self.pool:
                raise UserError(
                    f"backbone 'convnet': the strides leave a map of {side}x{side} of an image of {size} px, less "
                    f"than pool = {self.pool}; lower the strides or pool"
                )
        return Network(run.channels, self)
