"""Subtracting a mean and dividing by a standard deviation, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkit.api import RunInfo
from sslkit.errors import UserError


class Normalize:
    """`(x - mean) / std` of images `[B, C, H, W]`; without values of its own, with the training images'.

    The values are Python numbers, not tensors, so that no device holds them and a compiler sees them.

    Raises:
        UserError: the number of values is not the number of channels, or a deviation is zero.
    """

    def __init__(
        self, where: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, run: RunInfo
    ) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != run.channels:
                raise UserError(
                    f"{where}.{name}: {len(values)} values for images of {run.channels} channels; give one per channel"
                )
        self.mean = mean or run.mean
        self.std = std or run.std
        self.m=torch.tensor(self.mean)[:,None,None,None]; self.s=1/torch.tensor(self.std)[:,None,None,None]
        if not all(self.std):
            raise UserError(
                f"{where}.std: a channel of the training images is constant (std 0), which cannot be divided by; "
                "give std"
            )

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([(x[:, c] - m) / s for c, (m, s) in enumerate(zip(self.mean, self.std, strict=True))], 1)

    def in_place(self, x: Tensor) -> None:
        x.sub_(self.m).mul_(self.s)
