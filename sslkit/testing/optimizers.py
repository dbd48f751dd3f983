"""Checks of optimizers and of schedules."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import randomness
from sslkit.errors import UserError
from sslkit.testing.bench import Bench, changed
from sslkit.testing.core import check
from sslkit.testing.outcome import Nonconforming, NotApplicable, described, require

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
    """They come from schedules; a value kept from the start would never change.

    Of two optimizers that took the same step, the next ones at another rate have to go elsewhere. Nothing is asked of
    a rate of 0: weights that follow others slowly, as in Lookahead, move at that as well.
    """
    usual, faster, decayed = (
        _after_steps(bench, lr, decay) for lr, decay in ((RATE, 0.0), (2 * RATE, 0.0), (RATE, 0.1))
    )
    require(
        not torch.equal(usual, faster),
        f"after a step at lr {RATE}, two at {2 * RATE} go where two at {RATE} go; read group['lr'] inside step()",
    )
    require(not torch.equal(usual, decayed), "weight_decay changes nothing; read group['weight_decay'] inside step()")


def _after_steps(bench: Bench, lr: float, weight_decay: float) -> Tensor:
    """The matrix after a step at `RATE` without decay, and two at these rates."""
    parameters, bottom = _problem()
    optimizer = bench.optimizer(parameters)
    for rates in ((RATE, 0.0), (lr, weight_decay), (lr, weight_decay)):
        _set(optimizer, *rates)
        _step(optimizer, parameters, bottom)
    return parameters[0].detach()


@check("a parameter without a gradient stays as it is", "optimizer")
def gradient_missing(bench: Bench) -> None:
    """Such as a layer that is frozen for some epochs."""
    parameters, bottom = _problem()
    optimizer = bench.optimizer(parameters)
    for with_gradient in (False, True, False):
        _set(optimizer, RATE, weight_decay=0.1)
        optimizer.zero_grad(set_to_none=True)
        _distance(parameters, bottom).backward()
        if not with_gradient:
            parameters[0].grad = None
        before = parameters[0].detach().clone()
        optimizer.step()
        require(
            with_gradient or torch.equal(before, parameters[0].detach()),
            "step() moves a parameter whose grad is None; leave it out, weight decay and momentum included: "
            "if p.grad is None: continue",
        )


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
    """Both ends included, in this run and in shorter ones, unless build() refuses these with a UserError."""
    component: Any = bench.component
    whole = bench.run.total_steps
    for total in sorted({1, 2, *range(3, 61, 3), whole}, key=lambda n: n != whole):
        run = replace(bench.run, total_steps=total, steps_per_epoch=min(total, bench.run.steps_per_epoch))
        if total == whole:
            value = bench.built()
        else:
            try:
                value = component.build(run)
            except UserError:
                continue
            except Exception as error:  # whatever a stranger's code raises
                raise Nonconforming(
                    f"build() raised {described(error)} in a run of {total} steps; if there are too few, raise "
                    "sslkit.errors.UserError"
                ) from error
        _finite_everywhere(value, total)


def _finite_everywhere(value: Any, total: int) -> None:
    for step in range(total + 1):
        try:
            found = value(step)
        except Exception as error:  # whatever a stranger's code raises
            raise Nonconforming(
                f"value({step}) raised {described(error)} in a run of {total} steps (from 0 to run.total_steps, both "
                "included); if these are too few, raise sslkit.errors.UserError in build()"
            ) from error
        require(
            isinstance(found, float) and math.isfinite(found),
            f"value({step}) is {found!r} in a run of {total} steps; return a finite Python float "
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
