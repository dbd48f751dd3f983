"""The panel on plain tensors and modules, as a loop that is not sslkit's would use it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from sslkit import health, panel
from sslkit.batch import Branches, ViewSpec
from sslkit.panel import Panel, Ring, gradient_norms, shared_parameters
from sslkit.panel import _sampled as sampled


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def branches(
    projections: list[Tensor | None],
    *,
    predictions: list[Tensor | None] | None = None,
    targets: list[Tensor | None] | None = None,
    views: list[Tensor] | None = None,
) -> Branches:
    nothing: list[Tensor | None] = [None] * len(projections)
    specs = tuple(ViewSpec(8) for _ in projections)
    return Branches(
        specs, list(projections), projections, predictions or nothing, targets or nothing, views=views or []
    )


# ---------------------------------------------------------------- the rings


@pytest.mark.parametrize("batches", [[10], [64, 64], [50, 50, 50], [200], [64, 1]])
def test_a_ring_holds_the_newest_rows(batches: list[int]) -> None:
    ring, kept = Ring(64), torch.empty(0, 3)
    for number, size in enumerate(batches):
        new = rows(size, 3, number)
        ring.add(new)
        kept = torch.cat([kept, new[:64]])[-64:]
    assert {tuple(r) for r in ring.rows.tolist()} == {tuple(r) for r in kept.tolist()}


def test_a_ring_survives_a_resume_and_one_of_another_size_begins_empty() -> None:
    first = Ring(16)
    first.add(rows(10, 3))
    again, other = Ring(16), Ring(32)
    again.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    for ring in (first, again):
        ring.add(rows(10, 3, 1))
    assert torch.equal(first.rows, again.rows)
    assert other.seen == 0
    other.add(rows(40, 5))
    assert other.rows.shape == (32, 5)


def test_rows_of_another_width_begin_anew() -> None:
    ring = Ring(16)
    ring.add(rows(10, 3))
    ring.add(rows(4, 5))
    assert torch.equal(ring.rows, rows(4, 5))


def test_spectra_are_of_the_first_view_that_there_is() -> None:
    panel, z = Panel(ring=64), rows(60, 4)
    assert panel.spectra() == {}
    panel.step(Branches((ViewSpec(8),) * 2, [None, z], [None, z[:, :3]], [None] * 2, [None] * 2))
    found = panel.spectra()
    assert found["effective_rank"] == pytest.approx(health.effective_rank(z))
    assert found["effective_rank_share"] == pytest.approx(health.effective_rank(z) / 4)
    assert found["rankme"] == pytest.approx(health.rankme(z))
    assert found["projection_rank"] == pytest.approx(health.effective_rank(z[:, :3]))
    assert found["projection_rank_share"] == pytest.approx(health.effective_rank(z[:, :3]) / 3)
    assert math.isnan(found["alpha_req"]), "four dimensions have no tail"
    again = Panel(ring=64)
    again.load_state_dict(panel.state_dict())
    assert {k: v for k, v in again.spectra().items() if v == v} == {k: v for k, v in found.items() if v == v}
    again.load_state_dict({"filled": 3})  # of a version that had another state


# ---------------------------------------------------------------- the branches


def test_scalars_are_of_two_views() -> None:
    a, b, p, t = (rows(20, 6, seed) for seed in range(4))
    one, two = rows(20, 48).reshape(20, 3, 4, 4), rows(20, 48, 1).reshape(20, 3, 4, 4)
    found = Panel().scalars(branches([a, b], predictions=[p, None], targets=[None, t], views=[one, two]))
    assert found["alignment"] == health.alignment(a, b)
    assert found["uniformity"] == health.uniformity(a)
    assert found["std_sqrt_d"] == health.std_sqrt_d(a)
    assert found["cosine"] == health.cosine_between(p, t)
    assert found["view_difference_max"] == (one - two).abs().max()
    assert set(found) == {"alignment", "uniformity", "std_sqrt_d", "cosine", "view_difference", "view_difference_max"}
    assert all(value.ndim == 0 for value in found.values())


def test_a_view_that_only_the_target_saw_is_aligned_with_it() -> None:
    query, key = rows(20, 6), rows(20, 6, 1)
    found = Panel().scalars(branches([query, None], targets=[None, key]))
    assert found["alignment"] == health.alignment(query, key)
    assert "view_difference" not in found
    assert set(Panel().scalars(branches([query]))) == {"std_sqrt_d", "uniformity"}
    assert Panel().scalars(branches([None])) == {}


def test_views_are_compared_with_the_next_of_their_size() -> None:
    large, small = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 4, 4)
    found = Panel().scalars(branches([None] * 3, views=[large, small, large + 2]))
    assert float(found["view_difference"]) == 2
    assert "view_difference" not in Panel().scalars(branches([None] * 2, views=[large, small]))


def test_nothing_that_the_panel_keeps_or_gives_has_a_gradient() -> None:
    panel, z = Panel(ring=16), rows(10, 4).requires_grad_()
    panel.step(branches([z, z]))
    found = panel.scalars(branches([z, z]))
    assert not any(value.requires_grad for value in (*found.values(), panel.embeddings.rows))


# ---------------------------------------------------------------- the target


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Flatten(), nn.Linear(40, 30))
    target = copy.deepcopy(online)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return online, target


def ema(online: nn.Module, target: nn.Module, tau: float) -> None:
    with torch.no_grad():
        for o, t in zip(online.parameters(), target.parameters(), strict=True):
            t.mul_(tau).add_(o, alpha=1 - tau)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("tau", [0.99, 1.0019, 0.5])
def test_the_panel_sees_the_tau_that_was_applied(tau: float, layout: torch.memory_format) -> None:
    online, target = (m.to(memory_format=layout) for m in networks())
    panel, empty = Panel(sample=200), branches([None])
    panel.before_update(online, target)
    with torch.no_grad():
        online[3].weight.add_(0.01)  # the optimizer's step
    before = torch.cat([p.detach().flatten() for p in target.parameters()])
    ema(online, target, tau)
    after = torch.cat([p.detach().flatten() for p in target.parameters()])
    found = panel.scalars(empty, online, target)
    assert float(found["tau_measured"]) == pytest.approx(tau, abs=1e-5)
    assert float(found["target_step"]) == pytest.approx(float((after - before).norm() / before.norm()), rel=0.2)
    assert "tau_measured" not in panel.scalars(empty, online, target), "only of the update that was looked at"


def test_an_update_before_the_optimizers_step_is_seen_too() -> None:
    online, target = networks()
    panel = Panel()
    panel.before_update(online, target)
    ema(online, target, 0.9)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert float(panel.scalars(branches([None]), online, target)["tau_measured"]) == pytest.approx(0.9, abs=1e-5)


def test_a_target_that_stands_still_shows_it() -> None:
    online, target = networks()
    panel = Panel()
    panel.before_update(online, target)
    found = panel.scalars(branches([None]), online, target)
    assert (float(found["target_step"]), float(found["tau_measured"])) == (0, 1)


def test_a_target_that_stands_still_says_nothing_where_its_update_may_be_over() -> None:
    online, target = networks()
    panel = Panel()
    panel.before_update(online, target, entire=False)
    found = panel.scalars(branches([None]), online, target)
    assert math.isnan(found["target_step"])
    assert math.isnan(found["tau_measured"])
    panel.before_update(online, target, entire=False)
    ema(online, target, 0.9)
    found = panel.scalars(branches([None]), online, target)
    assert float(found["tau_measured"]) == pytest.approx(0.9, abs=1e-5)
    assert float(found["target_step"]) > 0


def test_what_is_forgotten_is_not_compared() -> None:
    online, target = networks()
    panel = Panel()
    panel.before_update(online, target)
    panel.forget()
    assert set(panel.scalars(branches([None]), online, target)) == {"target_drift", "target_norm_ratio"}


def test_no_target_gives_no_figures_of_it() -> None:
    online, _ = networks()
    panel = Panel()
    panel.before_update(online, None)
    assert panel.scalars(branches([None]), online, None) == {}
    assert panel.scalars(branches([None]), online, nn.Linear(2, 2)) == {}, "nothing in common"


def test_parameters_are_paired_by_name_and_shape() -> None:
    encoder = nn.Linear(4, 3)
    online = nn.ModuleDict({"encoder": encoder, "predictor": nn.Linear(3, 3), "other": nn.Linear(2, 2)})
    target = nn.ModuleDict({"other": nn.Linear(5, 5), "encoder": copy.deepcopy(encoder)})
    mine, theirs = shared_parameters(online, target)
    assert [m.shape for m in mine] == [m.shape for m in theirs] == [(3, 4), (3,)]
    drift = Panel().scalars(branches([None]), online, target)["target_drift"]
    assert float(drift) == 0


def test_the_sample_takes_of_every_tensor_and_no_more_than_its_limit() -> None:
    tensors = [rows(64, 288).reshape(64, 32, 3, 3), rows(64, 1)[:, 0] + 2, rows(500, 64) - 3, torch.tensor(4.0)]
    whole = math.sqrt(sum(float(t.square().sum()) for t in tensors))
    for limit in (100, 1000, 10_000):
        found = sampled(tensors, limit)
        assert len(found) <= limit
        assert float(found.norm()) == pytest.approx(whole, rel=0.2), "an estimate of the norm of everything"
        for tensor in tensors:
            only = sampled([torch.zeros_like(t) if t is not tensor else t for t in tensors], limit)
            assert float(only.norm()) > 0
    assert len(sampled(tensors, 10_000)) > 5_000
    copied = sampled([tensors[1]], 64)
    tensors[1].zero_()
    assert float(copied.norm()) > 0


# ---------------------------------------------------------------- gradients


def test_gradient_norms_by_part_make_up_the_whole() -> None:
    backbone, head, idle = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)
    head(backbone(rows(5, 3))).square().sum().backward()
    parts = {"backbone": backbone.parameters(), "head": head.parameters(), "loss": idle.parameters()}
    found = gradient_norms(parts)
    for name, module in (("backbone", backbone), ("head", head)):
        flat = torch.cat([p.grad.flatten() for p in module.parameters()])  # type: ignore[union-attr]
        assert float(found[f"grad_norm_{name}"]) == pytest.approx(float(flat.norm()), rel=1e-6)
    expected = float(nn.utils.get_total_norm([p.grad for m in (backbone, head) for p in m.parameters()]))  # type: ignore[misc]
    assert float(found["grad_norm"]) == expected
    assert set(found) == {"grad_norm", "grad_norm_backbone", "grad_norm_head"}
    assert gradient_norms({"idle": idle.parameters()}) == {}


def test_a_ring_of_wide_rows_holds_fewer_of_them_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "LARGEST", 60)
    ring, restored = panel.Ring(64), panel.Ring(64)
    rows = torch.arange(90.0).reshape(9, 10)
    ring.add(rows[:4])
    ring.add(rows[4:])
    assert sorted(ring.rows[:, 0].tolist()) == [30.0, 40.0, 50.0, 60.0, 70.0, 80.0]
    restored.load_state_dict(ring.state_dict())
    restored.add(rows[:1])
    assert 30.0 not in restored.rows[:, 0]
    assert 0.0 in restored.rows[:, 0]
