"""Faults of optimizers, schedules and observers."""

from __future__ import annotations

from typing import Any

import torch

from sslkit.events import observes
from wrong_plugins import Case
from wrong_plugins.right import RightObserver, RightOptimizer, RightSchedule
from wrong_plugins.right_parts import Counter, Descent

# ---------------------------------------------------------------- optimizers


class _Optimizer(RightOptimizer):
    def build(self, groups: Any, run: Any) -> Any:
        return type(self).Module([g.as_torch() for g in groups], self.momentum)  # type: ignore[attr-defined]


class OneGroup(_Optimizer):
    class Module(Descent):
        def __init__(self, groups, momentum):
            super().__init__([{"params": [p for g in groups for p in g["params"]]}], momentum)


class Ascends(_Optimizer):
    class Module(Descent):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = -group["lr"]
            super().step()


class KeepsRate(_Optimizer):
    class Module(Descent):
        first = None

        def step(self, closure=None):
            self.first = self.first or self.param_groups[0]["lr"]
            for group in self.param_groups:
                group["lr"] = self.first
            super().step()


class NoDecay(_Optimizer):
    class Module(Descent):
        def step(self, closure=None):
            for group in self.param_groups:
                group["weight_decay"] = 0.0
            super().step()


class WarmsUp(_Optimizer):
    class Module(Descent):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            for group in self.param_groups:
                group["lr"] *= min(1.0, self.steps / 10)
            super().step()


class NoCheck(_Optimizer):
    class Module(Descent):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))


class DecaysAll(_Optimizer):
    class Module(Descent):
        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])


class OnTheHost(_Optimizer):
    class Module(Descent):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    velocity = self.state[p].setdefault("velocity", torch.zeros(p.shape))
                    p.sub_(group["lr"] * velocity.mul_(self.momentum).add_(p.grad))


class AsksForNorms(_Optimizer):
    class Module(Descent):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.div_(max(1.0, p.grad.norm().item()))
            super().step()


class Unmasked(_Optimizer):
    class Module(Descent):
        def step(self, closure=None):
            self.found_inf = torch.zeros(())
            super().step()


# ---------------------------------------------------------------- schedules


class Divides(RightSchedule):
    def build(self, run):
        return lambda step: float("inf") if step == run.total_steps else 1 / (run.total_steps - step)


class TenEpochs(RightSchedule):
    def build(self, run):
        warm, total = 10 * run.steps_per_epoch, run.total_steps
        return lambda step: step / warm if step < warm else 1 - (step - warm) / (total - warm)


class NeedsTwoSteps(RightSchedule):
    def build(self, run):
        slope = 1 / (run.total_steps - 1)
        return lambda step: 1 - slope * step


class Whole(RightSchedule):
    def build(self, run):
        return lambda step: 1


class Accumulates(RightSchedule):
    def build(self, run):
        now = [1.0]

        def value(step):
            now[0] *= 0.99
            return now[0]

        return value


# ---------------------------------------------------------------- observers


class _Observer(RightObserver):
    def build(self, run: Any) -> Any:
        return type(self).Module()  # type: ignore[attr-defined]


class Misspelt(_Observer):
    class Module:
        @observes
        def step_end(self, run):
            pass


class Undecorated(_Observer):
    class Module:
        def step_ended(self, run):
            pass


class Idle(_Observer):
    class Module:
        def look(self, run):
            pass


class Meddles(_Observer):
    class Module:
        @observes
        def step_ended(self, run):
            with torch.no_grad():
                for p in run.model.online.parameters():
                    p.mul_(0.999)


class LeavesEvalMode(_Observer):
    class Module:
        @observes
        def step_ended(self, run):
            run.model.online.eval()


class Fails(_Observer):
    class Module:
        @observes
        def epoch_ended(self, run):
            raise KeyError("knn_top1")


class SavesOnly(_Observer):
    class Module(Counter):
        load_state_dict = property()


class StartsAnew(_Observer):
    class Module:
        records = 0

        @observes
        def logging(self, record):
            self.records += 1
            record["records_so_far"] = self.records


class LosesState(_Observer):
    class Module(Counter):
        def load_state_dict(self, state):
            self.seen = 0


class SavesObjects(_Observer):
    class Module(Counter):
        def state_dict(self):
            return {"me": self}


CASES = [
    Case(OneGroup(lr=0.1), "groups_kept", r"pass them on unchanged: \[group.as_torch\(\) for group in groups\]"),
    Case(Ascends(lr=0.1), "descends", "look at the sign of the step"),
    Case(KeepsRate(lr=0.1), "rates_read", r"two at 0.1 go where two at 0.05 go; read group\['lr'\] inside"),
    Case(NoDecay(lr=0.1), "rates_read", r"weight_decay changes nothing; read group\['weight_decay'\]"),
    Case(NoCheck(lr=0.1), "gradient_missing", "TypeError.*a parameter without a gradient stays as it is"),
    Case(DecaysAll(lr=0.1), "gradient_missing", "moves a parameter whose grad is None; leave it out, weight decay"),
    Case(OnTheHost(lr=0.1), "any_device", r"two devices would meet.*training.py:\d+, in step"),
    Case(AsksForNorms(lr=0.1), "never_waits", r"training.py:\d+, in step.*Leave out .item\(\)"),
    Case(WarmsUp(lr=0.1), "optimizer_state", "takes another step; keep momentum and counters in self.state"),
    Case(WarmsUp(lr=0.1), "resume", r"stopped at step 1 and resumed, .* differs at step 3; keep all state in"),
    Case(Unmasked(lr=0.1), "optimizer_masked", "takes a step where self.found_inf is 1; leave parameters"),
    Case(Divides(), "schedule_values", r"value\(300\) is inf .*; return a finite Python float"),
    Case(Whole(), "schedule_values", r"value\(0\) is 1 .*; return a finite Python float"),
    Case(TenEpochs(), "schedule_values", r"value\(30\) raised ZeroDivisionError.* in a run of 30 steps .*UserError in"),
    Case(NeedsTwoSteps(), "schedule_values", r"build\(\) raised ZeroDivisionError.* in a run of 1 steps; if there are"),
    Case(Accumulates(), "schedule_pure", "compute it from step and the run's facts alone"),
    Case(Misspelt(), "hooks", "step_end.*events are run_started, step_ended"),
    Case(Undecorated(), "hooks", "method 'step_ended' is not marked; put @sslkit.events.observes above it"),
    Case(Idle(), "hooks", r"observes nothing; write a method of the name of an event \(run_started,"),
    Case(Meddles(), "looks_only", r"differs after 3 steps; it may read the run, not change it"),
    Case(LeavesEvalMode(), "looks_only", r"leave modes \(train, eval\)"),
    Case(Fails(), "looks_only", "a run of one epoch ends with: observer .* failed in epoch_ended: KeyError"),
    Case(SavesOnly(), "observer_state", r"has one of state_dict\(\) and load_state_dict\(\) without the other"),
    Case(LosesState(), "observer_state", r"another 'seen'; restore all that state_dict\(\) gives"),
    Case(StartsAnew(), "resume", r"'records_so_far' is recorded as 1 at step 2 instead of 2; give the observer"),
    Case(SavesObjects(), "resume", "its state cannot be saved: .*let state_dict.* hold tensors, numbers and text"),
]
