"""Checks of optimizers and of schedules."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import randomness
from sslkit.testing.bench import Bench, changed
from sslkit.testing.core import NotApplicable, check, require

STEPS = 50
RATE = 0.05


def _problem() -> tuple[list[nn.Parameter], Tensor]:
    """A matrix and a vector, and the point that a quadratic bowl has its bottom at."""
    drawn = randomness.generator(0, "quadratic")
    return (
        [nn.Parameter(torch.randn(4, 3, generator=drawn)), nn.Parameter(torch.randn(3, generator=drawn))],
        torch.randn(4, 3, generator=drawn),
    )


def _distance(parameters: list[nn.Parameter], bottom: Tensor) -> Tensor:
    return (parameters[0] + parameters[1] - bottom).square().sum()


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], bottom: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    _distance(parameters, bottom).backward()
    optimizer.step()


def _set(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float = 0.0) -> None:
    """As the engine does before each step."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, weight_decay


def _values(parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    return {f"parameter {n}": p.detach().clone() for n, p in enumerate(parameters)}


@check("the groups are those that were given, in their order, with `part` and `excluded`", "optimizer")
def groups_kept(bench: Bench) -> None:
    """The engine sets the rates of each by its position."""
    parameters, _ = _problem()
    groups = bench.optimizer(parameters).param_groups
    fits = len(groups) == 2 and all(
        len(group["params"]) == 1
        and group["params"][0] is parameter
        and group.get("part") == "backbone"
        and group.get("excluded") is excluded
        for group, parameter, excluded in zip(groups, parameters, (False, True), strict=True)
    )
    require(
        fits,
        "the optimizer's param_groups are not the groups that build() was given; pass them on unchanged: "
        "[group.as_torch() for group in groups]",
    )


@check(f"{STEPS} steps bring a quadratic down", "optimizer")
def descends(bench: Bench) -> None:
    """At a small rate."""
    parameters, bottom = _problem()
    optimizer = bench.optimizer(parameters)
    start = float(_distance(parameters, bottom).detach())
    for _ in range(STEPS):
        _set(optimizer, RATE)
        _step(optimizer, parameters, bottom)
    end = float(_distance(parameters, bottom).detach())
    require(
        end < start,
        f"{STEPS} steps at lr {RATE} take a quadratic from {start:.4g} to {end:.4g}; look at the sign "
        "of the step: parameters move against their gradient",
    )


@check("lr and weight_decay are read from the groups at every step", "optimizer")
def rates_read(bench: Bench) -> None:
    """They come from schedules; a value kept from the start would never change."""
    parameters, bottom = _problem()
    optimizer = bench.optimizer(parameters)
    for lr in (RATE, 0.0, RATE):
        before = _values(parameters)
        _set(optimizer, lr, weight_decay=0.1)
        _step(optimizer, parameters, bottom)
        differs = changed(before, _values(parameters))
        if lr == 0:
            require(
                differs is None,
                "a step at lr 0 moves the parameters; read group['lr'] inside step(), and scale "
                "the whole step by it, momentum and weight decay included",
            )
        else:
            require(differs is not None, f"a step at lr {lr} moves nothing; read group['lr'] inside step()")
    parameters, _ = _problem()
    moved = []
    for decay in (0.0, 0.1):
        fresh, _ = _problem()
        optimizer = bench.optimizer(fresh)
        _set(optimizer, RATE, decay)
        for parameter in fresh:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append(fresh[0].detach())
    require(not torch.equal(*moved), "weight_decay changes nothing; read group['weight_decay'] inside step()")


@check("state saved and loaded into a fresh optimizer gives the same next step", "optimizer")
def optimizer_state(bench: Bench) -> None:
    """Momentum and counters belong to it."""
    parameters, bottom = _problem()
    optimizer = bench.optimizer(parameters)
    for _ in range(3):
        _set(optimizer, RATE, 1e-3)
        _step(optimizer, parameters, bottom)
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    fresh = bench.optimizer(copies)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for both in ((optimizer, parameters), (fresh, copies)):
        _set(both[0], RATE, 1e-3)
        _step(*both, bottom)
    require(
        changed(_values(parameters), _values(copies)) is None,
        "after its state was saved and loaded the optimizer takes another step; keep momentum and counters in "
        "self.state[parameter], which state_dict() saves",
    )


@check("an optimizer that says it can be masked changes nothing where found_inf is 1", "optimizer")
def optimizer_masked(bench: Bench) -> None:
    """So the engine leaves out a step that is not finite, without waiting for the device."""
    parameters, bottom = _problem()
    optimizer: Any = bench.optimizer(parameters)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise NotApplicable("the optimizer does not set _step_supports_amp_scaling")
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    _set(optimizer, RATE)
    _step(optimizer, parameters, bottom)
    before = _values(parameters)
    optimizer.found_inf = torch.ones(())
    _step(optimizer, parameters, bottom)
    require(
        changed(before, _values(parameters)) is None,
        "the optimizer sets _step_supports_amp_scaling, but takes a step where self.found_inf is 1; leave parameters "
        "and state as they are then, or do not set it",
    )


# ---------------------------------------------------------------- schedules


@check("value(step) is a finite float for every step from 0 to the end of the run", "schedule")
def schedule_values(bench: Bench) -> None:
    """Both ends included."""
    value = bench.built()
    for step in range(bench.run.total_steps + 1):
        found = value(step)
        require(
            isinstance(found, float) and math.isfinite(found),
            f"value({step}) is {found!r} in a run of {bench.run.total_steps} steps; return a finite Python float "
            "(steps go from 0 to run.total_steps, both included)",
        )


@check("value(step) depends on the step alone", "schedule")
def schedule_pure(bench: Bench) -> None:
    """Whatever was asked before: a run that goes on asks in the middle first."""
    value, steps = bench.built(), range(bench.run.total_steps + 1)
    forwards = [value(step) for step in steps]
    backwards = [value(step) for step in reversed(steps)]
    fresh = bench.built()
    middle = bench.run.total_steps // 2
    require(
        forwards == backwards[::-1] and fresh(middle) == forwards[middle],
        "value(step) gives another number when steps are asked again or in another order; compute it from step and "
        "the run's facts alone, without counting calls and without randomness",
    )
