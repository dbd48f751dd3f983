"""Colour operations on a batch, with one parameter per sample.

An image batch is a list of its C channels, float 0..1 `[n, h, w]` each, so that a channel lies in one piece; a
parameter is a tensor `[n, 1, 1]`. Nothing branches on data, so that every function compiles, and none writes into its
arguments. Each gives what the function of that name in `torchvision.transforms.v2.functional` gives for float images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Channels = Sequence[Tensor]

LUMA = (0.2989, 0.587, 0.114)
NARROW_HUE = 1 / 6
"""Up to this shift, in turns, one fold less finds the distance to a primary colour."""


def grayscale(x: Channels) -> Tensor:
    """Luma of three channels; the mean of any other number, so that one channel is its own grey."""
    weights = LUMA if len(x) == 3 else [1 / len(x)] * len(x)
    gray = x[0] * weights[0]
    for channel, weight in zip(x[1:], weights[1:], strict=True):
        gray.add_(channel, alpha=weight)
    return gray


def blend(x: Channels, keep: Tensor, gray: Tensor, mean: Tensor) -> list[Tensor]:
    """`clamp(keep * x + gray * grayscale(x) + mean * mean(grayscale(x)))`, the form of three operations.

    Brightness b is (b, 0, 0), saturation s is (s, 1 - s, 0), contrast c is (c, 0, 1 - c).
    """
    luma = grayscale(x)
    level = luma.mean((1, 2), keepdim=True)
    rest = luma.mul_(gray).add_(level * mean)
    return [(channel * keep).add_(rest).clamp_(0.0, 1.0) for channel in x]


def shift_hue(x: Channels, turns: Tensor, widest: float) -> list[Tensor]:
    """Turn the hue by a part of the circle, keeping saturation and value of the HSV model.

    With chroma c = max - min, a channel is min + clamp(2c - d, 0, c), where d is c times the distance (in sixths of a
    turn) of the hue from that channel's primary. Kept multiplied by c, the hue needs no division, and grey no guard.

    Args:
        x: Red, green, blue.
        turns: Within -`widest` .. `widest`.
        widest: At most 0.5.
    """
    r, g, b = x
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    # The signed distance from red, in -3c .. 3c. The small number takes one side where green equals blue.
    side = g.sub(b).add_(1e-20).sign_()
    hue = g.add(b).sub_(r).add_(high).sub_(low, alpha=2).mul_(side).add_(chroma * (6 * turns))
    base, twice = low - chroma, chroma * 2
    turned = []
    for primary in (0, 2, -2):
        # |y| is up to 6c (8c for wide shifts) and the circle is 6c round: folded at 3c it is 3c - distance.
        y = hue.sub(chroma, alpha=primary).abs_().sub_(chroma, alpha=3).abs_()
        if widest > NARROW_HUE:
            y = y.sub_(chroma, alpha=3).abs_().neg_().add_(chroma, alpha=3)
        turned.append(torch.clamp(y, chroma, twice).add_(base))
    return turned


def gaussian_taps(sigma: Tensor, kernel_size: int) -> Tensor:
    """Weights of a Gaussian kernel from its centre outwards: sigma `[...]` -> `[..., kernel_size // 2 + 1]`."""
    taps = torch.stack([torch.exp(-0.5 * (k / sigma) ** 2) for k in range(kernel_size // 2 + 1)], -1)
    return taps / (2 * taps.sum(-1, keepdim=True) - 1)


def gaussian_blur(x: Channels, taps: Tensor) -> list[Tensor]:
    """Separable blur with reflected edges. `taps` is `[n, r + 1]`, as `gaussian_taps` gives it; r < h and r < w."""
    centre, *others = (tap[:, None, None] for tap in taps.unbind(1))
    r = len(others)
    blurred = []
    for y in x:
        for axis in (2, 1):
            size = y.shape[axis]
            # What F.pad(mode="reflect") does; compiled on a CPU, that one reads value by value.
            left, right = y.narrow(axis, 1, r).flip(axis), y.narrow(axis, size - 1 - r, r).flip(axis)
            padded = torch.cat([left, y, right], axis)
            y = padded.narrow(axis, r, size) * centre
            for k, tap in enumerate(others, start=1):
                pair = padded.narrow(axis, r - k, size) + padded.narrow(axis, r + k, size)
                y.add_(pair.mul_(tap))
        blurred.append(y)
    return blurred


def solarize(x: Channels, threshold: float) -> list[Tensor]:
    """Values at or above the threshold inverted."""
    return [torch.lerp(channel, 1 - channel, channel.clone().ge_(threshold)) for channel in x]
