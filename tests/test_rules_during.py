"""Rules that read a run's records: silent about sound runs, whatever the records hold, and right about the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sound_runs import (
    BYOL,
    BYOL_EPOCHS,
    DINO,
    FACTS,
    RULES,
    SOUND,
    SWAV,
    byol,
    late,
    look,
    records,
    severity,
    told,
    worthless,
)

from sslkit.rules import Course, Facts
from sslkit_rules import collapse, divergence, loading

# ---------------------------------------------------------------- sound runs


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("rule", RULES)
def test_is_silent_about_a_sound_run_at_every_record(name: str, rule: str) -> None:
    facts, lines = SOUND[name]
    live = Course(facts, {"status": "running"})
    for line in lines:
        live.add(line)
        seen = look(RULES[rule], live)
        assert seen is None or severity(RULES[rule], seen) == "info", (line["step"], seen)


@pytest.mark.parametrize("rule", RULES)
def test_is_silent_about_nothing_and_about_one_record(rule: str) -> None:
    assert look(RULES[rule], Course()) is None
    for lines in (records(BYOL, BYOL_EPOCHS)[:1], [{"step": 0, "epoch": 0.0, "knn_top1": 0.1}], [{}]):
        assert look(RULES[rule], Course(FACTS, {}, lines)) is None


@pytest.mark.parametrize("rule", RULES)
def test_says_what_why_how_and_who_says_so(rule: str) -> None:
    written = RULES[rule]
    assert written.what.endswith(".")
    assert all((written.cause, written.fix, written.source, written.during))
    assert set(written.explains) - {"tau_falls"} <= set(RULES), "explains a finding that does not exist"


# ---------------------------------------------------------------- collapse


def test_collapse() -> None:
    seen = told(collapse.collapse, byol(late("std_sqrt_d", lambda *_: 0.4)))
    assert seen.severity == "warning"
    assert seen.step == 110
    assert "0.4, from 0.985" in seen.text


def test_collapse_to_a_point_is_an_error_unless_features_get_better() -> None:
    def shrunk(line: dict[str, Any]) -> dict[str, Any]:
        return late("std_sqrt_d", lambda *_: 0.05)(line) | worthless(line)

    seen = told(collapse.collapse, byol(shrunk))
    assert seen.severity == "error"
    seen = told(collapse.collapse, byol(late("std_sqrt_d", lambda *_: 0.05)))
    assert seen.severity == "warning"


def test_a_dip_of_the_spread_is_no_collapse_where_the_loss_works_against_it() -> None:
    facts, lines = SOUND["swav"]
    dip = [{**line, "std_sqrt_d": 0.2} if "std_sqrt_d" in line and 30 <= line["step"] <= 90 else line for line in lines]
    for end in range(len(dip)):
        assert look(collapse.collapse, Course(facts, {}, dip[:end])) is None
    stays = [{**line, "std_sqrt_d": 0.2} if "std_sqrt_d" in line and line["step"] >= 30 else line for line in lines]
    assert look(collapse.collapse, Course(facts, {}, stays)) is not None


def test_collapse_of_a_run_of_which_nothing_is_known() -> None:
    lines = [{"step": step, "std_sqrt_d": 0.9 if step < 50 else 0.05} for step in range(0, 400, 10)]
    assert look(collapse.collapse, Course(Facts(), {}, lines[:12])) is None, "it may rise again"
    assert told(collapse.collapse, Course(Facts(), {}, lines)).severity == "error"
    assert told(collapse.collapse, Course(Facts(), {"status": "done"}, lines[:12])).step == 50


@pytest.mark.parametrize("key", ["effective_rank_share", "projection_rank_share"])
def test_dimensional_collapse(key: str) -> None:
    def low(line: dict[str, Any]) -> dict[str, Any]:
        return late(key, lambda *_: 0.08)(line) | worthless(line)

    seen = told(collapse.dimensional_collapse, byol(low))
    assert seen.severity == "error"
    assert "0.08 of min(N, d)" in seen.text


def test_a_low_rank_that_grows_is_none() -> None:
    growing = {84: 0.03, 168: 0.05, 252: 0.07, 336: 0.09}
    run = byol(lambda line: {k: growing[line["step"]] for k in line if k.endswith("_rank_share")})
    assert look(collapse.dimensional_collapse, run) is None


def test_cosine_high() -> None:
    def alike(line: dict[str, Any]) -> dict[str, Any]:
        return late("cosine", lambda *_: 0.995, 50)(line) | worthless(line)

    seen = told(collapse.cosine_high, byol(alike))
    assert seen.step == 50
    late_in_the_run = [{**line, "epoch": line["epoch"] + 3, **alike(line)} for line in records(BYOL, BYOL_EPOCHS)]
    assert look(collapse.cosine_high, Course(FACTS, {}, late_in_the_run)) is None


def test_prototype_collapse() -> None:
    facts, lines = SOUND["dino"]
    flat = [{**line, "kl": 0.001} if "kl" in line and line["step"] > 60 else line for line in lines]
    seen = told(collapse.prototype_collapse, Course(facts, {}, [{**line, **worthless(line)} for line in flat]))
    assert seen.severity == "error"
    assert "0.001 nats" in seen.text
    facts, lines = SOUND["swav"]
    one = [{**line, "prototypes_used": 1} if "kl" in line and line["step"] > 60 else line for line in lines]
    assert look(collapse.prototype_collapse, Course(facts, {}, one)) is not None


def test_partial_collapse() -> None:
    def fallen(line: dict[str, Any]) -> dict[str, Any]:
        return (
            late("loss", lambda step, _: 1.6 if step < 240 else 0.3)(line)
            | late("knn_top1", lambda *_: 0.2, 250)(line)
            | late("effective_rank_share", lambda *_: 0.2, 250)(line)
        )

    seen = told(collapse.partial_collapse, byol(fallen))
    assert seen.step == 230, "the median of four losses falls there"
    assert "kNN" in seen.text
    only_the_loss = byol(late("loss", lambda step, _: 1.6 if step < 240 else 0.3))
    assert look(collapse.partial_collapse, only_the_loss) is None


# ---------------------------------------------------------------- the target


def test_target_equals_online() -> None:
    seen = told(divergence.target_equals_online, byol(late("target_drift", lambda *_: 0.0, 0)))
    assert seen.cause is None
    assert seen.step == 1

    def still(line: dict[str, Any]) -> dict[str, Any]:
        return {key: 0.0 for key in ("target_drift", "target_step") if key in line}

    seen = told(divergence.target_equals_online, byol(still))
    assert seen.cause is not None
    assert "neither network moves" in seen.cause


def test_target_diverges() -> None:
    seen = told(divergence.target_diverges, byol(late("target_norm_ratio", lambda step, _: 1 + step / 1000)))
    assert "1.33 times" in seen.text
    assert seen.step == 110
    assert look(divergence.target_diverges, byol(late("target_norm_ratio", lambda *_: 1.09))) is None


def test_target_not_following() -> None:
    seen = told(divergence.target_not_following, byol(late("target_drift", lambda step, _: step / 500)))
    assert "0.66" in seen.text
    nearer = byol(late("target_drift", lambda step, _: 1 - step / 600))
    assert look(divergence.target_not_following, nearer) is None


@pytest.mark.parametrize(
    ("moved", "why"),
    [
        (lambda tau: tau**2, "twice"),
        (lambda tau: 1 - tau, "changed places"),
        (lambda tau: 0.0, "copied"),
        (lambda tau: (1 + tau) / 2, "leaves parameters out"),
        (lambda tau: tau**4, "4 times"),
    ],
)
def test_tau_not_applied(moved: Callable[[float], float], why: str) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        return {"tau": 0.97, "tau_measured": moved(0.97)} if "tau" in line and line["step"] > 1 else {}

    seen = told(divergence.tau_not_applied, byol(change))
    assert seen.cause is not None
    assert why in seen.cause.replace("3.8", "4").replace("3.9", "4")


def test_tau_that_float32_cannot_show_is_not_judged() -> None:
    run = byol(lambda line: {"tau": 0.9999, "tau_measured": 0.9998} if "tau" in line else {})
    assert look(divergence.tau_not_applied, run) is None


def test_updates_not_steps() -> None:
    twice = byol(lambda line: {"target_updates": 2 * line["step"]} if "loss" in line else {})
    seen = told(divergence.updates_not_steps, twice)
    assert seen.text == "20 updates of the target in 10 steps"
    assert seen.cause
    none = byol(lambda line: {"target_updates": 0} if "loss" in line else {})
    assert look(divergence.updates_not_steps, none) is not None


def test_resume_reset_shows_in_tau_and_in_drift() -> None:
    def again(step: int, _: float) -> float:
        return BYOL["tau"][sum(s < step - 200 for s in BYOL["step"])]

    seen = told(divergence.resume_reset, byol(late("tau", again, 200), resumed_at=[200]))
    assert seen.step == 210
    assert "back to 0.900" in seen.text
    assert "went on from step 200" in seen.text
    near = byol(late("target_drift", lambda step, old: old * (0.3 if step < 240 else 1), 210))
    lr = [{**line, "lr": 0.004} if "lr" in line else line for line in near.records]
    seen = told(divergence.resume_reset, Course(FACTS, {}, lr))
    assert seen.step == 210
    assert "drift falls" in seen.text


def test_weights_that_begin_anew_show_in_the_drift() -> None:
    seen = told(divergence.resume_reset, byol(late("target_drift", lambda step, old: old * 8, 210)))
    assert seen.step == 210
    assert "jumps from 0.06" in seen.text
    assert look(divergence.resume_reset, byol(late("target_drift", lambda step, old: old * 3, 210))) is None


def test_a_drift_that_falls_with_the_rate_is_no_reset() -> None:
    falling = byol(lambda line: {"target_drift": 0.05 * line["lr"] / 0.005, "tau": 0.9} if "lr" in line else {})
    assert look(divergence.resume_reset, falling) is None


# ---------------------------------------------------------------- whatever records hold


KEYS = sorted({*BYOL, *BYOL_EPOCHS, *SWAV, *DINO, "grad_norm_loss"} - {"step"})
NUMBERS = st.one_of(
    st.none(), st.just(0), st.just(0.0), st.just(1.0), st.just(math.nan), st.just(math.inf), st.booleans(),
    st.text(max_size=3), st.floats(-10, 10), st.floats(), st.integers(-5, 1000),
)  # fmt: skip
LINE = st.dictionaries(st.sampled_from(KEYS), NUMBERS, max_size=12)
SOME_FACTS = st.builds(
    Facts,
    total_steps=st.none() | st.integers(1, 100),
    prevents_collapse=st.none() | st.booleans(),
    predictor_learns=st.none() | st.booleans(),
    wants_predictions=st.none() | st.booleans(),
    blank_loss=st.none() | st.floats(-5, 5),
    byol_scale=st.sampled_from([None, 1.0, 0.5]),
    agreement=st.none() | st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(LINE, max_size=30), facts=SOME_FACTS, status=st.dictionaries(
    st.sampled_from(["status", "reason", "step", "resumed_at"]), NUMBERS | st.lists(NUMBERS, max_size=2)
))  # fmt: skip
def test_no_record_makes_a_rule_raise(lines: list[dict[str, Any]], facts: Facts, status: dict[str, Any]) -> None:
    live = Course(facts, status, [{**line, "step": i, "epoch": i / 4} for i, line in enumerate(lines)])
    for name, rule in RULES.items():
        seen = look(rule, live)
        assert seen is None or (seen.text and not seen.text[0].isupper()) or name == "knn_not_improving"


def test_views_that_are_pushed_apart() -> None:
    pushed = byol(late("cosine", lambda *_: -0.4, 100))
    assert "-0.400" in told(collapse.views_pushed_apart, pushed).text
    assert look(collapse.views_pushed_apart, byol(late("cosine", lambda *_: -0.05, 100))) is None
    rising = [{"step": step, "cosine": -0.9 + 0.02 * step} for step in range(20)]
    assert look(collapse.views_pushed_apart, Course(Facts(), {}, rising)) is None, "they come together"


# ---------------------------------------------------------------- waiting for data


@pytest.mark.parametrize(("share", "severe"), [(0.1, None), (0.11, "info"), (0.4, "info"), (0.41, "warning")])
def test_data_wait(share: float, severe: str | None) -> None:
    seen = look(loading.data_wait, byol(lambda line: {"data_wait": share} if "loss" in line else {}))
    if severe is None:
        assert seen is None
        return
    assert seen is not None
    assert seen.severity == severe
    assert f"{share:.0%} of the time is spent waiting for images" in seen.text


def test_data_wait_forgets_a_slow_beginning_and_wants_three_records() -> None:
    def waits(*shares: float) -> Course:
        return Course(Facts(), {}, [{"step": n, "data_wait": share} for n, share in enumerate(shares)])

    assert look(loading.data_wait, waits(*[0.9] * 30, *[0.01] * 20)) is None
    assert look(loading.data_wait, waits(0.9, 0.9)) is None
    assert told(loading.data_wait, waits(0.9, 0.9, 0.02)).severity == "warning"
