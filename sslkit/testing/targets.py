"""Checks of target updaters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sslkit import randomness
from sslkit.testing.bench import Bench, changed, state_of
from sslkit.testing.core import check
from sslkit.testing.outcome import NotApplicable, require

TAU = 0.75


def online_network(seed: int = 0) -> nn.Module:
    """A small network with a norm layer, some buffers and a parameter that is not trained."""
    with randomness.seeded(seed, "online"):
        network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    network[3].bias.requires_grad_(False)
    return network


def _second(bench: Bench) -> tuple[Any, nn.Module, nn.Module]:
    """The updater, an online network and its target, which is a second network."""
    updater: Any = bench.module()
    if getattr(updater, "source", None) != "copy":
        raise NotApplicable("the updater makes no second network")
    online = online_network()
    target = updater.make(online)
    if not isinstance(target, nn.Module):
        raise NotApplicable("needs the network that make() returns; see the check target_branch")
    return updater, online, target


def _trained(online: nn.Module) -> None:
    """Move the online network as an optimizer would, and its buffers as a forward pass does."""
    drawn = randomness.generator(1, "trained")
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn))
        online(torch.randn(8, 6, generator=drawn))


@check("make() gives a second network that starts as the online one and takes no gradient, or None", "target_updater")
def target_branch(bench: Bench) -> None:
    """As `source` and `evaluated` say."""
    updater: Any = bench.module()
    source, evaluated = getattr(updater, "source", None), getattr(updater, "evaluated", None)
    require(
        source in ("copy", "online", "none"),
        f"source is {source!r}; set it to 'copy' (a second network), 'online' "
        "(the online projections under stop-gradient) or 'none' (no target)",
    )
    require(
        evaluated in ("online", "target"),
        f"evaluated is {evaluated!r}; set it to 'online' or 'target', the branch "
        "whose features are measured and exported",
    )
    online = online_network()
    before = state_of(online)
    trainable = [p.requires_grad for p in online.parameters()]
    target = updater.make(online)
    differs = changed(before, state_of(online))
    require(
        differs is None and trainable == [p.requires_grad for p in online.parameters()],
        "make() changes the online network; work on copy.deepcopy(online)",
    )
    held = {tensor.data_ptr() for tensor in (*updater.parameters(), *updater.buffers()) if tensor.numel()}
    everything = [*online.named_parameters(), *online.named_buffers()]
    shared = [name for name, tensor in everything if tensor.data_ptr() in held]
    require(
        not shared,
        f"the updater holds the online network's {''.join(shared[:1])!r} as its own after make(): it would be moved to "
        "the device and saved a second time. Keep no reference to `online`; update() is given it",
    )
    if source != "copy":
        require(
            target is None, f"source is {source!r}, but make() returns a network; return None, or set source = 'copy'"
        )
        return
    require(
        isinstance(target, nn.Module),
        "source is 'copy', but make() returns no network; return copy.deepcopy(online).requires_grad_(False)",
    )
    learning = [name for name, p in target.named_parameters() if p.requires_grad]
    require(
        not learning,
        f"the target's parameter {''.join(learning[:1])!r} takes gradients; add .requires_grad_(False) in make()",
    )
    own = {p.data_ptr() for p in online.parameters()}
    require(
        not any(p.data_ptr() in own for p in target.parameters()),
        "the target shares its parameters with the "
        "online network, so it would be the same network; use copy.deepcopy(online)",
    )
    differs = changed(
        {n: p.detach() for n, p in online.named_parameters()}, {n: p.detach() for n, p in target.named_parameters()}
    )
    require(
        differs is None,
        f"the target does not start as the online network: {differs!r} differs; return a deep copy of it",
    )


@check("tau(step) is a number from 0 to 1 at every step where there is a second network, else None", "target_updater")
def tau(bench: Bench) -> None:
    """Above 1 the target runs away from the online network."""
    updater: Any = bench.module()
    copies = getattr(updater, "source", None) == "copy"
    steps = range(bench.run.total_steps + 1)
    values = [updater.tau(step) for step in steps]
    if not copies:
        require(
            all(v is None for v in values), f"tau(0) is {values[0]!r} although there is no second network; return None"
        )
        return
    for step, value in zip(steps, values, strict=True):
        require(
            isinstance(value, int | float) and 0 <= value <= 1,
            f"tau({step}) is {value!r} in a run of {bench.run.total_steps} steps; return a float from 0 (the target "
            "becomes a copy) to 1 (it stays as it is)",
        )
    require(
        [updater.tau(step) for step in reversed(steps)] == values[::-1],
        "tau(step) gives another number when it is asked again or in another order; compute it from step alone",
    )


@check(
    "update() moves every parameter of the target towards the online network, which it leaves alone", "target_updater"
)
def update(bench: Bench) -> None:
    """By tau, given as a number or as a 0-dim tensor."""
    updater, online, target = _second(bench)
    _trained(online)
    before, old = state_of(online), state_of(target)
    updater.update(online, target, TAU)
    differs = changed(before, state_of(online))
    require(differs is None, f"update() changes the online network ({differs!r}); only write to the target")
    now, goal = state_of(target), dict(online.named_parameters())
    for name, parameter in target.named_parameters():
        wanted = goal[name].detach()
        far, near = (wanted - old[name]).norm(), (wanted - now[name]).norm()
        require(
            bool(near < far),
            f"update() with tau = {TAU} does not bring the target's {name!r} nearer to the online one: the distance "
            f"was {float(far):.4g} and is {float(near):.4g}. Each parameter, trained or not, becomes "
            "tau * target + (1 - tau) * online",
        )
        require(
            parameter.grad is None and not parameter.requires_grad and parameter.grad_fn is None,
            f"update() leaves a gradient on the target's {name!r}; decorate it with @torch.no_grad()",
        )
    again, online, target = _second(bench)
    _trained(online)
    again.update(online, target, torch.tensor(TAU, dtype=torch.float64))
    for name, tensor in state_of(target).items():
        require(
            torch.allclose(tensor, now[name], rtol=1e-4, atol=1e-6),
            f"update() moves {name!r} elsewhere if tau is a 0-dim tensor than if it is a number; use tau in "
            "arithmetic only (the engine gives a tensor on a GPU, where reading it would make the host wait)",
        )


@check("update() with tau = 1 changes no parameter: so the engine leaves a step out", "target_updater")
def update_masked(bench: Bench) -> None:
    """A step whose loss was not finite must not reach the target."""
    updater, online, target = _second(bench)
    _trained(online)
    old = {name: p.detach().clone() for name, p in target.named_parameters()}
    updater.update(online, target, torch.ones((), dtype=torch.float64))
    differs = changed(old, {name: p.detach() for name, p in target.named_parameters()})
    require(
        differs is None,
        f"update() with tau = 1 changes the target's {differs!r}; move it by (1 - tau) times the "
        "difference, with the tau that is given",
    )
