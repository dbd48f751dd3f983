"""Whether the two views of an image are of the same image, seen from a batch of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.batch import Branches

FEWEST, MOST = 64, 128
"""Images that it takes, and that are looked at. As recipes here draw them, the views of 64 images of CIFAR-10
agree by 4.8 standard errors and more in each of 30 batches, those of 128 by 8 and more."""
LARGEST = 64
"""Pixels of a side above which views are made smaller first."""


@torch.no_grad()
def agreement(branches: Branches, *, together: bool) -> float | None:
    """How much nearer the views of an image are to one another than to views of other images: standard errors above
    chance, by the measure in which they are the most. None where it cannot be told. Waits for the device.

    Each measure is something that crops, flips and changes of colour leave more or less alone: colours, the layout in
    4x4 fields, how rough the picture is at each scale, how its channels go together, and what the backbone makes of it.

    Args:
        branches: the outputs of a batch.
        together: whether all views went through in one pass. An image's views may then lie one after the other, too,
            and to tell takes as many images more as there are views.
    """
    pair = _pair(branches)
    if pair is None:
        return None
    one, two = pair
    layouts = [[(tensors[one], tensors[two]) for tensors in (branches.views, branches.embeddings)]]
    if together:
        # Not across the halves: where these are one view each, what sets the views apart would pass for agreement.
        count = len(branches.views)
        if len(branches.views[one]) < FEWEST * count:
            return None
        halves = (branches.views[one], branches.embeddings[one])
        layouts.append(
            [
                (None, None) if t is None else (t[: len(t) // count * count : count], t[1::count][: len(t) // count])
                for t in halves
            ]
        )
    seen = [z for (a, b), (c, d) in layouts if a is not None and b is not None for z in _of(a, b, c, d)]
    return max(seen, default=None)


def _pair(branches: Branches) -> tuple[int, int] | None:
    """The first two views of one size that the online network saw, and the target, too, if it saw any: of what only
    one of them saw, nobody knows to which it belongs, for MoCo shuffles the target's images."""
    targets = any(t is not None for t in branches.targets)
    outputs = zip(branches.embeddings, branches.projections, branches.targets, strict=True)
    seen = [
        v for v, (embedding, projection, target) in enumerate(outputs)
        if (embedding is not None or projection is not None) and (target is not None or not targets)
    ]  # fmt: skip
    for number, one in enumerate(seen):
        for two in seen[number + 1 :]:
            shape = branches.views[one].shape
            if shape == branches.views[two].shape and len(shape) == 4 and min(shape[-2:]) >= 4:
                return (one, two) if shape[0] >= FEWEST else None
    return None


def _of(a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None) -> list[float]:
    """Standard errors above chance, by each measure that says something, and by all of these together."""
    pairs = list(zip(_measures(a), _measures(b), strict=True))
    if c is not None and d is not None and c.shape == d.shape and len(c) == len(a):
        pairs.append((c[:MOST].float(), d[:MOST].float()))
    apart = [distances for x, y in pairs if (distances := _apart(x, y)) is not None]
    return [_above_chance(distances) for distances in (*apart, torch.stack(apart).sum(0))] if apart else []


def _measures(views: Tensor) -> list[Tensor]:
    """Colour, layout, roughness and how channels go together, each `[n, numbers]`."""
    v = views[:MOST].float()
    if max(v.shape[-2:]) > LARGEST:
        v = F.adaptive_avg_pool2d(v, LARGEST)
    grey = v.mean(1, keepdim=True)
    layout = F.adaptive_avg_pool2d(grey, 4).flatten(1)
    scale = grey = _even(grey)
    roughness = [grey.abs().mean((1, 2, 3))]
    while min(scale.shape[-2:]) >= 4:
        roughness += [scale.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3)]
        scale = F.avg_pool2d(scale, 2)
    even = _even(v).flatten(2)
    return [
        torch.cat([v.mean((2, 3)), v.std((2, 3))], 1), layout - layout.mean(1, keepdim=True),
        torch.stack(roughness, 1), (even @ even.mT).flatten(1) / even.shape[-1],
    ]  # fmt: skip


def _even(v: Tensor) -> Tensor:
    """Pictures of one light and one contrast each."""
    v = v - v.mean((2, 3), keepdim=True)
    return v / v.flatten(1).std(1).clamp_min(1e-6)[:, None, None, None]


def _apart(a: Tensor, b: Tensor) -> Tensor | None:
    """How far each first view is from each second one, 1 on average; None of blank pictures, or where a network has
    broken down."""
    a, b = ((x - x.mean(0)) / x.std(0).clamp_min(1e-6) for x in (a.double(), b.double()))
    distances = torch.cdist(a, b)
    mean = float(distances.mean())
    return distances / mean if mean > 0 and math.isfinite(mean) else None


def _above_chance(apart: Tensor) -> float:
    """Of an image's view and the other images' second views, the share that is farther away than its own second view:
    its mean over images is 1/2 where pairs are anyhow, with a standard error of sqrt(1 / 12 n)."""
    own, count = apart.diagonal()[:, None], len(apart)
    farther = ((apart > own).double() + 0.5 * (apart == own).double()).sum(1) - 0.5
    return float(farther.mean() / (count - 1) - 0.5) * math.sqrt(12 * count)
