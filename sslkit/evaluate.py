"""What features are worth: named protocols on a clean, eval-mode bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.api import Images

CHUNK = 500
"""Images per forward pass; one shape, so that evaluation never makes anything compile again."""


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; every module's mode as it was after it."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def features(
    network: nn.Module,
    images: Images,
    indices: Tensor,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    bf16: bool = False,
    channels_last: bool = True,
) -> Tensor:
    """float32 `[n, feature_dim]` on the device: `network(prepare(images[indices]))` in eval mode."""
    found = []
    with in_eval_mode(network), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for part in indices.split(CHUNK):
            pictures = prepare(images.read(part).to(device))
            if channels_last:
                pictures = pictures.contiguous(memory_format=torch.channels_last)
            found.append(network(pictures).float())
    return torch.cat(found)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, *, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """int64 `[Q]`: the class that the k nearest of the bank vote for, weighted by exp(cosine / temperature).

    Wu et al. 2018 (arXiv 1805.01978), section 3.4. Figures with another k, temperature, bank or layer do not compare.

    Args:
        bank: float `[N, d]`; need not be normalised.
        bank_labels: int64 `[N]`.
        queries: float `[Q, d]`.
        classes: number of classes.
        k: neighbours that vote; at most N are used.
        temperature: how steeply near neighbours outweigh far ones.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    votes = []
    for part in queries.split(1024):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = ((similarity - 1) / temperature).exp()  # minus 1: the same vote, and exp cannot overflow
        score = torch.zeros(len(part), classes, device=bank.device)
        votes.append(score.scatter_add_(1, bank_labels[nearest], weights).argmax(dim=1))
    return torch.cat(votes)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Share of queries that `knn_predict` gets right, 0..1."""
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    predicted = knn_predict(bank, bank_labels, queries, classes, k=k, temperature=temperature)
    return float((predicted == query_labels).float().mean())
