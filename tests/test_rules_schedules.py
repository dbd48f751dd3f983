"""The rules about the length of schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslkit.rules import Facts, Rule, Seen, Trajectory
from sslkit_rules import schedules

K = 2000
Value = Callable[[int], float]


def cosine(start: float, end: float, steps: float = K, since: int = 0) -> Value:
    return lambda k: end - (end - start) * (math.cos(math.pi * min(1.0, (k - since) / (steps - since))) + 1) / 2


def warmup_cosine(warmup: int, steps: float = K, end: float = 0.0) -> Value:
    fall = cosine(1.0, end, steps, warmup)
    return lambda k: k / warmup if k < warmup else fall(k)


def stairs(*milestones: int, factor: float = 0.1) -> Value:
    return lambda k: factor ** sum(k >= m for m in milestones)


def facts(lr: Value | None = None, tau: Value | None = None, *, steps: int = K, **more: object) -> Facts:
    known: dict[str, object] = {
        "tau": Trajectory.of(tau, steps) if tau else None,
        "lr": {"backbone": Trajectory.of(lr, steps)} if lr else None,
        "total_steps": steps,
    }
    return Facts(**(known | more))  # type: ignore[arg-type]


def before(rule: Rule, known: Facts) -> Seen | None:
    assert rule.before is not None
    seen = rule.before(known)
    return Seen(seen) if isinstance(seen, str) else seen


def told(known: Facts) -> list[str]:
    names = ("schedule_ends_early", "schedule_unfinished", "warmup_long")
    return [name for name in names if before(getattr(schedules, name), known)]


HEALTHY: list[tuple[str, Value]] = [
    ("constant", lambda k: 1.0),
    ("cosine", cosine(1.0, 0.0)),
    ("cosine to a tenth", cosine(1.0, 0.1)),
    ("linear", lambda k: 1 - k / K),
    ("warm-up and cosine", warmup_cosine(100)),
    ("a warm-up of three tenths, and a cosine to a fifth", warmup_cosine(600, end=0.2)),
    ("warm-up, then constant", lambda k: min(1.0, k / 100)),
    ("MoCo's staircase", stairs(1200, 1600)),
    ("a staircase of three", stairs(600, 1000, 1400)),
    ("a long last step", stairs(1000)),
    ("one value an epoch", lambda k: cosine(1.0, 0.0)(k // 100 * 100)),
]


@pytest.mark.parametrize("value", [v for _, v in HEALTHY], ids=[name for name, _ in HEALTHY])
def test_learning_rates_in_use_are_sound(value: Value) -> None:
    stairs_or_not = {"optimizer": {"lr": {"use": "step" if value is HEALTHY[8][1] else "x"}}}
    assert told(facts(value, recipe=stairs_or_not)) == []


@pytest.mark.parametrize("tau", [
    lambda k: 0.99, cosine(0.99, 1.0), cosine(0.99, 0.999), lambda k: 0.99 + 0.01 * k / K,
    lambda k: 0.99 if k < 1000 else 0.996 if k < 1600 else 0.999,
    lambda k: min((1 + k) / (10 + k), 0.999),
    lambda k: cosine(0.996, 1.0)(k // (K // 3) * (K // 3)),
])  # fmt: skip
def test_taus_in_use_are_sound(tau: Value) -> None:
    assert told(facts(tau=tau)) == []


# ---------------------------------------------------------------- too short


@pytest.mark.parametrize("times", [2, 4, 8])
def test_a_schedule_that_counts_micro_batches_or_processes_ends_early(times: int) -> None:
    rest = f"{1 - 1 / times:.0%}"
    rate = before(schedules.schedule_ends_early, facts(cosine(1.0, 0.0, K / times)))
    assert rate is not None
    assert rate.key == "optimizer.lr"
    assert f"lr is 0 from step {K // times} of 2000 on: for the last {rest} of the run nothing is learnt" in rate.text
    recipe = {"train": {"accumulate": times}}
    tau = before(schedules.schedule_ends_early, facts(tau=cosine(0.99, 1.0, K / times), recipe=recipe))
    assert tau is not None
    assert tau.key == "target_updater.tau"
    assert f"from step {K // times} of 2000 on" in tau.text
    assert f"{times} times too short, and there are {times} micro-batches" in tau.text
    processes = before(schedules.schedule_ends_early, facts(cosine(1.0, 0.0, K / times), processes=times))
    assert processes is not None
    assert f"{times} processes" in processes.text


def test_the_border_is_a_quarter_of_the_run() -> None:
    assert told(facts(cosine(1.0, 0.0, 1500))) == ["schedule_ends_early"]
    assert told(facts(cosine(1.0, 0.0, 1510))) == []
    assert told(facts(cosine(1.0, 0.0, 5), steps=19)) == [], "too few steps to speak of"


def test_a_clamped_step_that_never_meets_the_end_is_found_too() -> None:
    """tau and lr stop at the last step's value, which is almost the end's."""
    found = facts(lambda k: cosine(1.0, 0.0)(min(4 * k, K - 1)), lambda k: cosine(0.9, 1.0)(min(4 * k, K - 1)))
    assert told(found) == ["schedule_ends_early"]
    only_lr = found.model_copy(update={"tau": None})
    assert told(only_lr) == ["schedule_ends_early"]


def test_stairs_may_end_low_but_not_at_nothing() -> None:
    deep = stairs(500, 1000, factor=0.01)
    assert told(facts(deep)) == ["schedule_ends_early"]
    for use in ("step", "piecewise"):
        assert told(facts(deep, recipe={"optimizer": {"lr": {"use": use}}})) == []
    nothing = lambda k: float(k < 1000)  # noqa: E731
    assert told(facts(nothing, recipe={"optimizer": {"lr": {"use": "piecewise"}}})) == ["schedule_ends_early"]


# ---------------------------------------------------------------- too long


@given(st.floats(1.5, 8))
def test_a_cosine_cut_off_is_unfinished(times: float) -> None:
    assert told(facts(tau=cosine(0.99, 1.0, times * K))) == ["schedule_unfinished"]
    assert told(facts(cosine(1.0, 0.0, times * K))) == ["schedule_unfinished"]


def test_a_tau_above_one_is_not_called_unfinished() -> None:
    assert told(facts(tau=lambda k: 1 + 1e-9 * k * k)) == []
    assert told(facts(tau=lambda k: 0.99 if k < 500 else 1.01)) == []


def test_its_figures_are_told() -> None:
    seen = before(schedules.schedule_unfinished, facts(tau=cosine(0.99, 1.0, 2 * K)))
    assert seen is not None
    assert "tau is 0.994996 at the last of 2000 steps and still on its way to 1, 2.4 times as steep" in seen.text
    rate = before(schedules.schedule_unfinished, facts(warmup_cosine(100, 2 * K)))
    assert rate is not None
    assert "on its way to 0" in rate.text


def test_lines_that_a_recipe_draws_itself_are_meant() -> None:
    late = lambda k: 0.99 + 1e-6 * k + 4e-6 * max(0, k - 1000)  # noqa: E731
    assert told(facts(tau=late)) == ["schedule_unfinished"]
    assert told(facts(tau=late, recipe={"target_updater": {"tau": {"use": "piecewise"}}})) == []


def test_a_warm_up_of_more_than_half_the_run() -> None:
    seen = before(schedules.warmup_long, facts(warmup_cosine(1001)))
    assert seen is not None
    assert "lr rises from 0 to 1 until step 1001 of 2000" in seen.text
    assert told(facts(warmup_cosine(1000))) == []


# ---------------------------------------------------------------- values


def test_schedules_are_told_at_their_start_halfway_and_at_the_end() -> None:
    rates = {
        "backbone": Trajectory.of(warmup_cosine(500), K), "projector": Trajectory.of(warmup_cosine(500), K),
        "predictor": Trajectory.of(lambda k: 0.03, K),
    }  # fmt: skip
    seen = before(schedules.schedule_values, facts(tau=cosine(0.99, 1.0), lr=None, steps=K))
    assert seen is not None
    assert seen.text == "tau 0.99 at step 0, 0.995 at 1000, 1 at 1999, the last"
    both = before(schedules.schedule_values, Facts(lr=rates))
    assert both is not None
    assert both.text.startswith("lr 0 at step 0, 0.75 at 1000, ")
    assert "(at most 1, at 500)" in both.text
    assert both.text.count("lr") == 2, "equal rates are told once"
    assert "lr of the predictor 0.03 at step 0, 0.03 at 1000, 0.03 at 1999" in both.text
    assert before(schedules.schedule_values, Facts()) is None


def test_a_parts_own_schedule_has_its_own_key() -> None:
    rates = {"backbone": Trajectory.of(lambda k: 1.0, K), "predictor": Trajectory.of(cosine(1.0, 0.0, K / 2), K)}
    own = Facts(lr=rates, recipe={"optimizer": {"lr": 1.0, "groups": {"predictor": {"lr": {"use": "x"}}}}})
    seen = before(schedules.schedule_ends_early, own)
    assert seen is not None
    assert seen.key == "optimizer.groups.predictor.lr"
    assert seen.text.startswith("lr of the predictor is 0")


def test_a_rate_that_goes_up_and_down_is_no_long_warmup() -> None:
    again = facts(lambda k: (1 + math.cos(math.pi * (k + 4) / 4)) / 2 * (1 + 1e-6 * k))
    assert before(schedules.warmup_long, again) is None
    flat = facts(lambda k: 0.003 + 1e-12 * k)
    assert before(schedules.warmup_long, flat) is None, "it hardly rises"
    assert before(schedules.warmup_long, facts(lambda k: 0.001 + 0.002 * k / K)) is not None
