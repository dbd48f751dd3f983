"""Subtracting a mean and dividing by a standard deviation, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sslkit.api import RunInfo
from sslkit.errors import UserError


class Normalize:
    """`(x - mean) / std` of the channels of a batch; without values of its own, with the training images'.

    The values are Python numbers, not tensors: no device has to hold them.

    Args:
        where: What an error names, such as `view_generator.two_crops`.
        mean: One value per channel, or None.
        std: One value per channel, or None.
        run: The run, for its channels and its training images' statistics.

    Raises:
        UserError: the number of values is not the number of channels, or a deviation is zero.
    """

    def __init__(self, where: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, run: RunInfo) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != run.channels:
                raise UserError(
                    f"{where}.{name}: {len(values)} values for images of {run.channels} channels; give one per channel"
                )
        self.mean = mean or run.mean
        self.std = std or run.std
        if not all(self.std):
            raise UserError(
                f"{where}: a channel of the training images is constant (its standard deviation is 0); set std"
            )

    def __call__(self, channels: Sequence[Tensor]) -> list[Tensor]:
        """Each channel (any shape) normalised with its own values."""
        return [channel.sub(mean).div_(std) for channel, mean, std in zip(channels, self.mean, self.std, strict=True)]
