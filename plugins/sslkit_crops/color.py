"""Colour operations on a batch, with one parameter per sample.

Images come channel by channel: float 0..1 `[C, n, h, w]`, so that a channel of all samples lies in one piece. A
parameter is a tensor `[n, 1, 1]`. Nothing branches on data, so each function compiles; each gives what the function
of the same name gives in `torchvision.transforms.v2.functional` for float images. Functions that end in `_` may write
into their first argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
NARROW_HUE = 1 / 6
"""Up to this shift (in turns) the distance to a primary colour stays where one fold fewer finds it."""


def grayscale(x: Tensor) -> Tensor:
    """Luma of three channels, the mean of any other number: `[C, n, h, w]` -> `[n, h, w]`."""
    if len(x) != 3:
        return x.mean(0)
    return x[0].mul(LUMA[0]).add_(x[1], alpha=LUMA[1]).add_(x[2], alpha=LUMA[2])


def blend_(x: Tensor, keep: Tensor, gray: Tensor, mean: Tensor) -> Tensor:
    """`clamp(keep * x + gray * grayscale(x) + mean * mean(grayscale(x)))`, on which three operations agree.

    Brightness b is (b, 0, 0), saturation s is (s, 1 - s, 0), contrast c is (c, 0, 1 - c).
    """
    luma = grayscale(x)
    level = luma.mean((1, 2), keepdim=True)
    return x.mul_(keep).add_(luma.mul_(gray).add_(level * mean)).clamp_(0.0, 1.0)


def shift_hue(x: Tensor, turns: Tensor, widest: float) -> Tensor:
    """Turn the hue by a part of the circle, keeping saturation and value of the HSV model.

    With chroma c = max - min, a channel is min + clamp(2c - d, 0, c), where d is c times the distance (in sixths of a
    turn) of the hue from that channel's primary. Kept multiplied by c, the hue needs no division, and grey no guard.

    Args:
        x: `[3, n, h, w]`.
        turns: `[n, 1, 1]`, within -`widest` .. `widest`.
        widest: At most 0.5.
    """
    r, g, b = x.unbind(0)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    # Signed distance from red, in -3c .. 3c. The small number decides for one side where green equals blue.
    side = g.sub(b).add_(1e-20).sign_()
    hue = g.add(b).sub_(r).add_(high).sub_(low, alpha=2).mul_(side).add_(chroma * (6 * turns))
    base, twice = low - chroma, chroma * 2
    shifted = []
    for primary in (0, 2, -2):
        # |y| is up to 6c (8c for wide shifts) and the circle is 6c round: folding at 3c makes it 3c - distance.
        y = hue.sub(chroma, alpha=primary).abs_().sub_(chroma, alpha=3).abs_()
        if widest > NARROW_HUE:
            y = y.sub_(chroma, alpha=3).abs_().neg_().add_(chroma, alpha=3)
        shifted.append(torch.clamp(y, chroma, twice).add_(base))
    return torch.stack(shifted)


def gaussian_taps(sigma: Tensor, kernel_size: int) -> list[Tensor]:
    """Weights of a Gaussian kernel from its centre outwards: `kernel_size // 2 + 1` tensors shaped as `sigma`."""
    taps = [torch.exp(-0.5 * (k / sigma) ** 2) for k in range(kernel_size // 2 + 1)]
    total = taps[0] + 2 * torch.stack(taps[1:]).sum(0)
    return [tap / total for tap in taps]


def gaussian_blur(x: Tensor, taps: list[Tensor]) -> Tensor:
    """Separable blur of `[C, n, h, w]` with reflected edges; `taps` as `gaussian_taps` gives them, each `[n, 1, 1]`."""
    radius = len(taps) - 1
    for axis, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = x.shape[axis]
        padded = F.pad(x, pad, mode="reflect")
        x = padded.narrow(axis, radius, size) * taps[0]
        for k in range(1, radius + 1):
            both = padded.narrow(axis, radius - k, size) + padded.narrow(axis, radius + k, size)
            x.add_(both.mul_(taps[k]))
    return x


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Values at or above the threshold inverted."""
    return torch.lerp(x, 1 - x, x.clone().ge_(threshold))
