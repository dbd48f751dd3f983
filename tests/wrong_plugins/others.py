"""Faults of target updaters, data sources, optimizers, schedules and observers."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import torch

from sslkit.events import observes
from wrong_plugins import Case
from wrong_plugins.right import RightObserver, RightOptimizer, RightSchedule, RightSource, RightTarget
from wrong_plugins.right_parts import Average, Counter, Descent, Noise, Opened

# ---------------------------------------------------------------- target updaters


class _Target(RightTarget):
    def build(self, run: Any) -> Any:
        return type(self).Module(self.keep)  # type: ignore[attr-defined]


class Learning(_Target):
    class Module(Average):
        def make(self, online):
            return super().make(online).requires_grad_(True)


class Same(_Target):
    class Module(Average):
        def make(self, online):
            return online


class Shares(_Target):
    class Module(Average):
        def make(self, online):
            made = super().make(online)
            made[0].weight.data = online[0].weight.data
            return made


class Fresh(_Target):
    class Module(Average):
        def make(self, online):
            made = super().make(online)
            made[0].weight.data.add_(1)
            return made


class Elsewhere(_Target):
    class Module(Average):
        source = "mirror"


class Percent(_Target):
    class Module(Average):
        def tau(self, step):
            return 99.6


class CountsTau(_Target):
    class Module(Average):
        calls = 0

        def tau(self, step):
            self.calls += 1
            return 1 / (1 + self.calls)


class Backwards(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            for p, q in zip(target.parameters(), online.parameters(), strict=True):
                p.sub_((q - p) * (1 - tau))


class SkipsFrozen(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            for p, q in zip(target.parameters(), online.parameters(), strict=True):
                if q.requires_grad:
                    p.add_((q - p) * (1 - tau))


class MovesOnline(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            super().update(target, online, tau)


class OwnTau(_Target):
    class Module(Average):
        def update(self, online, target, tau):
            super().update(online, target, 0.75)


class ByProcess(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            super().update(online, target, tau)
            for p in target.parameters():
                p.mul_(1 + (os.getpid() % 1000) * 1e-5)


# ---------------------------------------------------------------- data sources


def source(change: Any) -> type[RightSource]:
    class Source(RightSource):
        """Opened, and then changed for the worse."""

        def build(self, info: Any) -> Any:
            opened = Opened(self.number)
            change(opened)
            return opened

    return Source


def floats(opened: Any) -> None:
    opened.train = SimpleNamespace(read=lambda i: torch.rand(len(i), 3, 8, 8), labels=None, tensor=None)
    opened.train = _Floats(opened)


class _Floats(Noise):
    def __init__(self, opened: Any) -> None:
        super().__init__(torch.zeros(12, 3, 8, 8))


class _Unordered(Noise):
    def read(self, indices: Any) -> Any:
        return self.tensor[indices.sort().values]


class _Other(Noise):
    def __init__(self, tensor: Any) -> None:
        super().__init__(tensor)
        self.all = tensor
        self.tensor = 255 - tensor

    def read(self, indices: Any) -> Any:
        return self.all[indices]


def unordered(opened: Any) -> None:
    opened.train = _Unordered(opened.train.tensor)


def other(opened: Any) -> None:
    opened.train = _Other(opened.train.tensor)


def float_labels(opened: Any) -> None:
    opened.train.labels = opened.train.labels.float()


def many_labels(opened: Any) -> None:
    opened.train.labels = opened.train.labels + 5


def clock(opened: Any) -> None:
    opened.fingerprint = str(time.perf_counter_ns())


def bare_names(opened: Any) -> None:
    opened.bad = ["broken.png"]


def number_left_out(opened: Any) -> None:
    opened.bad = 3


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


class Unmasked(_Optimizer):
    class Module(Descent):
        def step(self, closure=None):
            self.found_inf = torch.zeros(())
            super().step()


# ---------------------------------------------------------------- schedules


class Divides(RightSchedule):
    def build(self, run):
        return lambda step: float("inf") if step == run.total_steps else 1 / (run.total_steps - step)


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


class LosesState(_Observer):
    class Module(Counter):
        def load_state_dict(self, state):
            self.seen = 0


class SavesObjects(_Observer):
    class Module(Counter):
        def state_dict(self):
            return {"me": self}


CASES = [
    Case(Learning(), "target_branch", r"parameter '0.weight' takes gradients; add .requires_grad_\(False\)"),
    Case(Same(), "target_branch", r"(takes gradients|changes the online network|shares)"),
    Case(Shares(), "target_branch", r"shares its parameters with the online network.*use copy.deepcopy"),
    Case(Fresh(), "target_branch", "does not start as the online network: '0.weight' differs; return a deep copy"),
    Case(Elsewhere(), "target_branch", "source is 'mirror'; set it to 'copy'"),
    Case(Percent(), "tau", r"tau\(0\) is 99.6 .*; return a float from 0"),
    Case(CountsTau(), "tau", "compute it from step alone"),
    Case(Backwards(), "update", r"nearer to the online one.*becomes tau \* target \+ \(1 - tau\) \* online"),
    Case(SkipsFrozen(), "update", "'3.bias' nearer to the online one.*trained or not"),
    Case(MovesOnline(), "update", "changes the online network .*; only write to the target"),
    Case(OwnTau(), "update_masked", r"with tau = 1 changes the target's .*with the tau that is given"),
    Case(ByProcess(), "two_processes", "have different weights .*nothing that moves parameters may depend on the"),
    Case(source(floats)(), "images", r"torch.float32.*; it should be a uint8 tensor \[n, C, H, W\]"),
    Case(source(unordered)(), "images", "not the images in the order of indices; index each image"),
    Case(source(other)(), "images", r"train.tensor is .* not the images that read\(\) gives; make it uint8"),
    Case(source(float_labels)(), "labels", r"make it an int64 tensor \[12\]"),
    Case(source(many_labels)(), "labels", "holds 6, and class_names has 2 names; give one for each class"),
    Case(source(clock)(), "fingerprint", "another one when the source is opened again.*leave out times of day"),
    Case(source(bare_names)(), "bad_images", "give it the keys 'path' and 'problem'"),
    Case(source(number_left_out)(), "bad_images", "bad is int; make it a list"),
    Case(OneGroup(lr=0.1), "groups_kept", r"pass them on unchanged: \[group.as_torch\(\) for group in groups\]"),
    Case(Ascends(lr=0.1), "descends", "look at the sign of the step"),
    Case(KeepsRate(lr=0.1), "rates_read", r"at lr 0 moves the parameters; read group\['lr'\] inside step"),
    Case(NoDecay(lr=0.1), "rates_read", r"weight_decay changes nothing; read group\['weight_decay'\]"),
    Case(WarmsUp(lr=0.1), "optimizer_state", "takes another step; keep momentum and counters in self.state"),
    Case(WarmsUp(lr=0.1), "resume", r"stopped at step 1 and resumed, .* differs at step 3; keep all state in"),
    Case(Unmasked(lr=0.1), "optimizer_masked", "takes a step where self.found_inf is 1; leave parameters"),
    Case(Divides(), "schedule_values", r"value\(300\) is inf .*; return a finite Python float"),
    Case(Whole(), "schedule_values", r"value\(0\) is 1 .*; return a finite Python float"),
    Case(Accumulates(), "schedule_pure", "compute it from step and the run's facts alone"),
    Case(Misspelt(), "hooks", "step_end.*events are run_started, step_ended"),
    Case(Undecorated(), "hooks", r"observes nothing; decorate step_ended\(\) with @observes"),
    Case(Meddles(), "looks_only", r"differs after 3 steps; it may read the run, not change it"),
    Case(LeavesEvalMode(), "looks_only", r"leave modes \(train, eval\)"),
    Case(Fails(), "looks_only", "a run of one epoch ends with: observer .* failed in epoch_ended: KeyError"),
    Case(SavesOnly(), "observer_state", r"has one of state_dict\(\) and load_state_dict\(\) without the other"),
    Case(LosesState(), "observer_state", r"another 'seen'; restore all that state_dict\(\) gives"),
    Case(SavesObjects(), "resume", "its state cannot be saved: .*let state_dict.* hold tensors, numbers and text"),
]
