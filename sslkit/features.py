"""What features are worth: named protocols on a clean, eval-mode bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import randomness
from sslkit.api import Images, ViewMaker
from sslkit.viewing import Viewing

CHUNK = 500
"""Images per forward pass; one shape, so that evaluation never makes anything compile again."""

TOLERANCE = 1e-4
"""How far from a straight line a normalisation may be, as a share of its range, and still be undone."""


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
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """float32 `[n, feature_dim]` on the device: `network(prepare(images[indices]))` in eval mode.

    `poll` is called between chunks; what it raises ends this early.
    """
    found = []
    with in_eval_mode(network), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for part in indices.split(CHUNK):
            poll()
            pictures = prepare(images.read(part).to(device))
            if channels_last:
                pictures = pictures.contiguous(memory_format=torch.channels_last)
            found.append(network(pictures).float())
    return torch.cat(found)


class FeatureCache:
    """Features of images that were asked for before, for as long as the network does not change."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        """By branch and split: sorted positions in the split, int64 `[n]` on the CPU, and their features."""

    def get(self, key: tuple[str, str], indices: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of `indices`, in their order; `compute` gives those of positions that are not known yet."""
        positions, found = self.known.get(key, (indices[:0], torch.empty(0)))
        missing = indices[~torch.isin(indices, positions)].unique()
        if len(missing):
            rows = compute(missing)
            positions, order = torch.cat([positions, missing]).sort()
            found = torch.cat([found.to(rows.device), rows])[order.to(rows.device)] if len(found) else rows
            self.known[key] = positions, found
        return found[torch.searchsorted(positions, indices).to(found.device)]


@torch.no_grad()
def view_projections(
    online: Callable[[Tensor], tuple[Tensor, Tensor]],
    images: Images,
    indices: Tensor,
    views: ViewMaker,
    number: int,
    generator: torch.Generator,
    device: torch.device,
    *,
    channels_last: bool = True,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """float32 `[n, number, d]`: `online` projections of global views, the views of an image beside one another.

    The network should be in eval mode; each image is drawn as often as its views need. `poll` as in `features`.
    """
    everything = range(len(views.specs))
    chosen = [v for v in everything if views.specs[v].kind == "global"] or list(everything)
    draws = -(-number // len(chosen))
    found, viewing = [], Viewing(images, views)
    for part in indices.split(max(1, CHUNK // draws)):
        poll()
        seen = viewing.of(part, draws, generator, device)
        rows = []
        for view in chosen:
            pixels = seen[view].contiguous(memory_format=torch.channels_last) if channels_last else seen[view]
            rows.append(online(pixels)[1].float())
        found.append(torch.stack(rows, dim=1).reshape(len(part), draws * len(chosen), -1)[:, :number])
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


def knn_record(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int, temperature: float
) -> dict[str, float]:
    """`knn_accuracy` with what it depends on, as a record of a run has it: `k` is at most the size of the bank."""
    k = min(k, len(bank))
    return {
        "knn_top1": knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature), "knn_k": k,
        "knn_temperature": temperature, "knn_bank": len(bank), "knn_queries": len(queries),
    }  # fmt: skip


def chosen(images: Images, number: int) -> Tensor:
    """`number` images of the set, the same every time; all of them for 0. A set in shards chooses what is cheap."""
    if number == 0 or number >= len(images):
        return torch.arange(len(images))
    sample: Callable[[int], Tensor] | None = getattr(images, "sample", None)
    if sample:
        return sample(number)
    order = torch.randperm(len(images), generator=randomness.generator(0, "knn"))
    return order[:number].sort().values


def normalisation(views: ViewMaker, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """What `clean` makes of black, and of white less black: each `[C, 1, 1]`. None unless it is a straight line."""
    levels = torch.tensor([0, 128, 255], dtype=torch.uint8)
    cleaned = views.clean(levels.view(3, 1, 1, 1).expand(3, *shape).contiguous()).double()
    black, grey, white = cleaned[:, :, :1, :1]
    span = white - black
    even = (cleaned - cleaned[:, :, :1, :1]).abs().amax() <= TOLERANCE * span.abs().amin()
    straight = ((grey - black - span * 128 / 255).abs() <= TOLERANCE * span.abs()).all()
    return (black, span) if bool(even & straight & (span != 0).all() & span.isfinite().all()) else None
