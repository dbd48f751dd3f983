"""Logs of other programs: read in whatever form, and diagnosed."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, lines
from hypothesis import given
from hypothesis import strategies as st

from sslkit.errors import UserError
from sslkit.foreign import code_lines, csv_run, formula, logs
from sslkit.foreign.csv_run import Known

THREAD = (0.1489, 0.0108, 0.0100, 0.0087, 0.0054, 0.0092, 0.0855, 0.2342, 0.0304, 0.0142)
"""The losses of the forum thread."""
WRONG = "1-(1-HPS['base_target_ema'])*(math.cos(math.pi*epoch/HPS['num_epochs']))/2"
"""Its formula of tau, as it stands there."""


# ---------------------------------------------------------------- the thread


def test_ten_losses_alone_are_diagnosed(log: Any) -> None:
    found = csv_run.examine(log(lines(THREAD)))
    assert found.exit_code == 2
    assert "no_quality_metric" in {f.id for f in found.findings if f.severity == "error"}
    notes = "\n".join(found.notes)
    for said in (
        "cosine .963 .997 .998 .998 .999 .998 .979 .941 .992 .996 (1 - loss/4, for BYOL's sum",
        "if the loss is that: --loss",
        "loss minimum at epoch 4 (0.0054), peak at epoch 7 (0.2342) = 43x",
        "the rise begins at epoch 5, halfway through 10",
        "the fall at epochs 8-9 is probably a frozen target, not recovery",
        "not told, so not examined: tau (--tau-formula), the views (--views)",
    ):
        assert said in notes, said


def test_all_that_the_thread_says_gives_the_whole_verdict(log: Any) -> None:
    known = Known(
        epochs=10, steps_per_epoch=196, tau_base=0.996, tau_formula=WRONG, views="identical", loss="byol",
        image_size=32, stem="large", optimizer="Adam", lr=0.2, batch_size=256,
    )  # fmt: skip
    found = csv_run.examine(log(lines(THREAD)), known)
    by_severity = {s: {f.id for f in found.findings if f.severity == s} for s in ("error", "warning")}
    assert by_severity["error"] >= {"tau_above_one", "identical_views", "no_quality_metric", "adam_rate_high"}
    assert by_severity["warning"] >= {"stem_too_coarse"}
    evidence = {f.id: f.evidence for f in found.findings}
    assert "1177 of 1960" in evidence["tau_above_one"]
    assert "x2.8" in evidence["tau_above_one"]
    assert "1x1" in evidence["stem_too_coarse"]
    assert "the onset matches tau: the rise begins at epoch 5, tau is above 1 from epoch 6 on" in found.notes
    assert not any("not told" in note for note in found.notes)
    assert found.title.endswith("BYOL, 10 epochs x 196 steps")


def test_tau_follows_the_formula_at_every_step(log: Any) -> None:
    known = Known(epochs=10, steps_per_epoch=196, tau_base=0.996, tau_formula=f"tau = {WRONG}")
    tau = csv_run.read(log(lines(THREAD)), known).course.facts.tau
    assert tau
    values = [1 - 0.004 * math.cos(math.pi * (step // 196) / 10) / 2 for step in range(1960)]
    assert (tau.steps, tau.start, tau.end, tau.most) == (1960, values[0], values[-1], max(values))
    assert tau.above_one == (1176, values[1176])
    assert tau.growth == pytest.approx(math.prod(v for v in values if v > 1), rel=1e-9)


def test_a_base_alone_tells_what_tau_should_have_been(log: Any) -> None:
    notes = csv_run.read(log(lines(THREAD)), Known(epochs=10, tau_base=0.99)).notes
    assert any("is 0.9900 at the start, 0.9950 halfway (epoch 5) and 1 at the end" in n for n in notes)
    assert any("halfway through 10" in n for n in notes)
    assert not any("halfway through" in n for n in csv_run.read(log(lines(THREAD)), Known(epochs=30)).notes)
    assert not any("halfway through" in n for n in csv_run.read(log(lines(THREAD)), Known(loss="simsiam")).notes)


def test_a_sound_tau_is_not_blamed_for_a_rise(log: Any) -> None:
    right = "1 - (1 - base) * (cos(pi * k / K) + 1) / 2"
    run = csv_run.read(log(lines(THREAD)), Known(epochs=10, steps_per_epoch=196, tau_base=0.996, tau_formula=right))
    assert run.course.facts.tau
    assert run.course.facts.tau.above_one is None
    assert run.course.facts.tau.middle == pytest.approx(0.998)
    notes = "\n".join(run.notes)
    assert "the fall at epochs 8-9 is not by itself a recovery" in notes
    assert "frozen" not in notes
    assert "onset" not in notes


def test_a_curve_that_only_falls_is_not_talked_about(log: Any) -> None:
    notes = "\n".join(csv_run.read(log(lines((3.0, 2.0, 1.5, 1.4, 1.5)))).notes)
    assert "loss minimum at epoch 3 (1.4); afterwards at most 1.5" in notes
    assert "peak" not in notes
    assert "recovery" not in notes


# ---------------------------------------------------------------- every form

FORMS = {
    "losses alone": lines(THREAD),
    "words": lines(THREAD, "Epoch: {number} Epoch_Loss: {value}"),
    "words with chatter": "## Training loss\nFiles already downloaded\n"
    + lines(THREAD, "[INFO] epoch [{number}/10], train loss = {value} | val loss = 9.0"),
    "comma": "epoch,loss\n" + lines(THREAD, "{number},{value}"),
    "no header": lines(THREAD, "{number},{value}"),
    "semicolon and decimal comma": "Epoch;Train Loss\n" + lines(THREAD, "{number};{value}").replace(".", ","),
    "tab": "epoch\ttrain/loss\n" + lines(THREAD, "{number}\t{value}"),
    "spaces": "epoch   loss\n" + lines(THREAD, "{number}    {value}"),
    "JSON lines": lines(THREAD, '{{"epoch": {number}, "train_loss": {value}, "name": "x"}}'),
    "another tracker's table": '"Step","x - epoch","x - loss","x - loss__MIN"\n'
    + lines(THREAD, '"{number}","{number}","{value}","0.0"'),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same(log: Any, form: str) -> None:
    points = csv_run.read(log(FORMS[form])).course.points("loss")
    assert tuple(points.values) == THREAD
    assert points.epochs == list(range(10))


def test_a_tracker_that_calls_everything_a_value_is_understood(log: Any) -> None:
    text = "Wall time,Step,Value\n" + lines(THREAD, "170.5,{number},{value}")
    run = csv_run.read(log(text), Known(epochs=1, steps_per_epoch=9))
    assert tuple(run.course.points("loss").values) == THREAD
    assert run.course.points("loss").steps == list(range(10))
    assert "not read: Wall time" in run.notes


def test_the_standard_input_is_a_file_called_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines(THREAD).encode())))
    run = csv_run.read("-")
    assert tuple(run.course.points("loss").values) == THREAD
    assert run.title.startswith("standard input")


def test_columns_become_our_metrics(log: Any) -> None:
    text = "Epoch,Loss,EMA decay,learning_rate,kNN acc,val_acc,Collapse Level,grad norm,effective_rank,std,time\n"
    run = csv_run.read(log(text + "1,0.5,0.99,0.1,45.5,61,0.25,2,17,0.04,3\n2,0.4,0.995,0.1,50,,0.2,2,18,0.04,3\n"))
    assert run.course.records[0] == {
        "epoch": 1.0, "step": 1, "loss": 0.5, "tau": 0.99, "lr": 0.1, "knn_top1": 0.455, "probe_top1": 0.61,
        "std_sqrt_d": 0.75, "grad_norm": 2.0, "effective_rank": 17.0,
    }  # fmt: skip
    assert "probe_top1" not in run.course.records[1]
    assert run.course.facts.quality == ("knn_top1", "probe_top1")
    assert {"not read: std, time", "knn_top1 was read as percent", "probe_top1 was read as percent"} <= set(run.notes)
    assert run.course.facts.tau
    assert (run.course.facts.tau.start, run.course.facts.tau.end) == (0.99, 0.995)
    assert run.course.facts.lr
    assert run.course.facts.lr["backbone"].most == 0.1


def test_percent_signs_are_hundredths(log: Any) -> None:
    run = csv_run.read(log("epoch 1 loss 0.5 accuracy 45 %\nepoch 2 loss 0.4 accuracy 0.5%\n"))
    assert run.course.points("probe_top1").values == [0.45, 0.005]


def test_a_column_holds_for_the_steps_before_each_record(log: Any) -> None:
    rates = log("step,loss,lr\n10,1.0,0.1\n20,0.9,nan\n40,0.8,0.3\n")
    found = csv_run.read(rates, Known(steps_per_epoch=10)).course.facts.lr["backbone"]
    assert (found.start, found.end, found.most, found.settled) == (0.1, 0.3, 0.3, 10)


def test_a_column_without_a_number_is_not_known(log: Any) -> None:
    facts = csv_run.read(log("loss,lr,tau\n1.0,nan,nan\n0.9,nan,nan\n")).course.facts
    assert facts.lr is None
    assert facts.tau is None


def test_a_tau_above_one_in_a_column_is_found(log: Any) -> None:
    taus = [1 - 0.004 * math.cos(math.pi * epoch / 10) / 2 for epoch in range(10)]
    rows = "epoch,loss,tau\n" + lines(zip(THREAD, taus, strict=True), "{number},{value[0]},{value[1]}")
    found = csv_run.examine(log(rows), Known(steps_per_epoch=196))
    evidence = {f.id: f.evidence for f in found.findings}["tau_above_one"]
    assert "1.0006" in evidence
    assert "x2.8" in evidence


def test_what_is_not_a_number_is_null(log: Any) -> None:
    run = csv_run.read(log("epoch,loss\n0,1.0\n1,nan\n2,inf\n"))
    assert [r["loss"] for r in run.course.records] == [1.0, None, None]
    run = csv_run.read(log("Epoch 0 loss 1.0\nEpoch 1 loss nan\n"))
    assert [r["loss"] for r in run.course.records] == [1.0, None]


# ---------------------------------------------------------------- prose and code around a log

SCRIPT = """\
def loss_fn(p, z, weight=1.0):
    loss = 2 - 2 * (p * z).sum(dim=-1)
    total_loss = 0
    total_loss += 4 * loss
    crit = Criterion(loss=0.5,
                     lr=0.25)
    print(f'Epoch: 3 Epoch_Loss: {loss:0.4f}')
    return loss
"""
PROSE = "I get to a loss 0.7 after some epochs, and tau 3. Is this normal?\n"
LINES = lines(THREAD, "Epoch: {number} Epoch_Loss: {value}")


@pytest.mark.parametrize("text", [SCRIPT + LINES + PROSE, PROSE + LINES, PROSE + SCRIPT + LINES, LINES + SCRIPT])
def test_a_log_is_found_in_what_was_pasted_around_it(log: Any, text: str) -> None:
    run = csv_run.read(log(text))
    assert [{k: r[k] for k in r if k != "step"} for r in run.course.records] == [
        {"epoch": float(number), "loss": loss} for number, loss in enumerate(THREAD)
    ]
    notes = "\n".join(run.notes)
    assert ("as code" in notes) == (SCRIPT in text)
    assert "said once only" in notes


def test_losses_without_an_epoch_are_told_from_prose_too(log: Any) -> None:
    text = PROSE + lines(THREAD, "loss {value}") + "loss 0.0142 acc 0.5\n"
    run = csv_run.read(log(text))
    assert tuple(run.course.points("loss").values) == (*THREAD, 0.0142), "with a figure more it is one of them"
    assert "not read: line 1, said once only" in run.notes
    assert not run.course.points("tau").values


def test_the_whole_of_the_thread_is_read(log: Any) -> None:
    page = (ROOT / "docs" / "how-to" / "watch-your-own-loop.md").read_text("utf-8")
    script = page.partition("import math")[2].partition("```")[0]
    post = (
        "Hi, I trained a model.\n\nimport math"
        + script
        + "        total_loss = 0\n\n## Training loss\n"
        + LINES
        + "\nIt is not unusual.\n"
    )
    assert tuple(csv_run.read(log(post)).course.points("loss").values) == THREAD


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("loss = 2 - 2 * cos", "statement"),
        ("total_loss+=loss.item()", "statement"),
        ("return(2-2 * (x * y).sum(dim=-1))", "statement"),
        ("for epoch in range(10):", "statement"),
        ("loss = criterion(a, 0.5,", "statement"),
        ("print('loss', 0.5)", "call"),
        ("Namespace(lr=0.1, loss=0.5)", "call"),
        ("(conv1): Conv2d(3, 64, kernel_size=(7, 7), bias=False)", "call"),
        ("total_loss = 0", "assignment"),
        ("loss = -0.5; lr = 0.1", "assignment"),
        ("loss = nan", "assignment"),
        ("loss = 2 - 2", "statement"),
        ("lr = cfg.lr", "statement"),
        ("arch = resnet18", "words"),
        ("betas = (0.9, 0.95)", "words"),
        ("loss: 0.5", "words"),
        ("Loss (0.5)", "words"),
        ("loss -0.5", "words"),
        ("Epoch: 0 Epoch_Loss: 0.1489", "words"),
        ("epoch=1 loss=0.5", "words"),
        ("loss=0.5, lr=0.1", "words"),
        ("10/10 [00:01<00:00, 7.2it/s, loss=0.5]", "words"),
        ("loss: 0.5 - acc: 0.9", "words"),
        ("the loss is 0.5 (see above)", "words"),
        ("(" * 900, "words"),
    ],
)
def test_code_is_told_from_what_it_prints(line: str, kind: str) -> None:
    assert code_lines.kind(line) == kind


@pytest.mark.parametrize("form", ["loss = {value}", "loss: {value}", "Loss ({value})", "loss {value}"])
def test_a_log_may_look_like_an_assignment_and_begin_with_its_arguments(log: Any, form: str) -> None:
    head = "Namespace(epochs=10, lr=0.1)\narch = resnet18\n"
    head += "ResNet(\n  (conv1): Conv2d(3, 64, kernel_size=(7, 7), bias=False)\n)\n"
    assert tuple(csv_run.read(log(head + lines(THREAD, form))).course.points("loss").values) == THREAD


@given(st.text(alphabet="0123456789loss=+-*/()[]{}:.,'\"\\ \t", max_size=60))
def test_any_line_is_of_some_kind(line: str) -> None:
    assert code_lines.kind(line) in ("statement", "call", "assignment", "words")


# ---------------------------------------------------------------- what is told twice


def test_an_option_beside_a_column_is_said(log: Any) -> None:
    text = "epoch,loss,lr,tau,cosine\n0,2.2,0.1,0.99,0.2\n1,1.8,0.3,0.995,0.3\n"
    run = csv_run.read(log(text), Known(lr=0.4, tau_formula="0.9", epochs=2))
    assert {
        "lr was taken from --lr, not from the log's column, which has 0.1 to 0.3; leave the option out for that",
        "tau was taken from --tau-formula, not from the log's column, which has 0.99 to 0.995; leave the option out "
        "for that",
    } <= set(run.notes)
    assert run.course.facts.lr
    assert run.course.facts.lr["backbone"].most == 0.4
    notes = csv_run.read(log(text), Known(tau_base=0.9, loss="byol")).notes
    assert "tau was taken from the log's column, not from --tau-base" in notes
    assert "cosine was taken from the log's column, not from --loss" in notes
    assert not any("was taken from" in note for note in csv_run.read(log(text)).notes)


# ---------------------------------------------------------------- where records stand


@pytest.mark.parametrize(
    ("text", "known", "steps", "epochs"),
    [
        ("epoch,loss\n1,3\n2,2\n", Known(steps_per_epoch=5), [5, 10], [1, 2]),
        ("epoch,loss\n0,3\n0,2\n1,2\n1,1\n", Known(steps_per_epoch=10), [5, 10, 15, 20], [0, 0, 1, 1]),
        ("step,loss\n10,3\n20,2\n", Known(epochs=2), [10, 20], [1, 2]),
        ("step,loss\n10,3\n20,2\n", Known(steps_per_epoch=20), [10, 20], [0.5, 1]),
        ("epoch,step,loss\n0,5,3\n0,10,2\n1,5,2\n", Known(steps_per_epoch=10), [5, 10, 15], [0, 0, 1]),
        ("epoch,step,loss\n0,5,3\n1,15,2\n", Known(), [5, 15], [0, 1]),
        ("3\n2\n1\n2\n", Known(epochs=2, steps_per_epoch=10), [5, 10, 15, 20], [0, 0.5, 1, 1.5]),
        ("3\n2\n", Known(epochs=4, steps_per_epoch=10), [10, 20], [0, 1]),
    ],
)
def test_records_stand_at_the_end_of_what_they_tell_of(
    log: Any, text: str, known: Known, steps: list[int], epochs: list[float]
) -> None:
    points = csv_run.read(log(text), known).course.points("loss")
    assert (points.steps, points.epochs) == (steps, epochs)


def test_the_share_of_the_run_is_known_from_its_length(log: Any) -> None:
    course = csv_run.read(log(lines(THREAD)), Known(epochs=20, steps_per_epoch=10)).course
    assert course.share == 0.5
    assert course.facts.total_steps == 200


def test_several_records_of_an_epoch_are_judged_by_their_mean(log: Any) -> None:
    text = "epoch,loss\n" + "".join(f"{e},{v * f}\n" for e, v in enumerate(THREAD) for f in (0.5, 1.5))
    assert any(
        "minimum at epoch 4 (0.0054), peak at epoch 7 (0.2342) = 43x" in n for n in csv_run.read(log(text)).notes
    )


# ---------------------------------------------------------------- losses as cosines


def test_losses_become_cosines_by_what_they_are(log: Any) -> None:
    byol = csv_run.read(log("3.0\n1.0\n"), Known(loss="byol"))
    assert byol.course.points("cosine").values == [0.25, 0.75]
    assert byol.course.facts.byol_scale == 1
    simsiam = csv_run.read(log("-0.25\n-0.75\n"), Known(loss="simsiam"))
    assert simsiam.course.points("cosine").values == [0.25, 0.75]
    for known in (Known(), Known(loss="other")):
        assert not csv_run.read(log("3.0\n1.0\n"), known).course.points("cosine").values
    assert not any("cosine" in n for n in csv_run.read(log("10\n1\n")).notes)


@pytest.mark.parametrize(("form", "values", "says"), [("byol", "10\n1\n", "-1.5"), ("byol", "-1\n1\n", "1.25"),
                                                       ("simsiam", "0.5\n2.5\n", "-2.5")])  # fmt: skip
def test_what_cannot_be_the_loss_that_was_said_is_taken_for_another(
    log: Any, form: Any, values: str, says: str
) -> None:
    run = csv_run.read(log(values), Known(loss=form))
    assert any(f"they would stand for a cosine of {says}; they were taken for another loss" in n for n in run.notes)
    assert not run.course.points("cosine").values
    assert (run.course.facts.byol_scale, run.course.facts.prevents_collapse) == (None, None)


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ((4.05, 2.0, 1.0, 0.8), True),
        ((6.2, 5.8, 5.1, 4.9), False),  # ln 511 of NT-Xent
        ((-1.1, -1.6, -1.9, -1.9), False),
        ((9.0, 2.0, 1.0, 0.5), False),
    ],
)
def test_only_what_may_be_byols_is_read_as_byols(log: Any, losses: tuple[float, ...], shown: bool) -> None:
    run = csv_run.read(log(lines(losses)))
    assert any(note.startswith("cosine") for note in run.notes) == shown
    assert not any("cosine" in note for note in csv_run.read(log(lines(losses)), Known(loss="other")).notes)


def test_a_rise_halfway_is_not_laid_to_byols_tau_where_the_loss_cannot_be_byols(log: Any) -> None:
    rising = [6.0 if number < 5 else 12.0 for number in range(10)]
    rising[4] = 5.5
    assert not any("halfway" in note for note in csv_run.read(log(lines(rising))).notes)


@pytest.mark.parametrize("name", ["knn", "accuracy"])
def test_an_accuracy_that_falls_is_no_healthy_run(log: Any, name: str) -> None:
    falling = [f"{2.2 - 0.2 * n},{0.5 - 0.06 * n}" for n in range(7)]
    found = csv_run.examine(log(f"loss,{name}\n" + "\n".join(falling) + "\n"))
    assert "knn_falling" in {f.id for f in found.findings if f.severity == "error"}
    level = [f"{2.2 - 0.2 * n},{0.5 + 0.02 * (-1) ** n}" for n in range(7)]
    found = csv_run.examine(log(f"loss,{name}\n" + "\n".join(level) + "\n"))
    assert "knn_falling" not in {f.id for f in found.findings}


def test_quiet_losses_alone_cannot_be_judged(log: Any) -> None:
    found = csv_run.examine(log(lines((3.0, 2.0, 1.5, 1.4, 1.3))))
    assert found.exit_code == 2
    assert found.verdict.startswith("cannot be judged")
    assert csv_run.examine(log(lines(THREAD))).verdict.startswith("not trustworthy: mend the 2 errors")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nothing\n\n", "is empty"),
        ("epoch,accuracy\n1,2\n", ":1: no column is a loss (columns: epoch, accuracy); name one 'loss'"),
        ("epoch,loss\n", "has a header and no line below it"),
        ("epoch,loss\n0,1\n1,abc\n", ":3: 'abc' in column loss is no number"),
        ("epoch,loss\n0,1\n1,2,3\n", ":3: 3 columns, where line 1 has 2"),
        ("1,2,3\n4,5,6\n", ":1: 3 columns without names; put a line such as 'epoch,loss' above them"),
        ("5,1\n9,2\n", ":1: 2 columns without names"),
        ('{"loss": 1}\nloss\n', ":2: is no JSON"),
        ('{"loss": 1}\n[1]\n', ":2: is no JSON table"),
        ('{"epoch": 1}\n', "no losses were found"),
        ("Namespace(lr=0.1, loss=0.5)\nepoch 3\n", "no losses were found"),
        ("epoch,loss\n2,1\n1,1\n", "the log's epochs go back, from 2 to 1"),
        ("step,loss\n20,1\n10,1\n", "the log's steps go back, from 20 to 10"),
        ("epoch,step,loss\n0,9,1\n1,0,1\n", "say how many there are with --steps-per-epoch"),
        ("epoch,loss\n0,1\n,1\n", "names epoch in some records and not in others (line 3)"),
        ("epoch,loss\n0,1\nnan,1\n", "epoch of record 2 is no number"),
    ],
)
def test_a_log_that_cannot_be_used_is_refused_in_one_line(log: Any, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        csv_run.read(log(text))
    assert said in str(caught.value)
    assert len(caught.value.lines) == 1


def test_a_script_alone_holds_no_record(log: Any) -> None:
    with pytest.raises(UserError) as caught:
        csv_run.read(log("import torch\ntotal_loss = 0\nloss = 2 - 2 * cos\n"))
    assert "no lines of a log were found (line 1 is read as code); give the lines of the log alone" in str(caught.value)
    assert len(caught.value.lines) == 1


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    for path, said in ((tmp_path / "none.csv", "cannot be read"), (tmp_path, "cannot be read"),
                       (tmp_path / "picture.png", "is no text")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            csv_run.read(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 - (1 - base", "is no formula"),
        ("1 - momentum", "'momentum' is not known"),
        ("1 - bas", "did you mean 'base'?"),
        ("__import__('os').getcwd()", "is not allowed"),
        ("(lambda: 1)()", "is not allowed"),
        ("[1][0]", "is not allowed"),
        ("base.__class__", "'__class__' is not known"),
        ("open('x')", "functions are cos"),
        ("'a' * 9", "is not allowed"),
        ("cos(x=1)", "is not allowed"),
        ("1 / (epoch - 3)", "at epoch 3 (step 3): float division by zero"),
        ("9 ** 9 ** 9", "math range error"),
        ("9" * 400, "too large"),
        ("1 + " * 200 + "1", "longer than 500 characters"),
        ("base", "say what it is with --tau-base"),
        ("k / K", "say what it is with --steps-per-epoch"),
    ],
)
def test_a_formula_that_cannot_be_used_is_refused_in_one_line(log: Any, text: str, said: str) -> None:
    known = Known(epochs=10, tau_formula=text, tau_base=None if text == "base" else 0.9)
    with pytest.raises(UserError) as caught:
        csv_run.read(log(lines(THREAD)), known)
    assert str(caught.value).startswith("--tau-formula: ")
    assert said in str(caught.value)
    assert len(caught.value.lines) == 1


NAMES = {"epoch": "epoch", "epochs": "epochs"}


@pytest.mark.parametrize(
    "text",
    [
        "1 - (1 - 0.9) * (math.cos(math.pi * epoch / epochs) + 1) / 2",
        "return 1 - 0.1 * (np.cos(np.pi * self.epoch / args['epochs']) + 1) / 2;",
        "min(max(epoch / epochs, 0.1), 0.9) ** 2",
        "0.9 if epoch < 5 else 0.99",
        "tau = -epoch // 3 % 2 + abs(-1) - +1",
    ],
)
def test_formulas_are_what_python_makes_of_them(text: str) -> None:
    value, used = formula.parse(text, NAMES, "--tau-formula")
    plain = text.replace("return ", "").replace("tau = ", "").replace("self.", "").replace("args['epochs']", "epochs")
    for epoch in range(10):
        names = {"math": math, "np": math, "epoch": float(epoch), "epochs": 10.0}
        assert value({"epoch": float(epoch), "epochs": 10.0}) == eval(plain.rstrip(";"), names)
    assert used <= {"epoch", "epochs"}


@given(st.text(alphabet="0123456789+-*/%()., <>=abceopsn'[]_:{}\n", max_size=60))
def test_no_formula_does_anything_but_give_a_number_or_a_line(text: str) -> None:
    try:
        value, _ = formula.parse(text, NAMES, "x")
        assert isinstance(value({"epoch": 1.0, "epochs": 2.0}), float | int)
    except (UserError, ArithmeticError, ValueError):
        pass


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50), st.sampled_from([",", ";", "\t", "  "]))
def test_any_losses_come_back_as_they_were_written(tmp_path_factory: Any, losses: list[float], separator: str) -> None:
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text(f"epoch{separator}loss\n" + "".join(f"{n}{separator}{v!r}\n" for n, v in enumerate(losses)))
    assert [row["loss"] for row in logs.read(str(path)).rows] == losses


def test_a_log_is_read_without_torch() -> None:
    code = "import sys, sslkit.foreign.csv_run\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
