from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslkit.doctor import Facts, check_accepted, findings, tau_findings
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
    check_accepted(["tau_above_one", "ema_missing"])
    with pytest.raises(UserError, match="'tau_fall' is no finding; did you mean 'tau_falls'"):
        check_accepted(["tau_fall"])


def facts(**changes: object) -> Facts:
    """BYOL as it should be, but for the changes."""
    byol: dict[str, object] = {
        "total_steps": 100, "tau": lambda k: 0.99 + k / 10_000, "target": "copy", "prevents_collapse": False,
        "wants_predictions": True, "predictor_learns": True, "projector_normalised": False,
        "queues": (),
    }  # fmt: skip
    return Facts(**(byol | changes))  # type: ignore[arg-type]


def told(**changes: object) -> list[str]:
    return [f.id for f in findings(facts(**changes))]


def no_tau(step: int) -> None:
    return None


def test_byol_and_simsiam_are_healthy() -> None:
    assert told() == []
    assert told(target="online", tau=no_tau, projector_normalised=True) == []


@pytest.mark.parametrize(
    ("swap", "known"),
    [
        ({"target": "online", "tau": no_tau}, "ema_missing"),
        ({"predictor_learns": False}, "predictor_missing"),
        ({"tau": lambda k: 0.004}, "tau_low"),
        ({"tau": lambda k: 1.0}, "target_frozen"),
    ],
)
def test_a_part_swapped_on_its_own_is_warned_of(swap: dict[str, object], known: str) -> None:
    assert told(**swap) == [known]
    assert all(f.severity == "warning" for f in findings(facts(**swap)))
    assert told(**swap, prevents_collapse=True) == [], "a loss with negatives of its own needs none of these parts"


def test_a_queue_that_is_never_full_is_warned_of_whatever_the_loss() -> None:
    assert told(queues=((1000, 1000),)) == []
    assert told(queues=((1001, 1000), (5, 9)), prevents_collapse=True) == ["queue_never_full"]


def test_the_share_that_was_meant_is_named() -> None:
    (found,) = findings(facts(tau=lambda k: 0.004))
    assert "set 0.996" in found.text


def test_errors_come_first() -> None:
    assert told(tau=lambda k: 0.4 if k < 50 else 1.5, predictor_learns=False)[0] == "tau_above_one"
