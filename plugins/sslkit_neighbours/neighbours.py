"""What the losses of this plugin share: the search for nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkit.nn import Queue, unit


@torch.no_grad()
def nearest(vectors: Tensor, queue: Queue) -> tuple[Tensor, Tensor]:
    """The queue's row most similar to each vector `[n, d]`, both of length 1, and the mean similarity."""
    vectors = unit(vectors)
    rows = queue.rows.to(vectors.dtype)
    with torch.autocast(vectors.device.type, enabled=False):
        found = unit(rows.index_select(0, (vectors @ rows.mT).argmax(1)))
    return found, (vectors * found).sum(-1).mean()
