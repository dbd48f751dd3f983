"""SwAV: codes by Sinkhorn-Knopp, and their prediction from other views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.errors import UserError
from sslkit.nn import Queue, ScheduledNumber, chosen, global_views, pairs, unit

if TYPE_CHECKING:
    from sslkit_clustering import SwAV


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float | Tensor, iterations: int) -> Tensor:
    """Codes `[B, K]` of B images over K prototypes, from their scores `[B, K]` (SwAV, equations 3 to 5).

    exp(scores / epsilon) is divided in turn by the sums of its columns and of its rows: each prototype comes to
    B / K in all, the nearer the more iterations, and each row sums to 1. Done on logarithms, where nothing overflows
    and no row vanishes, however small epsilon is; factors that all entries share, as in the paper, would cancel.
    """
    logs = scores / epsilon
    for _ in range(iterations):
        logs = logs.log_softmax(0).log_softmax(1)
    return logs.exp()


class SwAVLoss(nn.Module):
    """Branches -> the mean cross-entropy between codes of global views and predictions from other views.

    State: `prototypes [K, dim]`, which are parameters, and a queue of projections for each global view.

    Raises:
        UserError: a temperature that is not positive, or a queue that the run would never use.
    """

    additive = False
    prevents_collapse = True

    def __init__(self, options: SwAV, dim: int, run: RunInfo) -> None:
        super().__init__()
        self.temperature = ScheduledNumber(options.temperature, run, "loss.temperature", above=0)
        self.epsilon = ScheduledNumber(options.epsilon, run, "loss.epsilon", above=0)
        self.iterations = options.iterations
        self.frozen_steps = round(options.freeze_prototypes_epochs * run.steps_per_epoch)
        if self.frozen_steps >= run.total_steps:
            raise UserError(
                "loss.freeze_prototypes_epochs: the prototypes would stay as they were drawn for all "
                f"{run.total_steps} steps; set fewer epochs"
            )
        self.prototypes = nn.Parameter(unit(torch.randn(options.prototypes, dim)))
        queued = global_views(run.views) if options.queue else ()
        self.queues = nn.ModuleList(Queue(options.queue, dim) for _ in queued)
        full = math.ceil(options.queue / run.batch_size)
        self.queue_start = max(full, round(options.queue_start_epochs * run.steps_per_epoch))
        if options.queue and self.queue_start >= run.total_steps:
            remedy = "a smaller loss.queue" if full >= run.total_steps else "a lower loss.queue_start_epochs"
            raise UserError(
                f"loss.queue: would never be used: it is full after {full} steps and used from step {self.queue_start} "
                f"on, and the run has {run.total_steps}; set {remedy}, or loss.queue = 0"
            )
        self.uses_queue = False

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections of every view.

        Raises:
            UserError: no view has a partner whose code it could predict.
        """
        pairs(specs, "swav")  # refuses views of which none has a partner
        return Needs(projections=tuple(range(len(specs))))

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, the entropy of the codes, their divergence from the predictions, and the prototypes in use.

        Raises:
            UserError: a view has no projection.
        """
        projections = chosen(branches.projections, self.needs(branches.specs).projections, _MISSING)
        scores = [self._scores(unit(projection)) for projection in projections]
        logs = [(score / self.temperature()).log_softmax(-1) for score in scores]
        coded = global_views(branches.specs)
        codes = [self._codes(scores[view].detach(), number) for number, view in enumerate(coded)]
        entropies = [
            -(code * logs[view]).sum(-1).mean()
            for code, own in zip(codes, coded, strict=True)
            for view in range(len(logs))
            if view != own
        ]
        total = torch.stack(entropies).mean()
        with torch.no_grad():
            code_entropy = torch.stack([torch.special.entr(code).sum(-1).mean() for code in codes]).mean()
            nearest = torch.cat([scores[view].argmax(-1) for view in coded])
            used = torch.zeros_like(scores[0][0]).index_fill_(0, nearest, 1).sum()
        return LossTerms(
            total, {"code_entropy": code_entropy, "kl": total.detach() - code_entropy, "prototypes_used": used}
        )

    def _scores(self, vectors: Tensor) -> Tensor:
        return vectors @ self.prototypes.to(vectors.dtype).T

    @torch.no_grad()
    def _codes(self, scores: Tensor, number: int) -> Tensor:
        """Codes of one global view, the `number`th; the queue's images only take part in sharing the prototypes."""
        images = len(scores)
        if self.uses_queue:
            rows = cast(Queue, self.queues[number]).rows
            scores = torch.cat([scores, self._scores(rows.to(scores.dtype))])
        return sinkhorn(scores, self.epsilon(), self.iterations)[:images]

    def commit(self, branches: Branches) -> None:
        """Add the projections of every global view to its queue."""
        if self.queues:
            projections = chosen(branches.projections, global_views(branches.specs), _MISSING)
            for queue, projection in zip(self.queues, projections, strict=True):
                cast(Queue, queue).push(unit(projection))

    def before_step(self, step: int) -> None:
        """Use the queue from its start on, when it is full: a push of one batch has followed every step so far."""
        self.uses_queue = len(self.queues) > 0 and step >= self.queue_start

    def after_backward(self, step: int) -> None:
        """Leave the prototypes as they are for the first steps."""
        if step < self.frozen_steps:
            self.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Bring the prototypes back to length 1 where they were moved."""
        if step >= self.frozen_steps:
            self.prototypes.copy_(unit(self.prototypes))


_MISSING = "loss 'swav' has no projection"
