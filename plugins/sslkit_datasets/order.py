"""The order of an epoch over images that lie in blocks: random, and yet read block by block."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKS = 8
"""Blocks that a sample touches at least, where there are as many."""


def windowed(blocks: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """A permutation in which each block is read within a short time.

    The blocks are put one behind the other in a random order, and the image at place p of that row moves to where
    p + window * U(0, 1) stands among all of these numbers. So an image changes places with those up to `window` places
    away, a batch is drawn from about `window` images, and of a block that has been begun nothing is left `window` + its
    own length images later. New blocks are begun one by one, never many at a time.

    Args:
        blocks: int64 `[N]`, not descending: the block of each image.
        window: 1 keeps the images of a block in their order; as many as there are images is a shuffle of them all.
        generator: all that the order depends on, beside `blocks` and `window`.

    Returns:
        int64 `[N]`: positions.
    """
    if len(blocks) == 0:
        return torch.empty(0, dtype=torch.int64)
    numbers = blocks.unique_consecutive(return_inverse=True)[1]
    ranks = torch.randperm(int(numbers[-1]) + 1, generator=generator)
    row = ranks[numbers].argsort(stable=True)
    places = torch.arange(len(row)) + window * torch.rand(len(row), generator=generator, dtype=torch.float64)
    return row[places.argsort(stable=True)]


def sampled(blocks: Tensor, n: int) -> Tensor:
    """At most n positions, ascending, in few blocks that are spread over the set.

    Args:
        blocks: as for `windowed`.
        n: how many; 1 at least.
    """
    if n >= len(blocks):
        return torch.arange(len(blocks))
    counts = blocks.unique_consecutive(return_counts=True)[1]
    wanted = min(len(counts), n, max(_BLOCKS, -(-n * len(counts) // len(blocks))))
    chosen = torch.linspace(0, len(counts) - 1, wanted).round().long().unique()
    starts, share = counts.cumsum(0) - counts, n // len(chosen)
    parts = [torch.arange(int(starts[b]), int(starts[b] + counts[b].clamp_max(share))) for b in chosen.tolist()]
    return torch.cat(parts)
