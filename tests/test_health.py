from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslkit import health


def test_spread_features_have_std_one_and_collapsed_ones_zero() -> None:
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert float(health.std_sqrt_d(z)) == pytest.approx(1, abs=0.02)
    assert float(health.std_sqrt_d(torch.ones(100, 64))) == pytest.approx(0, abs=1e-6)


def test_std_agrees_with_the_formula_in_float64() -> None:
    z = torch.randn(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 2
    unit = z / z.norm(dim=1, keepdim=True)
    expected = ((unit - unit.mean(0)).square().mean(0).sqrt().mean() * math.sqrt(16)).item()
    assert float(health.std_sqrt_d(z.float())) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_rank_of_k_equal_directions_is_k(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(32, k, dtype=torch.float64, generator=generator)).Q
    coordinates = torch.linalg.qr(torch.randn(256, k, dtype=torch.float64, generator=generator)).Q
    assert health.effective_rank(coordinates @ directions.T, centred=False) == pytest.approx(k, rel=1e-3)


def test_rank_agrees_with_the_singular_values() -> None:
    z = torch.randn(300, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) @ torch.randn(
        20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    sigma = torch.linalg.svdvals(z - z.mean(0))
    p = sigma / sigma.sum() + 1e-7
    expected = math.exp(-(p * p.log()).sum().item())
    assert health.effective_rank(z) == pytest.approx(expected, rel=1e-9)
    assert health.effective_rank(z[:10]) <= 10


def test_centring_removes_a_common_offset() -> None:
    z = torch.randn(500, 16, generator=torch.Generator().manual_seed(5))
    assert health.effective_rank(z + 100) == pytest.approx(health.effective_rank(z), rel=1e-3)
    assert health.effective_rank(z + 100, centred=False) < 3


@pytest.mark.filterwarnings("ignore")
def test_rankme_agrees_with_lightly_where_it_has_it() -> None:
    pytest.importorskip("lightly")
    debug = pytest.importorskip("lightly.utils.debug")
    z = torch.randn(400, 24, generator=torch.Generator().manual_seed(6))
    # lightly's std_of_l2_normalized is the same number without the factor sqrt(d), with Bessel's correction.
    expected = float(debug.std_of_l2_normalized(z)) * math.sqrt(24) * math.sqrt(399 / 400)
    assert float(health.std_sqrt_d(z)) == pytest.approx(expected, rel=1e-5)


def test_drift_is_the_relative_distance_of_all_parameters() -> None:
    online, target = nn.Linear(3, 2), nn.Linear(3, 2)
    o = torch.cat([p.detach().flatten() for p in online.parameters()])
    t = torch.cat([p.detach().flatten() for p in target.parameters()])
    drift, ratio = health.target_drift(online, target)
    assert float(drift) == pytest.approx(float((o - t).norm() / o.norm()), rel=1e-5)
    assert float(ratio) == pytest.approx(float(t.norm() / o.norm()), rel=1e-5)
    assert float(health.target_drift(online, online)[0]) == 0
