"""Target updaters: the moving average and its buffers, stop-gradient, none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sslkit.api import RunInfo
from sslkit_ema import EMA, NoTarget, StopGradient

RUN = RunInfo(0, "cpu", 16, 3, (0.5,) * 3, (0.25,) * 3, 1000, 1000, 10, 100)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))


def walk(module: nn.Module, seed: int) -> None:
    """Move every parameter, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)


def test_make_copies_without_gradients_and_in_training_mode():
    online = network()
    online(torch.randn(8, 6)).sum().backward()
    online.eval()
    updater = EMA().build(RUN)
    target = updater.make(online)
    assert (updater.source, updater.evaluated) == ("copy", "online")
    assert all(m.training for m in target.modules())
    for (name, p), (same, q) in zip(online.named_parameters(), target.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
        assert p.requires_grad
        assert p.grad is not None
        assert not q.requires_grad
        assert q.grad is None


@pytest.mark.parametrize("as_tensor", [False, True])
def test_update_is_the_formula(as_tensor: bool):
    online = network().double()
    updater = EMA().build(RUN)
    target = updater.make(online)
    expected = [p.detach().clone() for p in target.parameters()]
    for step, tau in enumerate([0.99, 0.5, 0.3, 0.0, 0.996]):
        walk(online, step)
        updater.update(online, target, torch.tensor(tau, dtype=torch.float64) if as_tensor else tau)
        expected = [tau * t + (1 - tau) * o.detach() for t, o in zip(expected, online.parameters(), strict=True)]
        for ours, theirs in zip(target.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.filterwarnings("ignore")
def test_against_lightly():
    pytest.importorskip("lightly")
    from lightly.models.utils import update_momentum

    online = network()
    updater = EMA().build(RUN)
    ours, theirs = updater.make(online), updater.make(online)
    for step in range(5):
        walk(online, step)
        updater.update(online, ours, 0.99)
        with torch.no_grad():
            update_momentum(online, theirs, 0.99)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tau", [0.99, torch.tensor(0.99), 1.0, torch.tensor(1.0)])
def test_equal_stays_equal_and_tau_one_freezes_to_the_last_bit(tau: Any):
    online = network()
    updater = EMA().build(RUN)
    target = updater.make(online)
    if float(tau) == 1:
        walk(online, 0)
    before = [p.clone() for p in target.parameters()]
    for _ in range(10):
        updater.update(online, target, tau)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


def test_tau_zero_copies_exactly():
    online = network()
    updater = EMA().build(RUN)
    target = updater.make(online)
    walk(online, 0)
    updater.update(online, target, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("tau", [0.5, torch.tensor(0.5)])
def test_frozen_parameters_move_too_and_dtypes_stay(tau: Any):
    online = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16))
    online[0].requires_grad_(False)
    updater = EMA().build(RUN)
    target = updater.make(online)
    walk(online, 0)
    before = [p.clone() for p in target.parameters()]
    updater.update(online, target, tau)
    assert all(not torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    assert [p.dtype for p in target.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert all(not p.requires_grad and p.grad is None for p in target.parameters())


@pytest.mark.parametrize("buffers", ["own", "copy"])
def test_batchnorm_buffers(buffers: Any):
    online = network()
    updater = EMA(batch_norm_buffers=buffers).build(RUN)
    target = updater.make(online)
    online(torch.randn(32, 6) + 5)
    with torch.no_grad():
        target(torch.randn(32, 6) - 5)
    before = {name: b.clone() for name, b in target.named_buffers()}
    updater.update(online, target, 0.99)
    expected = before if buffers == "own" else dict(online.named_buffers())
    for name, buffer in target.named_buffers():
        assert torch.equal(buffer, expected[name])
    assert not torch.equal(before["1.running_mean"], online.get_buffer("1.running_mean"))


def test_the_host_never_reads_tau():
    with torch.device("meta"):  # where reading a number raises
        online, tau = network(), torch.empty(())
        updater = EMA(batch_norm_buffers="copy").build(RUN)
        target = updater.make(online)
        updater.update(online, target, tau)
        with pytest.raises(RuntimeError):
            float(tau)


def test_a_network_without_parameters():
    updater = EMA(batch_norm_buffers="copy").build(RUN)
    target = updater.make(nn.Identity())
    updater.update(nn.Identity(), target, 0.99)


def test_tau_is_a_number_or_a_schedule():
    assert EMA().build(RUN).tau(500) == 0.99
    spec = EMA.model_validate_json('{"tau": {"use": "cosine", "start": 0.99, "end": 1.0}, "evaluate": "target"}')
    updater = spec.build(RUN)
    assert updater.tau(0) == 0.99
    assert updater.tau(500) == pytest.approx(0.995)
    assert updater.tau(RUN.total_steps) == 1.0
    assert updater.evaluated == "target"


@pytest.mark.parametrize(("spec", "source"), [(StopGradient(), "online"), (NoTarget(), "none")])
def test_updaters_without_a_second_network(spec: Any, source: str):
    updater = spec.build(RUN)
    assert (updater.source, updater.evaluated) == (source, "online")
    assert updater.make(network()) is None
    assert updater.tau(0) is None
    assert updater.state_dict() == {}
