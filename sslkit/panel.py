"""Everything that a training loop can measure of itself at next to no cost: one panel for every loop.

Takes plain tensors and modules, so that `observer.health` and loops that are not sslkit's measure the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import health
from sslkit.batch import Branches


class Panel:
    """The newest features, and what is read off them.

    One step of a loop calls, in this order:

        panel.before_update(online, target)                 # only before an update that will be recorded
        ... optimizer.step(), target update, in this order or the other ...
        panel.step(branches)                                # every step
        record |= panel.scalars(branches, online, target)   # only at a step that is recorded
        record |= panel.spectra()                           # now and then, such as once an epoch

    Nothing waits for the device but `spectra` and `state_dict`.
    """

    def __init__(self, ring: int = 4096, sample: int = 65_536, images: int = 64) -> None:
        """
        Args:
            ring: how many of the newest embeddings and projections to keep.
            sample: at most how many elements of the target's parameters to compare across an update.
            images: of how many images the views are compared.
        """
        self.embeddings, self.projections = Ring(ring), Ring(ring)
        self.sample, self.images = sample, images
        self._before: tuple[Tensor, Tensor] | None = None
        """The target's and the online network's sampled parameters before the update."""
        self._entire = True

    def before_update(self, online: nn.Module, target: nn.Module | None, *, entire: bool = True) -> None:
        """Note the sampled parameters as they are before an update. Parameters are paired by name and shape, so the
        online network may have a predictor besides.

        Args:
            online: the online network.
            target: the target, if there is one.
            entire: whether the update is certain to lie between here and `scalars`. If it may have been made before,
                a target that stands still says nothing: both figures of the update are then NaN.
        """
        mine, theirs = shared_parameters(online, target)
        self._entire = entire
        self._before = (_sampled(theirs, self.sample), _sampled(mine, self.sample)) if mine else None

    def forget(self) -> None:
        """Drop what `before_update` noted."""
        self._before = None

    def step(self, branches: Branches) -> None:
        """Add the first view's embeddings and projections (of those that are not None) to the rings."""
        for ring, views in ((self.embeddings, branches.embeddings), (self.projections, branches.projections)):
            if rows := _there(views):
                ring.add(rows[0])

    @torch.no_grad()
    def scalars(
        self, branches: Branches, online: nn.Module | None = None, target: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """0-dim tensors on the device, of the step just taken: `std_sqrt_d`, `cosine`, `alignment`, `uniformity`,
        `view_difference`, `view_difference_max` (where `branches.views` has two of one size), `target_drift`,
        `target_norm_ratio`, and after `before_update` also `target_step` and `tau_measured`. What the branches do not
        have is left out. `branches` may have gradients; nothing here does."""
        found: dict[str, Tensor] = {}
        if projections := _there(branches.projections):
            found |= {"std_sqrt_d": health.std_sqrt_d(projections[0]), "uniformity": health.uniformity(projections[0])}
        if pair := _pair(_first(branches.predictions, branches.projections), branches.targets, branches.projections):
            found["cosine"] = health.cosine_between(*pair)
        if pair := _pair(branches.projections, branches.projections, branches.targets):
            found["alignment"] = health.alignment(*pair)
        if views := _same_size(branches.views):
            found["view_difference"], found["view_difference_max"] = health.view_difference(*views, self.images)
        mine, theirs = shared_parameters(online, target)
        if mine:
            found["target_drift"], found["target_norm_ratio"] = health.target_drift(mine, theirs)
        if mine and self._before is not None:
            (old, read), new = self._before, _sampled(theirs, self.sample)
            moved = health.target_step(old, new)
            # Most update the target after the optimizer's step, some before the next one.
            tau = health.tau_measured(old, new, [_sampled(mine, self.sample), read])
            for name, value in (("target_step", moved), ("tau_measured", tau)):
                found[name] = value if self._entire else torch.where(moved > 0, value, math.nan)
        self.forget()
        return found

    def spectra(self) -> dict[str, float]:
        """`effective_rank`, `effective_rank_share`, `rankme`, `alpha_req` of the embeddings in the ring,
        `projection_rank`, `projection_rank_share` of the projections; empty below two rows."""
        found: dict[str, float] = {}
        for name, rows in (("effective", self.embeddings.rows), ("projection", self.projections.rows)):
            if len(rows) < 2:
                continue
            spectrum = health.eigenvalues(rows)
            rank = health.rank_of(spectrum.sqrt())
            found |= {f"{name}_rank": rank, f"{name}_rank_share": rank / min(rows.shape)}
            if name == "effective":
                found |= {"rankme": health.rankme(rows), "alpha_req": health.alpha_of(spectrum)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The rings, so that a resumed run measures the same."""
        return {"embeddings": self.embeddings.state_dict(), "projections": self.projections.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; rings of another size begin empty."""
        for name, ring in (("embeddings", self.embeddings), ("projections", self.projections)):
            if name in state:
                ring.load_state_dict(state[name])


LARGEST = 2**23
"""Numbers that a ring holds at most, 32 MiB: of 65,536 dimensions that is 128 rows."""


class Ring:
    """The newest rows of a stream of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.store = torch.empty(0)
        self.seen = 0

    @property
    def rows(self) -> Tensor:
        """float32 `[n, d]`, in no particular order: the newest `size`, or as many as fit into LARGEST numbers."""
        return self.store[: min(self.seen, len(self.store))]

    def add(self, rows: Tensor) -> None:
        """Take in rows `[B, d]`; of more than it holds, the first ones."""
        if self.store.shape[1:] != rows.shape[1:]:
            room = max(1, min(self.size, LARGEST // rows.shape[1]))
            self.store, self.seen = torch.zeros(room, rows.shape[1], device=rows.device), 0
        self.store = self.store.to(rows.device)  # a restored one comes from a file
        room = len(self.store)
        rows = rows.detach()[:room].float()
        start = self.seen % room
        head = min(len(rows), room - start)
        self.store[start : start + head] = rows[:head]
        if head < len(rows):
            self.store[: len(rows) - head] = rows[head:]
        self.seen += len(rows)

    def state_dict(self) -> dict[str, Any]:
        """Its rows and their number."""
        return {"size": self.size, "rows": self.store, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; one of another size is left alone."""
        if state["size"] == self.size:
            self.store, self.seen = state["rows"], state["seen"]


def gradient_norms(parts: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, Tensor]:
    """`grad_norm` of all parameters and `grad_norm_PART` of each part, before clipping; 0-dim tensors on the device.

    Call it between the backward pass and clipping. Parameters without a gradient are left out, and so are parts of
    which none has one.
    """
    owners, gradients = [], []
    for part, parameters in parts.items():
        for parameter in parameters:
            if parameter.grad is not None:
                owners.append(part)
                gradients.append(parameter.grad)
    return joined_norms(owners, torch._foreach_norm(gradients) if gradients else [])


def joined_norms(owners: Sequence[str], norms: Sequence[Tensor]) -> dict[str, Tensor]:
    """`gradient_norms` from the norm of each parameter's gradient and the part that the parameter belongs to."""
    found: dict[str, list[Tensor]] = {}
    for part, norm in zip(owners, norms, strict=True):
        found.setdefault(f"grad_norm_{part}", []).append(norm)
    both = {"grad_norm": list(norms)} | found if norms else found
    return {name: torch.linalg.vector_norm(torch.stack(several)) for name, several in both.items()}


def shared_parameters(online: nn.Module | None, target: nn.Module | None) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that both networks have, by name and shape, in the order of the target's."""
    if online is None or target is None:
        return [], []
    mine = dict(online.named_parameters())
    pairs = [(mine[n].detach(), p.detach()) for n, p in target.named_parameters() if n in mine]
    pairs = [(o, t) for o, t in pairs if o.shape == t.shape and t.numel()]
    return [o for o, _ in pairs], [t for _, t in pairs]


def _sampled(tensors: Sequence[Tensor], limit: int) -> Tensor:
    """Copies of the first elements of every tensor, float `[n]`, n at most `limit`; the larger ones give more.

    Each is scaled as if it stood for its share of its tensor, so that norms are estimates of the whole's.
    """
    total = sum(t.numel() for t in tensors)
    floor = limit // (2 * len(tensors))  # half of the sample is shared out evenly: biases count too
    pieces = [_head(t, min(t.numel(), floor + t.numel() * limit // (2 * total))) for t in tensors]
    scaled = [p.reshape(-1) * math.sqrt(t.numel() / max(1, p.numel())) for p, t in zip(pieces, tensors, strict=True)]
    return torch.cat(scaled)


def _head(tensor: Tensor, wanted: int) -> Tensor:
    """A view of at most `wanted` of the tensor's first elements, whatever its memory layout."""
    while tensor.ndim > 1 and wanted < tensor[0].numel():
        tensor = tensor[0]
    if tensor.ndim == 0:
        return tensor.reshape(1)[:wanted]
    return tensor[: wanted // max(1, tensor[0].numel())]


def _there(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _first(chosen: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [a if a is not None else b for a, b in zip(chosen, other, strict=True)]


def _pair(
    online: Sequence[Tensor | None], chosen: Sequence[Tensor | None], other: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """One view's `online`, and what another view has of `chosen`, or else of `other`."""
    for first, a in enumerate(online):
        for second, b in enumerate(_first(chosen, other)):
            if first != second and a is not None and b is not None and a.shape == b.shape:
                return a, b
    return None


def _same_size(views: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The first two views of one size."""
    for number, a in enumerate(views):
        for b in views[number + 1 :]:
            if a.shape == b.shape:
                return a, b
    return None
