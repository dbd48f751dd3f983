"""Faults of losses."""

from __future__ import annotations

from typing import Any

import torch

from sslkit.api import LossTerms, Needs
from sslkit.errors import UserError
from wrong_plugins import Case
from wrong_plugins.right import RightLoss
from wrong_plugins.right_parts import Distance


class _Wrong(RightLoss):
    """A loss whose module is the class `Module` inside."""

    def build(self, dim: int, run: Any) -> Any:
        return type(self).Module(dim, self.momentum)  # type: ignore[attr-defined]


class NoNeeds(_Wrong):
    class Module(Distance):
        def needs(self, specs):
            return (0, 1)


class TakesNothing(_Wrong):
    class Module(Distance):
        def needs(self, specs):
            raise UserError("never enough views")


class TakesAnything(_Wrong):
    class Module(Distance):
        def needs(self, specs):
            return Needs(projections=tuple(range(len(specs[:2]))))


class FarViews(_Wrong):
    class Module(Distance):
        def needs(self, specs):
            return Needs(projections=(1, 2))


class WantsNothing(_Wrong):
    class Module(Distance):
        def needs(self, specs):
            super().needs(specs)
            return Needs(targets=(0,))


class BareTensor(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            return super().forward(branches).total


class PerImage(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            return LossTerms((branches.projections[0] - branches.projections[1]).square().mean(1))


class HoldsGraph(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            total = super().forward(branches).total
            return LossTerms(total, {"again": total})


class FloatTerm(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            total = super().forward(branches).total
            return LossTerms(total, {"apart": float(total.detach())})


class NotFinite(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            return LossTerms(super().forward(branches).total / 0)


class Unfelt(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            a, b = branches.projections
            return LossTerms((a - b.detach()).square().mean())


class UnusedPrototypes(_Wrong):
    class Module(Distance):
        def __init__(self, dim, momentum):
            super().__init__(dim, momentum)
            self.prototypes = torch.nn.Parameter(torch.ones(dim))


class MovesInForward(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            self.commit(branches.detached())
            return super().forward(branches)


class Counts(_Wrong):
    class Module(Distance):
        calls = 0

        def forward(self, branches):
            self.calls += 1
            terms = super().forward(branches)
            return LossTerms(terms.total * self.calls)


class Normalises(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            branches.projections[0].data.mul_(2)
            return super().forward(branches)


class Sums(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            return LossTerms((branches.projections[0] - branches.projections[1]).square().sum())


class AdditiveText(_Wrong):
    class Module(Distance):
        additive = "yes"


class Undecided(_Wrong):
    class Module(Distance):
        prevents_collapse = None


class CommitsParameter(_Wrong):
    class Module(Distance):
        def __init__(self, dim, momentum):
            super().__init__(dim, momentum)
            del self.centre
            self.centre = torch.nn.Parameter(torch.zeros(dim))


class CommitsBranches(_Wrong):
    class Module(Distance):
        def commit(self, branches):
            branches.projections[0].zero_()


class Forgets(_Wrong):
    class Module(Distance):
        def __init__(self, dim, momentum):
            super().__init__(dim, momentum)
            del self.centre
            self.centre = torch.zeros(dim)


class OnlyTwo(_Wrong):
    class Module(Distance):
        def needs(self, specs):
            super().needs(specs)
            return Needs(projections=tuple(range(len(specs))))

        def forward(self, branches):
            a, b = branches.projections
            return LossTerms((a - b).square().mean())


class CountsOnFour(_Wrong):
    class Module(Distance):
        def needs(self, specs):
            super().needs(specs)
            return Needs(projections=(0, 1) if len(specs) == 2 else (0, specs.index(specs[3])))


class SameLabel(_Wrong):
    class Module(Distance):
        additive = False

        def forward(self, branches):
            a, b = branches.projections[:2]
            same = (branches.labels[:, None] == branches.labels).float()
            return LossTerms((same * torch.cdist(a, b)).mean())


class Half(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            a, b = branches.projections[:2]
            return LossTerms((a.half() - b.half()).square().mean())


class LogOfDistance(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            a, b = branches.projections[:2]
            return LossTerms((a - b).square().mean().log())


class RootOfDistance(_Wrong):
    class Module(Distance):
        def forward(self, branches):
            a, b = branches.projections[:2]
            return LossTerms((a - b).square().sum(1).sqrt().mean())


CASES = [
    Case(NoNeeds(), "needs", r"returns tuple; return sslkit.api.Needs\(projections="),
    Case(TakesNothing(), "needs", "refuses every set of views it was offered .*: never enough views"),
    Case(TakesAnything(), "needs", "takes no views at all; raise sslkit.errors.UserError"),
    Case(FarViews(), "needs", r"projections = \(1, 2\) for 2 views; give a tuple of view numbers from 0 to 1"),
    Case(WantsNothing(), "needs", "nothing to train; name views"),
    Case(BareTensor(), "loss_terms", r"returns Tensor; return sslkit.api.LossTerms\("),
    Case(PerImage(), "loss_terms", r"a tensor of shape \[16\]; reduce it to a scalar: .mean\(\)"),
    Case(HoldsGraph(), "loss_terms", r"the term 'again' holds the graph; give value.detach\(\)"),
    Case(FloatTerm(), "loss_terms", "the term 'apart' is a float; make it a 0-dim tensor"),
    Case(NotFinite(), "loss_terms", "the total holds NaN or infinity; guard divisions"),
    Case(OnlyTwo(), "loss_terms", r"with 2 \+ 2 local views forward raised ValueError.*or let needs\(\) refuse them"),
    Case(CountsOnFour(), "needs", r"needs\(\) raised IndexError.* for 3 views; take them as they come, or let"),
    Case(Half(), "loss_terms", "total is torch.float16 for branches in float32; compute it in float32"),
    Case(SameLabel(), "unlabelled", r"where labels are None forward raised TypeError.*in build\(\) unless run"),
    Case(LogOfDistance(), "finite_when_equal", "with equal views the total holds NaN or infinity"),
    Case(RootOfDistance(), "finite_when_equal", r"with equal views the gradient of projections\[0\] holds NaN"),
    Case(Unfelt(), "loss_gradients", r"asks for view 1 .* gives it no gradient; use it without detach\(\), or leave"),
    Case(UnusedPrototypes(), "loss_gradients", "own parameter 'prototypes'; use it in forward, or make it a buffer"),
    Case(MovesInForward(), "pure", r"forward changes 'centre'; move queues, centres and counters in commit"),
    Case(Counts(), "pure", "another loss the second time; draw from torch's default generator"),
    Case(Normalises(), "pure", "forward changes the branches that it is given; do not work on them in place"),
    Case(Sums(), "additive", "additive = True, but .*; set additive = False if .* or take means"),
    Case(AdditiveText(), "additive", "additive is 'yes'; write `additive = True`"),
    Case(Undecided(), "prevents_collapse", "prevents_collapse is None; write `prevents_collapse = True`"),
    Case(CommitsParameter(), "commit", "changes the parameter 'centre'.*make what commit moves a buffer"),
    Case(CommitsBranches(), "commit", "changes the branches it is given"),
    Case(Forgets(), "loss_state", r"keep everything that commit\(\) moves in buffers \(register_buffer"),
]
