"""Crops of one image of any size, on the CPU: what `geometry.Cropper` does with squares, an image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def cut(original: Tensor, box: Sequence[int], size: int, flipped: bool = False) -> Tensor:
    """Crop, resize and flip.

    The kernel is that of `geometry.resize_weights`. Where that gives floats, this gives whole levels.

    Args:
        original: uint8 `[C, h, w]`.
        box: Top, left, height and width, in pixels of the original; pixels outside it have no weight.
        size: Side of the result.
        flipped: Mirrored left to right.

    Returns:
        uint8 `[C, size, size]`, which may share memory with the original.
    """
    top, left, height, width = box
    pixels = original[:, top : top + height, left : left + width]
    if (height, width) != (size, size):
        # Torch has faster code for what lies in one piece, with the same result.
        pixels = F.interpolate(pixels[None].contiguous(), (size, size), mode="bicubic", antialias=True)[0]
    return pixels.flip(-1) if flipped else pixels


def central_square(original: Tensor) -> tuple[int, int, int, int]:
    """The box of the largest square in the middle: what is left of an image that is read as a square."""
    height, width = original.shape[-2:]
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side
