"""The module behind `backbone.convnet`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from sslkit_convnet import ConvNet


class Network(nn.Module):
    """Float `[B, C, h, w]` -> `[B, feature_dim]`."""

    def __init__(self, channels: int, options: ConvNet) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for width, stride in zip(options.widths, options.strides, strict=True):
            norm = nn.BatchNorm2d(width) if options.norm == "batch" else nn.GroupNorm(math.gcd(width, 8), width)
            convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
            blocks += [convolution, norm, nn.ReLU(inplace=True)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = options.pool
        self.feature_dim = channels * options.pool**2

    def forward(self, images: Tensor) -> Tensor:
        """Features of normalised images."""
        maps = self.blocks(images)
        height, width = maps.shape[-2:]
        # The gradient of adaptive pooling is not deterministic on CUDA; where the cells divide the map, plain pooling
        # is the same function.
        if height % self.pool == 0 and width % self.pool == 0:
            pooled = F.avg_pool2d(maps, (height // self.pool, width // self.pool))
        else:
            pooled = F.adaptive_avg_pool2d(maps, self.pool)
        return pooled.flatten(1)
