"""Random resized crops of a whole batch: boxes, resize weights, and two matrix products per sample.

A crop with resize is separable and linear: `rows @ image @ columns`, where the weights carry the box, the flip and an
antialiased bicubic kernel. It equals torchvision's crop followed by an antialiased bicubic resize of float images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ATTEMPTS = 10
TABLE_LIMIT = 4 * 2**20
"""Weights of all boxes are kept in a table up to this many numbers (16 MiB); beyond, they are computed per batch."""
CHUNK_VALUES = 2**18
"""Pixel values worked on at a time on a CPU: about 1 MiB of floats, so that they stay in its cache."""

Range = tuple[float, float]
"""Lowest and highest."""


class Between:
    """Spreads numbers 0..1 over a range of each view's own.

    Args:
        ranges: Of V views.
        dtype: Of the numbers.
    """

    def __init__(self, ranges: Sequence[Range], dtype: torch.dtype = torch.float32) -> None:
        self.low = torch.tensor([low for low, _ in ranges], dtype=dtype)
        self.width = torch.tensor([high - low for low, high in ranges], dtype=dtype)

    def __call__(self, unit: Tensor) -> Tensor:
        """`unit` is `[..., V]`."""
        return self.low + self.width * unit


class Boxes:
    """Draws boxes as torchvision's `RandomResizedCrop.get_params` does, for images of any sizes.

    Up to ten attempts draw an area (uniform) and an aspect ratio (log-uniform); the first that fits is placed
    uniformly. If none fits, the box is central, with the nearest ratio allowed.

    Args:
        scales: Range of the area, as a fraction of the image's, of each of V views.
        ratios: Range of width / height of each view.
    """

    def __init__(self, scales: Sequence[Range], ratios: Sequence[Range]) -> None:
        self.views = len(scales)
        # Double precision: a single-precision uniform number times the range could round up to its excluded end.
        self.area = Between(scales, torch.float64)
        self.log_aspect = Between([(math.log(low), math.log(high)) for low, high in ratios], torch.float64)
        self.narrowest, self.widest = torch.tensor(ratios, dtype=torch.float64).unbind(1)

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Tensor:
        """int64 `[n, V, 4]`: top, left, height, width, in images of these heights and widths, int `[n, 2]`.

        `generator` is on the CPU.
        """
        uniform = torch.rand(4, len(sizes), self.views, ATTEMPTS, generator=generator, dtype=torch.float64)
        rows, columns = sizes.to(torch.float64)[:, :, None, None].unbind(1)
        area = rows * columns * self.area(uniform[0].mT).mT
        aspect = torch.exp(self.log_aspect(uniform[1].mT).mT)
        height, width = (area / aspect).sqrt_().round_(), (area * aspect).sqrt_().round_()
        fits = (height > 0) & (height <= rows) & (width > 0) & (width <= columns)
        first = fits.byte().argmax(-1, keepdim=True)
        top, left = uniform[2] * (rows - height + 1), uniform[3] * (columns - width + 1)
        boxes = torch.stack([top, left, height, width], -1).floor_().long()
        boxes = boxes.gather(2, first[..., None].expand(-1, -1, -1, 4)).squeeze(2)
        return torch.where(fits.any(-1, keepdim=True), boxes, self._central(sizes))

    def _central(self, sizes: Tensor) -> Tensor:
        """The boxes where ten attempts failed, int64 `[n, V, 4]`: the largest with the nearest ratio allowed."""
        rows, columns = sizes.to(torch.float64)[:, :, None].unbind(1)
        height = torch.minimum(rows, (columns / self.narrowest).round_().clamp_min_(1))
        width = torch.minimum(columns, (rows * self.widest).round_().clamp_min_(1))
        top, left = (rows - height).div_(2).floor_(), (columns - width).div_(2).floor_()
        return torch.stack([top, left, height, width], -1).long()


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, in_size: int, out_size: int) -> Tensor:
    """Weights that resize the pixels `start .. start + length - 1` of a line to `out_size` pixels.

    The kernel is bicubic (a = -0.5) and widened when shrinking (antialiased), as in Pillow and in torch's
    `interpolate(mode="bicubic", antialias=True)`; pixels outside the box have no weight.

    Args:
        start: First pixel of the box, integers `[n]`.
        length: Pixels of the box, integers `[n]`.
        flip: Whether the resized line is reversed, bool `[n]`.
        in_size: Pixels of the whole line.
        out_size: Pixels of the resized line.

    Returns:
        float32 `[n, out_size, in_size]`; every row sums to 1.
    """
    target = torch.arange(out_size, device=start.device)
    source = torch.arange(in_size, device=start.device)
    target = torch.where(flip[:, None], out_size - 1 - target, target)
    step = length[:, None] / out_size
    centre = start[:, None] + (target + 0.5) * step
    x = (source + 0.5 - centre[..., None]).abs_().div_(step.clamp(min=1.0)[..., None])
    inside = (source >= start[:, None]) & (source < (start + length)[:, None])
    weights = _bicubic(x).mul_(inside[:, None])
    return weights.div_(weights.sum(-1, keepdim=True))


def _bicubic(x: Tensor) -> Tensor:
    """The bicubic kernel (a = -0.5) at distances x >= 0: the outer piece, plus what the inner one has beyond it."""
    far, near = x.clamp(max=2.0), x.clamp(max=1.0)
    outer = far.mul(-0.5).add_(2.5).mul_(far).sub_(4.0).mul_(far).add_(2.0)
    return outer.add_((near - 1).square_().mul_(near.mul(2.0).sub_(1.0)))


def lines_of(images: Tensor) -> Tensor:
    """uint8 `[B, C, H, W]` -> what every `Cropper` of these images starts from: float 0..1 `[B, H, C * W]`."""
    B, C, H, W = images.shape
    # Rows outermost, so that one product takes all channels.
    return torch.empty(B, H, C, W, device=images.device).copy_(images.transpose(1, 2)).div_(255).view(B, H, C * W)


class Cropper:
    """Crops square images of one side to square views of another.

    Args:
        in_size: Side of the images, in pixels.
        out_size: Side of the views, in pixels.
    """

    def __init__(self, in_size: int, out_size: int) -> None:
        self.in_size, self.out_size = in_size, out_size
        self.boxes = in_size * (in_size + 1) // 2

    def __call__(self, lines: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        """Crop, resize and flip, once for every view.

        Args:
            lines: Images as `lines_of` gives them.
            boxes: int64 `[B, k, 4]` for k views: top, left, height, width.
            flips: bool `[B, k]`: mirrored left to right.

        Returns:
            float `[B, k, C, out_size, out_size]`, not contiguous, and beyond 0..1 where the kernel overshoots.
        """
        B, k = flips.shape
        top, left, height, width = boxes.flatten(0, 1).unbind(1)
        flip = flips.flatten()
        rows = self._weights(top, height, torch.zeros_like(flip)).view(B, k * self.out_size, self.in_size)
        columns = self._weights(left, width, flip)
        x = torch.bmm(rows, lines).view(B * k, -1, self.in_size)
        x = torch.bmm(x, columns.transpose(1, 2))
        return x.view(B, k, self.out_size, -1, self.out_size).transpose(2, 3)

    def _weights(self, start: Tensor, length: Tensor, flip: Tensor) -> Tensor:
        # Compiled, computing them costs no more than reading them; on a GPU the table would have to be there too.
        tabled = 2 * self.boxes * self.in_size * self.out_size <= TABLE_LIMIT
        if not tabled or start.device.type != "cpu" or torch.compiler.is_compiling():
            return resize_weights(start, length, flip, self.in_size, self.out_size)
        return self.table.index_select(0, self._row(start, length, flip))

    def _row(self, start: Tensor, length: Tensor, flip: Tensor) -> Tensor:
        """Where the table holds a box: those of one length lie together, the longest first."""
        shorter = self.in_size - length
        return (shorter * (shorter + 1)).div_(2, rounding_mode="floor") + start + flip * self.boxes

    @functools.cached_property
    def table(self) -> Tensor:
        """Weights of every box, plain and flipped: float32 `[2 * boxes, out_size, in_size]`."""
        shorter = torch.arange(self.in_size)
        start = torch.cat([torch.arange(s + 1) for s in range(self.in_size)])
        length = self.in_size - shorter.repeat_interleave(shorter + 1)
        flip = torch.arange(2 * self.boxes) >= self.boxes
        return resize_weights(start.repeat(2), length.repeat(2), flip, self.in_size, self.out_size)


def resize(images: Tensor, size: int) -> Tensor:
    """Whole images `[B, C, H, W]` (float 0..1) resized to `[B, C, size, size]`, antialiased bicubic."""
    whole = torch.zeros(1, dtype=torch.long, device=images.device)
    plain = torch.zeros(1, dtype=torch.bool, device=images.device)
    rows, columns = (resize_weights(whole, whole + side, plain, side, size)[0] for side in images.shape[-2:])
    with torch.autocast(images.device.type, enabled=False):
        return (rows @ images @ columns.T).clamp_(0.0, 1.0)


def chunks(n: int, values: int) -> list[slice]:
    """Nearly equal slices of n samples of `values` numbers each, such that one at a time stays in a CPU's cache."""
    count = -(-n // max(1, CHUNK_VALUES // values))
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]
