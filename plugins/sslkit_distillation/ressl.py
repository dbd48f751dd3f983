"""ReSSL: a student keeps the relations between images that a teacher sees in weaker views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.errors import UserError
from sslkit.nn import Queue, ScheduledNumber, chosen, unit
from sslkit_distillation.distil import distil, log_distribution

if TYPE_CHECKING:
    from sslkit_distillation import ReSSL

WEAK = 0
"""The teacher's view."""


class ReSSLLoss(nn.Module):
    """Branches -> the mean cross-entropy between relations of the weak view and of the strong views to a queue.

    State: the queue of target projections of weak views.

    Raises:
        UserError: a temperature that is not positive.
    """

    additive = True
    prevents_collapse = True

    def __init__(self, options: ReSSL, dim: int, run: RunInfo) -> None:
        super().__init__()
        self.student_temperature = ScheduledNumber(
            options.student_temperature, run, "loss.student_temperature", above=0
        )
        self.teacher_temperature = ScheduledNumber(
            options.teacher_temperature, run, "loss.teacher_temperature", above=0
        )
        self.queue = Queue(options.queue, dim)

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections of the strong views, the target of the weak view.

        Raises:
            UserError: there is no strong view, or the weak view is local.
        """
        if len(specs) < 2 or specs[WEAK].kind != "global":
            kinds = ", ".join(spec.kind for spec in specs) or "none"
            raise UserError(
                "loss 'ressl' wants a global view, which is the weak one, and then one or more strong views; the view "
                f"generator makes: {kinds}; choose a view_generator such as 'two_crops'"
            )
        return Needs(projections=tuple(range(1, len(specs))), targets=(WEAK,))

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, the teacher's entropy, and the student's divergence from the teacher.

        Raises:
            UserError: a strong view has no projection, or the weak view no target projection.
        """
        strong = self.needs(branches.specs).projections
        outputs = chosen(branches.projections, strong, "loss 'ressl' has no projection")
        teacher = log_distribution(self._relations(self._target(branches)), self.teacher_temperature())
        students = [log_distribution(self._relations(z), self.student_temperature()) for z in outputs]
        return distil(dict(zip(strong, students, strict=True)), {WEAK: teacher}, [(view, WEAK) for view in strong])

    def commit(self, branches: Branches) -> None:
        """Add the weak view's target projections to the queue."""
        self.queue.push(unit(self._target(branches)))

    def _relations(self, vectors: Tensor) -> Tensor:
        """Cosines `[B, queue]` with the images in the queue."""
        vectors = unit(vectors)
        return vectors @ self.queue.rows.to(vectors.dtype).T

    def _target(self, branches: Branches) -> Tensor:
        (target,) = chosen(branches.targets, [WEAK], "loss 'ressl' has no target projection")
        return target.detach()
