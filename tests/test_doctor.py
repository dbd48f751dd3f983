from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslkit.doctor import check_accepted, tau_findings
from sslkit.errors import UserError

steps = st.integers(1, 400)


def ids(tau: object, total: int) -> list[str]:
    return [f.id for f in tau_findings(tau, total)]  # type: ignore[arg-type]


@given(steps, st.floats(0, 1))
def test_byols_tau_is_healthy(total: int, base: float) -> None:
    assert ids(lambda k: 1 - (1 - base) * (math.cos(math.pi * k / total) + 1) / 2, total) == []


@given(st.integers(4, 400), st.floats(0.5, 0.999))
def test_the_forum_threads_tau_passes_one_halfway(total: int, base: float) -> None:
    """Its formula lacks the + 1: tau = 1 - (1 - base) * cos(pi k / K) / 2."""
    found = tau_findings(lambda k: 1 - (1 - base) * math.cos(math.pi * k / total) / 2, total)
    assert [f.id for f in found] == ["tau_above_one"]
    first = next(k for k in range(total) if 1 - (1 - base) * math.cos(math.pi * k / total) / 2 > 1)
    assert f"at step {first + 1} of {total}" in found[0].text


@given(steps, st.integers(0, 399))
def test_a_single_bad_step_anywhere_is_found(total: int, where: int) -> None:
    where %= total
    assert ids(lambda k: -0.1 if k == where else 0.0, total)[:1] == ["tau_below_zero"]
    assert "tau_above_one" in ids(lambda k: 1.0001 if k == where else 1.0, total)
    if where:
        assert ids(lambda k: 0.9 if k < where else 0.8, total) == ["tau_falls"]


def test_an_updater_without_tau_has_no_findings() -> None:
    assert ids(lambda k: None, 10) == []


def test_only_findings_that_exist_can_be_accepted() -> None:
    check_accepted(["tau_above_one", "tau_falls"])
    with pytest.raises(UserError, match="'tau_fall' is no finding; did you mean 'tau_falls'"):
        check_accepted(["tau_fall"])
