from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from sslkit import doctor, registry
from sslkit.doctor import check_accepted, examine, examine_run
from sslkit.errors import UserError
from sslkit.rules import Course, Facts, Rule, Seen


def rule(severity: str, **more: object) -> Rule:
    return Rule("Something is wrong.", severity, fix="mend it", source="a paper", **more)  # type: ignore[arg-type]


def install(monkeypatch: pytest.MonkeyPatch, rules: Mapping[str, Rule]) -> None:
    monkeypatch.setattr(doctor, "rules", lambda: (dict(rules), ()))


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule that sees small batches, one that sees its consequence, and one that is always content."""
    install(monkeypatch, {
        "high_loss": rule("error", during=lambda c: "the loss is high" if (c.last("loss") or 0) > 1 else None),
        "small_batch": rule(
            "warning", key="train.batch_size", cause="haste", explains=("high_loss",),
            before=lambda f: f"batch_size is {f.batch_size}" if (f.batch_size or 99) < 8 else None,
        ),
        "content": rule("error", before=lambda f: None, during=lambda c: None),
    })  # fmt: skip


@pytest.mark.usefixtures("three")
def test_a_cause_is_as_grave_as_what_it_brings_about_and_told_before_it() -> None:
    found = examine(Course(Facts(batch_size=4), records=[{"step": 7, "loss": 2.0}]), "a run")
    assert [(f.id, f.severity, f.step, f.because) for f in found.findings] == [
        ("small_batch", "error", None, ()), ("high_loss", "error", 7, ("small_batch",)),
    ]  # fmt: skip
    assert found.exit_code == 2
    assert found.verdict == "not trustworthy: mend the 2 errors and start again from epoch 0"


@pytest.mark.usefixtures("three")
def test_the_verdict_and_the_exit_code_are_those_of_the_worst() -> None:
    healthy = examine(Course(Facts(batch_size=64), records=[{"loss": 0.5}]), "a run")
    assert (healthy.verdict, healthy.exit_code) == ("healthy", 0)
    going = examine(Course(Facts(), records=[{"step": 3}], status={"status": "running", "step": 3}), "a run")
    assert going.verdict == "healthy so far"
    warned = examine(Course(Facts(batch_size=2)), "a run")
    assert (warned.verdict, warned.exit_code) == ("usable, with a warning to look at", 1)


@pytest.mark.parametrize("status", ["running", "failed", "done", "stopped"])
def test_of_a_run_without_a_step_nothing_good_is_said(status: str) -> None:
    course = Course(Facts(batch_size=64), {"status": status, "step": 0}, [{"step": 0, "epoch": 0, "knn_top1": 0.3}])
    assert examine(course, "a run").verdict == "cannot be judged: no step was seen"
    course.add({"step": 1, "epoch": 0, "loss": 1.0})
    assert examine(course, "a run").verdict.startswith("healthy")
    assert examine(Course(Facts(batch_size=64)), "a recipe").verdict == "healthy", "it has not begun"


def test_a_loss_alone_is_no_reason_to_start_again() -> None:
    quiet = [{"step": step, "epoch": step, "loss": 3.0 - 0.2 * step} for step in range(10)]
    found = examine(Course(records=quiet), "a log")
    assert ([f.id for f in found.findings], found.exit_code) == (["no_quality_metric"], 2)
    assert found.verdict.startswith("cannot be judged: nothing recorded tells good features from useless ones")
    worse = examine(Course(Facts(view_difference=(0.0, 0.0)), records=quiet), "a log")
    assert worse.verdict == "not trustworthy: mend the 2 errors and start again from epoch 0"


@pytest.mark.usefixtures("three")
def test_what_a_recipe_accepts_is_told_as_meant_and_an_error_stays_one() -> None:
    error = examine(Course(records=[{"loss": 2.0}]), "a run", accepted=["high_loss"])
    assert [(f.id, f.severity) for f in error.findings] == [("high_loss", "error")]
    assert "accepted" in error.findings[0].evidence
    found = examine(Course(Facts(batch_size=4)), "a run", accepted=["small_batch"])
    assert [(f.id, f.severity) for f in found.findings] == [("small_batch", "info")]
    assert "accepted" in found.findings[0].evidence
    assert found.exit_code == 0


def test_a_rules_headline_may_be_another_in_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"a": rule("error", before=lambda f: Seen("3", what="Something is very wrong.")),
                          "b": rule("error", before=lambda f: Seen("3"))})  # fmt: skip
    whats = [f.what for f in examine(Course(), "a run").findings]
    assert whats == ["Something is very wrong.", "Something is wrong."]


def test_the_probes_first_figure_is_told_as_that_of_an_untrained_probe() -> None:
    records = [{"step": 0, "knn_top1": 0.5, "probe_top1": 0.28}, {"step": 60, "knn_top1": 0.7, "probe_top1": 0.76}]
    for initialised, network in (("", "random"), ("runs/x, step 8", "initialised")):
        course = Course(Facts(recipe={}, initialised=initialised), {"status": "done"}, list(records))
        knn, probe = examine(course, "a run").notes
        assert knn == f"kNN top-1 0.5000 at step 0 (the {network} network) -> 0.7000 at step 60"
        assert probe == "linear probe top-1 0.2800 at step 0 (the untrained probe, chance) -> 0.7600 at step 60"


def test_a_probe_that_rises_from_its_untrained_self_proves_nothing_of_a_log() -> None:
    def verdict(*values: float) -> str:
        records = [{"step": 10 * i, "epoch": i, "probe_top1": value} for i, value in enumerate(values)]
        return examine(Course(Facts(), {}, records), "a log").verdict

    assert "accuracy has not clearly risen" in verdict(0.1, 0.5, 0.5, 0.51)
    assert "accuracy has not clearly risen" not in verdict(0.1, 0.4, 0.45, 0.51)


@pytest.mark.usefixtures("three")
def test_the_text_has_figures_cause_fix_and_source() -> None:
    text = examine(Course(Facts(batch_size=4)), "a run", notes=["a note"]).text()
    for part in ("sslkit doctor: a run", "WARN     Something is wrong [small_batch]", "seen: batch_size is 4",
                 "likely cause: haste", "fix: mend it", "source: a paper", "LOG      a note", "VERDICT"):  # fmt: skip
        assert part in text, (part, text)


@pytest.mark.usefixtures("three")
def test_another_programs_run_is_not_told_of_keys_of_a_recipe() -> None:
    assert examine(Course(Facts(batch_size=4)), "a run").findings[0].key == ""


@pytest.mark.parametrize(
    ("fix", "left"),
    [
        ("lower the rate (optimizer.lr), clip (train.clip_grad_norm)", "lower the rate, clip"),
        ("compare (train.precision = 'fp32'); then", "compare; then"),
        ("both (loss.temperature, loss.x) at once", "both at once"),
        ("tau (target_updater.tau = { use = 'cosine', start = 0.99, end = 1.0 })", "tau"),
        ("warm up (loss.t = { use = 'piecewise', points = [[0.0, 0.04], [0.1, 0.07]] })", "warm up"),
        ("1 - (1 - base) (cos(pi*k/K) + 1) / 2", "1 - (1 - base) (cos(pi*k/K) + 1) / 2"),
        ("normalise (torch.nn.functional.normalize)", "normalise (torch.nn.functional.normalize)"),
        ("(see the recipe simsiam_cifar10)", "(see the recipe simsiam_cifar10)"),
        ("set it (no optimizer.groups for it)", "set it (no optimizer.groups for it)"),
        ("a reference (losses.py) and (loss)", "a reference (losses.py) and (loss)"),
    ],
)
def test_a_fix_without_a_recipe_has_no_brackets_of_its_keys(fix: str, left: str) -> None:
    assert doctor.without_keys(fix) == left


def test_no_rules_fix_is_mangled_where_its_keys_are_left_out() -> None:
    def outside(text: str) -> str:
        while (fewer := re.sub(r"\s*\([^()]*\)", "", text)) != text:
            text = fewer
        return text

    changed = 0
    for name, rule in doctor.rules()[0].items():
        left = doctor.without_keys(rule.fix)
        changed += left != rule.fix
        assert outside(left) == outside(rule.fix), name
        assert left.count("(") == left.count(")"), name
        assert left.strip(), name
        assert not re.search(r"\((?:loss|optimizer|train|target_updater|projector)\.[\w.]+\)", left), name
    assert changed > 30


@pytest.mark.usefixtures("three")
def test_json_has_all_of_it() -> None:
    told = json.loads(examine(Course(Facts(batch_size=4, recipe={})), "a run").as_json())
    assert told["exit_code"] == 1
    assert told["findings"][0]["id"] == "small_batch"
    assert told["findings"][0]["key"] == "train.batch_size"


def test_a_rule_may_say_what_is_different_in_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen("mild", severity="info", fix="wait", cause="youth", key="seed", step=3)
    install(monkeypatch, {"x": rule("error", during=lambda c: seen)})
    (found,) = examine(Course(Facts(recipe={}), records=[{"step": 9}]), "a run").findings
    assert (found.severity, found.fix, found.cause, found.key, found.step) == ("info", "wait", "youth", "seed", 3)


def test_what_is_seen_in_training_replaces_what_was_known_before_unless_it_is_milder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = rule("error", before=lambda f: "before", during=lambda c: "during")
    milder = rule("error", before=lambda f: "before", during=lambda c: Seen("during", severity="warning"))
    install(monkeypatch, {"both": both, "milder": milder})
    found = examine(Course(records=[{"step": 1}]), "a run").findings
    assert {f.id: f.evidence for f in found} == {"both": "during", "milder": "before"}


def test_a_rule_that_fails_is_told_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find", lambda kind, name: type("P", (), {"origin": "strangers 1.0"}))
    install(monkeypatch, {"broken": rule("error", before=lambda f: 1 / 0)})  # type: ignore[arg-type, return-value]
    found = examine(Course(), "a run")
    assert found.exit_code == 0
    assert "ZeroDivisionError" in found.findings[0].evidence
    assert "strangers 1.0" in found.findings[0].cause


@pytest.mark.parametrize("odd", [True, 3, Ellipsis])
def test_a_rule_that_gives_no_sentence_is_told_and_ends_nothing(odd: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find", lambda kind, name: type("P", (), {"origin": "strangers 1.0"}))
    install(monkeypatch, {"odd": rule("error", before=lambda f: odd)})
    (found,) = examine(Course(), "a run").findings
    assert "should be a sentence" in found.evidence


def test_rules_that_could_not_be_asked_are_part_of_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "rules", lambda: ({}, ("rule 'x' failed to import",)))
    found = examine(Course(), "a run")
    assert found.verdict == "healthy (rules that are broken and were not asked: 1)"
    assert "rule 'x' failed to import" in found.notes


@pytest.mark.parametrize("status", ["interrupted", "stopped", "preempted", "running"])
def test_a_run_that_goes_on_later_is_healthy_so_far(status: str) -> None:
    assert not examine(Course(status={"status": status}), "a run").over


def test_only_findings_that_exist_can_be_accepted() -> None:
    check_accepted(["tau_above_one", "ema_missing"])
    with pytest.raises(UserError, match="'tau_fall' is no finding; did you mean 'tau_falls'"):
        check_accepted(["tau_fall"])


def test_every_installed_rule_is_whole() -> None:
    known, broken = doctor.rules()
    assert not broken
    assert len(known) > 40
    for name, one in known.items():
        assert one.what.endswith("."), name
        assert one.fix, name
        assert one.source, name
        assert set(one.explains) <= known.keys(), name
        provider = registry.find(registry.RULE, name)
        assert registry.described(provider) == (one.what, ""), f"{name}: list-plugins reads it from the source"
        assert provider.target.endswith(f":{name}"), "a rule is called by its id where it is written, too"


def test_explanations_do_not_go_in_circles() -> None:
    known = doctor.rules()[0]

    def consequences(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"{' -> '.join([*above, name])}"
        for follows in known[name].explains:
            consequences(follows, (*above, name))

    for name in known:
        consequences(name, ())


def test_something_that_is_no_rule_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names", lambda kind: ["odd"])
    monkeypatch.setattr(registry, "load", lambda kind, name: 3)
    monkeypatch.setattr(registry, "find", lambda kind, name: type("P", (), {"origin": "strangers 1.0"}))
    doctor.rules.cache_clear()
    try:
        known, broken = doctor.rules()
    finally:
        doctor.rules.cache_clear()
    assert not known
    assert "'odd' from strangers 1.0" in broken[0]


def test_a_run_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"x": rule("warning", during=lambda c: f"{c.facts.name} {c.last('loss')} {c.status['of']}")})
    (tmp_path / "facts.json").write_text(Facts(name="mine", total_steps=9).model_dump_json(), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "epoch": 1.0, "loss": 0.5}\n{"st', encoding="utf-8")
    (tmp_path / "status.json").write_text('{"status": "running", "of": 9}', encoding="utf-8")
    found = examine_run(tmp_path)
    assert found.title == "mine, step 3 of 9"
    assert found.findings[0].evidence == "mine 0.5 9"
    assert not found.over


def test_what_is_no_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not there; give a run directory"):
        examine_run(tmp_path / "nothing")
    file = tmp_path / "losses.csv"
    file.write_text("1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is a file.*--csv"):
        examine_run(file)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"is no run directory.*inside"):
        examine_run(tmp_path)
