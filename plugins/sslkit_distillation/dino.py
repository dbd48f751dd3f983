"""DINO: cross-entropy between a centred, sharpened teacher and a student that sees other views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sslkit.api import RunInfo
from sslkit.batch import Branches, LossTerms, Needs, ViewSpec
from sslkit.nn import ScheduledNumber, chosen, pairs, sides
from sslkit_distillation.distil import distil, log_distribution

if TYPE_CHECKING:
    from sslkit_distillation import DINO


class DINOLoss(nn.Module):
    """Branches -> the mean cross-entropy over pairs of different views.

    State: `centre [1, dim]`, the moving average of the teacher's outputs.

    Raises:
        UserError: a temperature that is not positive, or a centre's momentum outside 0 to 1.
    """

    additive = True
    prevents_collapse = False  # centring alone does not: it takes a slow teacher too
    centre: Tensor

    def __init__(self, options: DINO, dim: int, run: RunInfo) -> None:
        super().__init__()
        self.student_temperature = ScheduledNumber(
            options.student_temperature, run, "loss.student_temperature", above=0
        )
        self.teacher_temperature = ScheduledNumber(
            options.teacher_temperature, run, "loss.teacher_temperature", above=0
        )
        self.centre_momentum = ScheduledNumber(options.centre_momentum, run, "loss.centre_momentum", least=0, below=1)
        self.register_buffer("centre", torch.zeros(1, dim))

    def needs(self, specs: Sequence[ViewSpec]) -> Needs:
        """Projections of every view that has a partner, targets of every global view.

        Raises:
            UserError: no view has a partner.
        """
        projections, targets = sides(pairs(specs, "dino"))
        return Needs(projections=projections, targets=targets)

    def forward(self, branches: Branches) -> LossTerms:
        """The loss, the teacher's entropy, and the student's divergence from the teacher.

        Raises:
            UserError: a view has no projection or no target projection.
        """
        needs = self.needs(branches.specs)
        outputs = chosen(branches.projections, needs.projections, "loss 'dino' has no projection")
        targets = [target.detach() - self.centre for target in self._targets(branches)]
        sharp, soft = self.teacher_temperature(), self.student_temperature()
        students = [log_distribution(output, soft) for output in outputs]
        teachers = [log_distribution(target, sharp) for target in targets]
        return distil(
            dict(zip(needs.projections, students, strict=True)),
            dict(zip(needs.targets, teachers, strict=True)),
            pairs(branches.specs, "dino"),
        )

    def commit(self, branches: Branches) -> None:
        """Move the centre towards the teacher's mean output in this step."""
        mean = torch.stack([target.detach().mean(0, keepdim=True) for target in self._targets(branches)]).mean(0)
        momentum = self.centre_momentum()
        self.centre.mul_(momentum).add_(mean * (1 - momentum))

    def _targets(self, branches: Branches) -> list[Tensor]:
        return chosen(branches.targets, self.needs(branches.specs).targets, "loss 'dino' has no target projection")
