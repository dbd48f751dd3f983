"""The rules about the target and about schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslkit.rules import Course, Facts, QueueFacts, Rule, Seen, Trajectory
from sslkit_rules import schedules, target

Value = Callable[[int], float]


def tau(value: Value | float, steps: int = 4000, **more: object) -> Facts:
    """BYOL's facts, as far as these rules look at them, with another tau."""
    of = value if callable(value) else lambda k: value
    known: dict[str, object] = {
        "tau": Trajectory.of(of, steps), "total_steps": steps, "steps_per_epoch": 100, "batch_size": 256,
        "target": "copy", "prevents_collapse": False, "wants_predictions": True, "predictor_learns": True,
        "projector_normalised": False, "unmoved": (),
    }  # fmt: skip
    return Facts(**(known | more))  # type: ignore[arg-type]


def cosine(base: float, steps: int = 4000, end: float = 1.0) -> Value:
    """BYOL's tau."""
    return lambda k: end - (end - base) * (math.cos(math.pi * k / steps) + 1) / 2


def before(rule: Rule, facts: Facts) -> Seen | None:
    assert rule.before is not None
    seen = rule.before(facts)
    return Seen(seen) if isinstance(seen, str) else seen


def during(rule: Rule, facts: Facts, *records: dict[str, float]) -> Seen | None:
    assert rule.during is not None
    seen = rule.during(Course(facts, records=list(records)))
    return Seen(seen) if isinstance(seen, str) else seen


OF_TAU = {
    name: getattr(target, name)
    for name in ("tau_above_one", "tau_below_zero", "tau_falls", "tau_low", "tau_fast", "tau_slow", "target_frozen")
}
OF_LENGTH = {name: getattr(schedules, name) for name in ("schedule_ends_early", "schedule_unfinished", "warmup_long")}


def told(facts: Facts) -> list[str]:
    return [name for name, rule in (OF_TAU | OF_LENGTH).items() if before(rule, facts)]


# ---------------------------------------------------------------- tau out of its range


@given(st.integers(1000, 4000), st.floats(0.9, 0.996))
def test_byols_tau_is_healthy(steps: int, base: float) -> None:
    assert told(tau(cosine(base, steps), steps)) == []


@given(st.integers(8, 400), st.floats(0.5, 0.999))
def test_the_forum_threads_tau_passes_one_halfway(steps: int, base: float) -> None:
    """Its formula lacks the + 1: tau = 1 - (1 - base) * cos(pi k / K) / 2."""
    wrong = lambda k: 1 - (1 - base) * math.cos(math.pi * k / steps) / 2  # noqa: E731
    seen = before(target.tau_above_one, tau(wrong, steps))
    assert seen is not None
    first = next(k for k in range(steps) if wrong(k) > 1)
    assert f"{wrong(first):.9g} at step {first + 1} of {steps}" in seen.text
    assert not before(target.tau_falls, tau(wrong, steps))


def test_the_forum_threads_own_figures() -> None:
    """Ten epochs of 196 steps, base .996, one tau an epoch."""
    wrong = lambda k: 1 - 0.004 * math.cos(math.pi * (k // 196) / 10) / 2  # noqa: E731
    seen = before(target.tau_above_one, tau(wrong, 1960, steps_per_epoch=196))
    assert seen is not None
    assert "1.00061803 at step 1177 of 1960 (epoch 6), above 1, and 1.00190211 at the end" in seen.text
    assert "grows x2.8 by the end" in seen.text
    assert seen.cause is not None
    assert "+ 1" in seen.cause
    assert seen.fix is not None
    assert "start = 0.996, end = 1.0" in seen.fix


def test_a_log_of_epochs_is_not_told_how_the_gap_grew() -> None:
    """Ten records of a run of unknown steps: tau was applied more often than ten times."""
    wrong = lambda k: 1 - 0.5 * math.cos(math.pi * k / 10) / 2  # noqa: E731
    seen = before(target.tau_above_one, tau(wrong, 10, steps_per_epoch=None))
    assert seen is not None
    assert "gap" not in seen.text
    assert "epoch" not in seen.text


def test_a_gap_that_hardly_grows_is_not_told() -> None:
    for value, is_told in ((1.048, False), (1.052, True)):
        seen = before(target.tau_above_one, tau(lambda k, value=value: value if k == 9 else 0.99, 100))
        assert seen is not None
        assert ("grows x1.1" in seen.text) == is_told


def test_another_tau_above_one_is_not_called_the_missing_1() -> None:
    seen = before(target.tau_above_one, tau(lambda k: 0.9 + k / 10_000))
    assert seen is not None
    assert seen.cause is None


@given(st.integers(2, 400), st.integers(0, 399))
def test_a_single_bad_step_anywhere_is_found(steps: int, where: int) -> None:
    where %= steps
    assert before(target.tau_below_zero, tau(lambda k: -0.1 if k == where else 0.0, steps))
    assert before(target.tau_above_one, tau(lambda k: 1.0001 if k == where else 1.0, steps))
    fallen = before(target.tau_falls, tau(lambda k: 0.9 if k < where else 0.8, steps))
    assert (fallen is not None) == (where > 0)
    if fallen:
        assert f"from 0.9 to 0.8 at step {where + 1} of {steps}" in fallen.text


def test_rounding_is_no_fall_and_a_fall_after_it_is_one() -> None:
    noisy = lambda k: 0.99 + (1e-12 if k % 2 else 0.0)  # noqa: E731
    assert not before(target.tau_falls, tau(noisy))
    assert before(target.tau_falls, tau(lambda k: noisy(k) if k < 3000 else 0.5))


def test_a_step_past_the_schedules_end_makes_tau_fall() -> None:
    assert told(tau(cosine(0.99, 2000), 4000)) == ["tau_falls"]


# ---------------------------------------------------------------- in the records


@pytest.mark.parametrize(
    ("rule", "values", "words", "step"),
    [
        (target.tau_above_one, [0.99, 1.0, 1.001, 1.002], ("1.001 in the record of step 200", "1.002", "x1.3"), 200),
        (target.tau_below_zero, [0.5, -0.25, 0.0], ("-0.25 in the record of step 100",), 100),
        (target.tau_falls, [0.9, 0.99, 0.98], ("0.99 in the record of step 100 to 0.98 in that of step 200",), 200),
    ],
)
def test_recorded_tau(rule: Rule, values: list[float], words: tuple[str, ...], step: int) -> None:
    seen = during(rule, Facts(), *({"step": 100 * i, "tau": v} for i, v in enumerate(values)))
    assert seen is not None
    assert seen.step == step
    assert all(word in seen.text for word in words), seen.text
    assert not during(rule, Facts(), *({"step": 100 * i, "tau": v} for i, v in enumerate([0.9, 0.95, 0.95, 1.0])))
    assert not during(rule, Facts())


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (target.tau_above_one, lambda k: 0.99 if k < 500 else 1.01),
        (target.tau_below_zero, lambda k: 0.99 if k < 500 else -0.01),
        (target.tau_falls, lambda k: 0.99 if k < 500 else 0.98),
    ],
)
def test_a_run_that_reached_a_bad_step_is_told_so_with_all_that_was_known(rule: Rule, value: Value) -> None:
    facts = tau(value)
    known = before(rule, facts)
    assert known is not None
    assert known.step is None
    assert during(rule, facts, {"step": 400, "tau": 0.99}) is None
    reached = during(rule, facts, {"step": 501, "tau": 0.99})
    assert reached is not None
    assert (reached.text, reached.step) == (known.text, 501)


def still(*steps: int, moved: float = 0.0, tau: float = 0.99, **more: float) -> list[dict[str, float]]:
    return [{"step": step, "target_step": moved, "tau": tau, **more} for step in steps]


def test_a_target_that_stands_still_over_100_steps_is_frozen() -> None:
    seen = during(target.target_frozen, Facts(), *still(50, 100, 150, target_drift=0.1))
    assert seen is not None
    assert (seen.severity, seen.step) == ("error", 50)
    assert "from step 50 to 150, though tau is 0.99" in seen.text
    assert during(target.target_frozen, Facts(), *still(50, 100, 149)) is None, "99 steps"
    assert during(target.target_frozen, Facts(), *still(0, 50), *still(90, moved=1e-5), *still(100, 199)) is None
    assert during(target.target_frozen, Facts(), *still(0, 100, 200, tau=1.0)) is None, "it is asked to"
    assert during(target.target_frozen, Facts(), *still(0, 100, 200, tau=0.999999)) is None, "float32 rounds it away"
    assert during(target.target_frozen, Facts(), *still(0, 200, target_drift=0.0)) is None, "it is where it belongs"
    assert during(target.target_frozen, Facts(), {"step": 0, "target_step": 0.0}, {"step": 500, "tau": 0.9}) is None


def test_a_target_told_to_stand_still_is_told_before() -> None:
    seen = before(target.target_frozen, tau(1.0))
    assert seen is not None
    assert "tau is 1 at each of the 4000 steps" in seen.text
    assert not before(target.target_frozen, tau(lambda k: 1.0 if k else 0.99))
    assert told(tau(1.0)) == ["target_frozen"]


# ---------------------------------------------------------------- too low, too fast, too slow


def test_tau_given_as_1_minus_tau() -> None:
    seen = before(target.tau_low, tau(0.004))
    assert seen is not None
    assert seen.fix is not None
    assert "set 0.996" in seen.fix
    assert "0.004 at the start" in seen.text
    assert before(target.tau_low, tau(cosine(0.004))) is not None
    zero = before(target.tau_low, tau(0.0))
    assert zero is not None
    assert zero.fix is not None
    assert "meant" not in zero.fix


def test_each_tau_has_one_name() -> None:
    assert told(tau(0.4999)) == told(tau(cosine(0.4999))) == ["tau_low"]
    assert told(tau(0.5)) == told(tau(0.8999)) == told(tau(cosine(0.8999))) == ["tau_fast"]
    assert told(tau(0.9)) == told(tau(cosine(0.9))) == []
    assert told(tau(-0.1)) == ["tau_below_zero"]


def test_an_average_that_warms_up_is_sound() -> None:
    assert told(tau(lambda k: min((1 + k) / (10 + k), 0.999), 20_000)) == []


def test_a_fast_target_is_no_matter_where_the_loss_keeps_outputs_apart_but_for_a_queue_of_negatives() -> None:
    queue = QueueFacts(rows=4096, pushed_per_step=256, negatives=True)
    assert told(tau(0.7, prevents_collapse=True)) == []
    assert told(tau(0.7, prevents_collapse=None)) == []
    assert told(tau(0.7, prevents_collapse=True, queues=(queue,))) == ["tau_fast"]
    assert told(tau(0.1, prevents_collapse=True)) == ["tau_low"]
    seen = before(target.tau_fast, tau(0.75))
    assert seen is not None
    assert "0.75 at the start: the target remembers about 4 steps" in seen.text


def test_a_target_that_hardly_leaves_its_random_start() -> None:
    seen = before(target.tau_slow, tau(cosine(0.9995, 1000), 1000))
    assert seen is not None
    assert "0.9995" in seen.text
    assert "over 1000 steps, at least 69%" in seen.text
    assert told(tau(0.9996, 2000)) == ["tau_slow"]  # .9996 ** 2000 = .45
    assert told(tau(0.9994, 2000)) == []  # .30
    assert told(tau(0.9996, 2000, steps_per_epoch=None)) == [], "records may stand for many steps"
    assert told(tau(cosine(0.9995, 39_000), 39_000)) == []


def test_a_slow_target_may_keep_weights_that_were_learnt() -> None:
    """As docs/how-to/start-from-a-run.md recommends."""
    assert told(tau(0.9925, 60)) == ["tau_slow"]
    assert told(tau(0.9925, 60, initialised="runs/x, step 840")) == []
    assert told(tau(0.9925, 60, recipe={"backbone": {"use": "timm", "pretrained": True}})) == []
    assert told(tau(0.9925, 60, recipe={"backbone": {"use": "timm", "pretrained": False}})) == ["tau_slow"]


@given(st.floats(0.9, 0.9999), st.floats(0.0, 1.0), st.integers(10, 2000))
def test_what_is_said_to_be_left_of_the_random_start_is_left(start: float, way: float, steps: int) -> None:
    curve = cosine(start, steps, end=start + way * (1 - start))
    if before(target.tau_slow, tau(curve, steps)):
        assert math.prod(curve(k) for k in range(steps)) > math.exp(-1.0001)


# ---------------------------------------------------------------- parts


def test_parts_that_keep_collapse_away() -> None:
    rules = (target.predictor_missing, target.ema_missing, target.ema_skips_parameters)
    simsiam = tau(0.9, target="online", tau=None, projector_normalised=True)
    dino = tau(0.99, wants_predictions=False, predictor_learns=False)
    for sound in (tau(0.99), simsiam, dino, Facts()):
        assert not any(before(rule, sound) for rule in rules)
    none_learns = tau(0.99, predictor_learns=False)
    assert before(target.predictor_missing, none_learns)
    assert before(target.predictor_missing, tau(0.99, predictor_learns=False, wants_predictions=False, target="none"))
    assert not before(target.predictor_missing, none_learns.model_copy(update={"prevents_collapse": True}))
    copied = simsiam.model_copy(update={"projector_normalised": False})
    assert before(target.ema_missing, copied)
    assert not before(target.ema_missing, copied.model_copy(update={"prevents_collapse": True}))


def test_parameters_that_an_update_leaves_out_are_named() -> None:
    seen = before(target.ema_skips_parameters, tau(0.99, unmoved=tuple(f"layer{i}.bias" for i in range(6))))
    assert seen is not None
    assert "leaves 6 parameters" in seen.text
    assert "layer3.bias and 2 more" in seen.text
    one = before(target.ema_skips_parameters, tau(0.99, unmoved=("last.bias",)))
    assert one is not None
    assert "1 parameter of the target where they were: last.bias" in one.text


def test_a_target_that_is_no_copy_at_the_start() -> None:
    seen = before(target.target_starts_apart, tau(0.99, target_gap=1.41))
    assert seen is not None
    assert "1.41" in seen.text
    assert before(target.target_starts_apart, tau(0.99, target_gap=0.0)) is None
    assert before(target.target_starts_apart, tau(0.99)) is None


def test_a_target_that_stands_still_in_a_short_run() -> None:
    still = [{"step": 10 * k, "tau": 0.95, "target_step": 0.0, "target_drift": 0.01 * k} for k in range(1, 8)]
    assert during(target.target_frozen, tau(0.95), *still[:4]) is None
    seen = during(target.target_frozen, tau(0.95), *still)
    assert seen is not None
    assert seen.severity == "error"
