"""Signs of collapse and drift while training, at no cost worth naming."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from sslkit import health
from sslkit.batch import Branches
from sslkit.events import Run, observes


class HealthObserver:
    """Keeps a ring of the newest training features, and looks at the branches of the step that is recorded."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ring = torch.empty(0)
        self.filled = 0
        self.branches: Branches | None = None

    @observes
    def step_ended(self, run: Run, branches: Branches) -> None:
        self.branches = branches
        embedding = next((e for e in branches.embeddings if e is not None), None)
        if embedding is None:
            return
        if self.ring.shape[1:] != embedding.shape[1:]:
            self.ring = torch.zeros(self.size, embedding.shape[1], device=embedding.device)
        self.ring = self.ring.to(embedding.device)  # a restored one comes from a file
        start = self.filled % self.size
        rows = embedding[: self.size].float()
        head = min(len(rows), self.size - start)
        self.ring[start : start + head] = rows[:head]
        self.ring[: len(rows) - head] = rows[head:]
        self.filled += len(rows)

    @observes
    def logging(self, run: Run, record: MutableMapping[str, float | Tensor]) -> None:
        if self.branches is None:
            return
        projections = [p for p in self.branches.projections if p is not None]
        if projections:
            record["std_sqrt_d"] = health.std_sqrt_d(projections[0])
        if "cosine" not in record and (pair := _pair(self.branches)):
            record["cosine"] = health.cosine_between(*pair)
        if run.model.target is not None:
            record["target_drift"], record["target_norm_ratio"] = health.target_drift(
                run.model.online, run.model.target
            )

    @observes
    def epoch_ended(self, run: Run) -> None:
        rows = self.ring[: min(self.filled, self.size)]
        if len(rows) >= 2:
            rank = health.effective_rank(rows)
            run.record({"effective_rank": rank, "effective_rank_share": rank / min(rows.shape)})

    def state_dict(self) -> dict[str, Any]:
        """The ring, so that a resumed run measures the same rank."""
        return {"ring": self.ring, "filled": self.filled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; a ring of another size begins empty."""
        if len(state["ring"]) == self.size:
            self.ring, self.filled = state["ring"], state["filled"]


def _pair(branches: Branches) -> tuple[Tensor, Tensor] | None:
    """One view's prediction (or projection) and another view's target (or projection)."""
    online = [p if p is not None else q for p, q in zip(branches.predictions, branches.projections, strict=True)]
    other = [t if t is not None else q for t, q in zip(branches.targets, branches.projections, strict=True)]
    for first, a in enumerate(online):
        for second, b in enumerate(other):
            if first != second and a is not None and b is not None and a.shape == b.shape:
                return a, b
    return None
