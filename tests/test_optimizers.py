"""Optimizers: against torch's plain loops, against LARS's formula and other people's, and masked by found_inf."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sslkit.api import ParamGroup, RunInfo
from sslkit_optimizers import LARS, SGD, Adam, AdamW
from sslkit_optimizers.lars import LARSOptimizer, trust_ratios

RUN = RunInfo(0, "cpu", 16, 3, (0.5,) * 3, (0.25,) * 3, 1000, 1000, 10, 100)
SPECS: list[Any] = [
    SGD(lr=0.1),
    SGD(lr=0.1, nesterov=True),
    SGD(lr=0.1, momentum=0.0),
    Adam(lr=0.1),
    AdamW(lr=0.1),
    LARS(lr=0.1, eta=0.02, clip_lr=True),
    LARS(lr=0.1, momentum=0.0),
]
every_optimizer = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{type(spec).__name__}-{spec.momentum}"
    if hasattr(spec, "momentum") else type(spec).__name__)  # fmt: skip


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 3, 3), (7, 5), (7,), (5,)]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def groups(parameters: list[nn.Parameter]) -> list[ParamGroup]:
    return [
        ParamGroup("backbone", False, [p for p in parameters if p.ndim > 1]),
        ParamGroup("backbone", True, [p for p in parameters if p.ndim <= 1]),
    ]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def set_rates(optimizer: torch.optim.Optimizer, step: int, weight_decay: float = 0.01) -> None:
    """As the engine does before each step."""
    for group in optimizer.param_groups:
        group["lr"] = 0.05 * (step + 1)
        group["weight_decay"] = 0.0 if group.get("excluded", False) else weight_decay


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        set_rates(optimizer, step)
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]


@pytest.mark.parametrize(
    ("spec", "theirs"),
    [
        (SGD(lr=0.1), lambda g: torch.optim.SGD(g, lr=0.0, momentum=0.9)),
        (SGD(lr=0.1, nesterov=True), lambda g: torch.optim.SGD(g, lr=0.0, momentum=0.9, nesterov=True)),
        (SGD(lr=0.1, momentum=0.0), lambda g: torch.optim.SGD(g, lr=0.0)),
        (Adam(lr=0.1, betas=(0.8, 0.95)), lambda g: torch.optim.Adam(g, lr=0.0, betas=(0.8, 0.95), foreach=False)),
        (AdamW(lr=0.1, eps=1e-6), lambda g: torch.optim.AdamW(g, lr=0.0, eps=1e-6, foreach=False)),
    ],
    ids=["sgd", "nesterov", "no momentum", "adam", "adamw"],
)
def test_against_torchs_plain_loop(spec: Any, theirs: Any):
    ours, reference = weights(), weights()
    optimizer = spec.build(groups(ours), RUN)
    loop = theirs([g.as_torch() for g in groups(reference)])
    train(optimizer, ours, range(6))
    train(loop, reference, range(6))
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- LARS


def lars_by_formula(
    w: Tensor, v: Tensor, g: Tensor, lr: float, decay: float, eta: float, *, clip: bool, adapt: bool
) -> tuple[Tensor, Tensor]:
    """One step as the class's documentation writes it."""
    r = 1.0
    if adapt:
        r = float(eta * w.norm() / (g.norm() + decay * w.norm() + 1e-8))
        r = min(r / lr, 1.0) if clip else r
    v = 0.9 * v + r * (g + decay * w)
    return w - lr * v, v


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.001, 0.02, 0.5])
def test_lars_is_its_formula(clip: bool, eta: float):
    parameters = weights(torch.float64)
    optimizer = LARS(lr=0.1, eta=eta, clip_lr=clip).build(groups(parameters), RUN)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in parameters]
    for step in range(6):
        train(optimizer, parameters, range(step, step + 1))
        for i, p in enumerate(parameters):
            assert p.grad is not None
            adapt = p.ndim > 1
            decay = 0.01 if adapt else 0.0
            expected[i] = lars_by_formula(*expected[i], p.grad, 0.05 * (step + 1), decay, eta, clip=clip, adapt=adapt)
            torch.testing.assert_close(p.detach(), expected[i][0], rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore")
def test_lars_against_lightly():
    pytest.importorskip("lightly")
    from lightly.utils.lars import LARS as Lightly  # noqa: N811

    ours, theirs = weights(torch.float64), weights(torch.float64)
    for parameters in (ours, theirs):
        parameters.append(nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)))  # leaves zero by its plain gradient
    optimizer = LARS(lr=0.1, eta=0.02).build(groups(ours), RUN)
    reference = Lightly([g.as_torch() for g in groups(theirs)], lr=0.1, momentum=0.9, trust_coefficient=0.02)
    train(optimizer, ours, range(6))
    train(reference, theirs, range(6))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_lars_is_nearly_byols_where_decay_is_small():
    parameters = weights(torch.float64)[:2]
    give_gradients(parameters, 0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    ours = trust_ratios(
        list(parameters), gradients, {"eta": 1e-3, "weight_decay": 1.5e-6, "eps": 1e-8, "clip_lr": False}
    )
    for ratio, p, g in zip(ours, parameters, gradients, strict=True):
        byol = 1e-3 * p.norm() / (g + 1.5e-6 * p).norm()
        torch.testing.assert_close(ratio.detach(), byol.detach(), rtol=1e-5, atol=0)


def test_lars_excluded_groups_are_plain_sgd():
    ours, theirs = weights()[2:], weights()[2:]
    optimizer = LARS(lr=0.1).build(groups(ours), RUN)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for step in range(4):
        for parameters, o in ((ours, optimizer), (theirs, reference)):
            give_gradients(parameters, step)
            set_rates(o, step, weight_decay=0.0)
            o.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_lars_without_exclusion_adapts_biases():
    parameters = weights(torch.float64)
    optimizer = LARS(lr=0.1).build([ParamGroup("backbone", False, parameters)], RUN)
    before = [p.detach().clone() for p in parameters]
    give_gradients(parameters, 0)
    set_rates(optimizer, 0)
    optimizer.step()
    for old, new in zip(before, parameters, strict=True):  # lr 0.05: each step is eta * lr of the weights' length
        length = float((new.detach() - old).norm() / old.norm())
        assert length == pytest.approx(0.05 * 0.001, rel=0.02)


def test_lars_edges_stay_finite():
    zero = nn.Parameter(torch.zeros(3, 3))
    still = nn.Parameter(torch.ones(3, 3))
    empty = nn.Parameter(torch.zeros(0, 3))
    absent = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS(lr=0.1, clip_lr=True).build([ParamGroup("loss", False, [zero, still, empty, absent])], RUN)
    zero.grad, still.grad, empty.grad = torch.ones(3, 3), torch.zeros(3, 3), torch.zeros(0, 3)
    set_rates(optimizer, 0, weight_decay=0.1)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((3, 3), -0.05))
    assert torch.equal(still, torch.ones(3, 3))
    assert torch.equal(absent, torch.ones(2, 2))
    assert absent not in optimizer.state


def test_lars_at_rate_zero_moves_nothing():
    parameters = weights()
    before = [p.detach().clone() for p in parameters]
    optimizer = LARS(lr=0.1, clip_lr=True).build(groups(parameters), RUN)
    give_gradients(parameters, 0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(value.isfinite().all() for value in state_of(optimizer))


def test_lars_leaves_gradients_as_they_are():
    parameters = weights()
    optimizer = LARS(lr=0.1).build(groups(parameters), RUN)
    give_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    set_rates(optimizer, 0)
    optimizer.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, parameters, strict=True) if p.grad is not None)


def test_lars_unscales_by_grad_scale():
    ours, theirs = weights(), weights()
    a, b = (LARS(lr=0.1).build(groups(p), RUN) for p in (ours, theirs))
    a.grad_scale, a.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    for p in ours:
        assert p.grad is not None
        p.grad.mul_(1024)
    for optimizer in (a, b):
        set_rates(optimizer, 0)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_lars_ratios_are_never_read_by_the_host():
    with torch.device("meta"):  # where reading a number raises
        tensors = [torch.empty(3, 3), torch.empty(5)]
        group = {"eta": 1e-3, "weight_decay": 0.1, "lr": 0.1, "eps": 1e-8, "clip_lr": True}
        assert all(ratio.shape == () for ratio in trust_ratios(tensors, tensors, group))


def test_lars_closure():
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = LARSOptimizer([{"params": [parameter]}], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert (parameter < 1).all()


# ---------------------------------------------------------------- all of them


@every_optimizer
def test_groups_keep_their_part(spec: Any):
    optimizer = spec.build(groups(weights()), RUN)
    assert [(g["part"], g["excluded"]) for g in optimizer.param_groups] == [("backbone", False), ("backbone", True)]
    assert all("lr" in g and "weight_decay" in g for g in optimizer.param_groups)


@every_optimizer
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_found_inf_changes_nothing_to_the_last_bit(spec: Any, steps_before: int, bad: float):
    parameters = weights()
    optimizer = spec.build(groups(parameters), RUN)
    assert optimizer._step_supports_amp_scaling
    train(optimizer, parameters, range(steps_before))
    twins = copy.deepcopy(parameters)
    twin = spec.build(groups(twins), RUN)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, state = [p.detach().clone() for p in parameters], state_of(optimizer)

    garbage = torch.full((10_000,), 7.0)  # so that memory left unfilled would show
    del garbage
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    for p in parameters:
        p.grad = torch.full_like(p, bad)
    set_rates(optimizer, steps_before)
    optimizer.step()
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, parameters, strict=True))
    if steps_before:
        assert all(torch.equal(a, b) for a, b in zip(state, state_of(optimizer), strict=True))

    # and what follows is what would have followed without that step
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, parameters, range(steps_before, steps_before + 3))
    train(twin, twins, range(steps_before, steps_before + 3))
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


@every_optimizer
def test_state_survives_saving_to_the_last_bit(spec: Any):
    parameters = weights()
    optimizer = spec.build(groups(parameters), RUN)
    train(optimizer, parameters, range(3))
    restored = copy.deepcopy(parameters)
    second = spec.build(groups(restored), RUN)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [g["excluded"] for g in second.param_groups] == [False, True]
    train(optimizer, parameters, range(3, 6))
    train(second, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, restored, strict=True))


@every_optimizer
def test_groups_and_parameters_without_gradients(spec: Any):
    parameters = weights()
    before = [p.detach().clone() for p in parameters]
    optimizer = spec.build([*groups(parameters), ParamGroup("loss", False, [])], RUN)
    set_rates(optimizer, 0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    give_gradients(parameters[:1], 0)
    optimizer.step()
    assert not torch.equal(before[0], parameters[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], parameters[1:], strict=True))


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (SGD, {"momentum": 1.0}),
        (SGD, {"momentum": 0.0, "nesterov": True}),
        (Adam, {"betas": (0.9, 1.0)}),
        (AdamW, {"eps": 0.0}),
        (LARS, {"eta": 0.0}),
        (LARS, {"momentum": -0.1}),
    ],
)
def test_wrong_options_are_refused(spec: Any, options: dict[str, Any]):
    with pytest.raises(ValidationError):
        spec(lr=0.1, **options)
