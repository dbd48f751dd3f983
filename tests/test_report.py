from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY
from PIL import Image
from rich.console import Console
from test_charts import Reader

from sslkit import doctor, report, snapshot
from sslkit.errors import UserError
from sslkit.recipe import parse_recipe
from sslkit.report.curves import GROUPS, charts, marked
from sslkit.rules import Finding
from sslkit.summary import summarise
from sslkit_watch.report import ReportObserver

EVIL = """<script>alert(1)</script><img src=x onerror=alert(2)> & "x" 'y' %{y}"""
KNN = {"knn_k": 20, "knn_temperature": 0.1, "knn_bank": 3000, "knn_queries": 100}


def finding(**changes: Any) -> Finding:
    facts = {
        "id": "tau_above_one", "severity": "error", "what": "tau is above 1", "evidence": "1.0019 at the end",
        "cause": "the + 1 is missing", "fix": "add it", "source": "Grill et al. 2020, section 3.2",
        "key": "target_updater.tau", "step": 20,
    }  # fmt: skip
    return Finding(**(facts | changes))


def records(number: int = 40) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "knn_top1": 0.25, **KNN},
                                   {"step": 0, "epoch": 0.0, "probe_top1": 0.2}]  # fmt: skip
    for step in range(1, number + 1):
        found.append({
            "step": step, "epoch": step / 10, "loss": 4 / step, "cosine": 1 - 1 / step, "grad_norm": 1.0,
            "grad_norm_backbone": 0.5, "lr": 0.1, "lr_predictor": 0.2, "tau": 0.99, "tau_measured": 0.99,
            "std_sqrt_d": 0.97, "target_drift": 0.1, "target_norm_ratio": 0.9, "target_step": 1e-4 / step,
            "alignment": 0.3, "uniformity": -3.0, "view_difference": 0.5, "view_difference_max": 3.0,
            "target_updates": step, "loss.temperature": 0.1, "probe_train_top1": 0.4, "variance": 0.3 / step,
            "images_per_second": 1000.0 + step, "data_wait": 0.01,
        })  # fmt: skip
        if step % 10 == 0:
            found.append({
                "step": step, "epoch": step / 10, "effective_rank": 6.0, "effective_rank_share": 0.75, "rankme": 4.0,
                "alpha_req": 1.1, "projection_rank": 2.0, "projection_rank_share": 0.25,
            })  # fmt: skip
            found.append({"step": step, "epoch": step / 10, "knn_top1": 0.5 + step / 1000, **KNN})
            found.append({"step": step, "epoch": step / 10, "probe_top1": 0.6})
    return [*found, {"step": number, "epoch": number / 10, "lidar": 5.5, "lidar_images": 90, "lidar_views": 10}]


def picture(colour: str = "red", width: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 8), colour).save(file, "png")
    return file.getvalue()


def a_snapshot(label: str = "cat", classes: int = 8, points: int = 40) -> dict[str, Any]:
    image = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    near = [{"image": image, "label": label, "cosine": 0.9, "agrees": i % 3 > 0} for i in range(6)]
    queries = [{"image": image, "label": label, "neighbours": [*map(dict, near)]} for _ in range(8)]
    return {
        "step": 40, "missing": [],
        "spectrum": {"images": 3000, "dimensions": 8, "effective_rank": 6.5, "values": [2.0**-i for i in range(8)]},
        "projection": {
            "split": "test", "labels": [f"{label}{i % classes}" for i in range(points)], "explained": [0.5, 0.2],
            "tsne": [[i, math.sin(i)] for i in range(points)], "pca": [[math.cos(i), i] for i in range(points)],
        },
        "neighbours": {"split": "test", "bank": 3000, "queries": queries},
    }  # fmt: skip


def made_run(path: Path, *, name: str = "tiny", status: str = "done", label: str = "cat",
             lines: list[dict[str, Any]] | None = None) -> Path:  # fmt: skip
    path.mkdir(parents=True)
    recipe = parse_recipe(TINY.replace('"tiny"', json.dumps(name)), "tiny.toml")
    lines = records() if lines is None else lines
    for file, text in {
        "recipe.lock.toml": recipe.to_toml(),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "status.json": json.dumps({"status": status, "step": 40, "of": 40}),
        "facts.json": json.dumps({"name": name, "total_steps": 40, "steps_per_epoch": 10}),
        "env.json": json.dumps({"command": ["sslkit", "train", label], "packages": {"torch": "2.8"}, "git": None,
                                "plugins": [{"key": "loss.cosine", "version": "0.1.0"}]}),
        "snapshot.json": json.dumps(a_snapshot(label)),
    }.items():  # fmt: skip
        (path / file).write_text(text, encoding="utf-8")
    (path / "views.png").write_bytes(picture("blue", 2000))
    return path


def diagnosed(monkeypatch: pytest.MonkeyPatch, *found: Finding, notes: tuple[str, ...] = ()) -> None:
    """Make the doctor say this and nothing else."""
    monkeypatch.setattr(doctor, "examine_run", lambda run: doctor.Examination("title", found, notes))


def markup(path: Path) -> str:
    """The page without its scripts."""
    return re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def shown(path: Path) -> str:
    return unescape(markup(path))


# ---------------------------------------------------------------- the page


def test_a_page_has_all_there_is_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(tmp_path / "run")
    diagnosed(monkeypatch, finding(), finding(id="stem", severity="warning", step=None), notes=("a note",))
    path = report.write(run)
    assert path == run / "report.html"
    text = shown(path)
    for words in (
        "Not trustworthy: mend the error", "1 error, 1 warning", "Error E1", "Warning W2", "tau is above 1",
        "1.0019 at the end", "the + 1 is missing", "add it", "Grill et al. 2020", "target_updater.tau", "a note",
        "step 20, epoch 2", "step 40 of 40", "0.2500 → 0.5400", "± 0.0498 standard error of 100 images",
        "k 20, T 0.1, bank 3,000", "0.2000 → 0.6000", "4 → 0.1", "6.0 of 8", "75% of what is possible", "RankMe 4.0",
        "of 90 images, 10 views of each", "1,020", "Singular values", "Features in the plane", "Nearest neighbours",
        "32 of 48 have the label", "mean nothing", "[loss]", "torch 2.8",
    ):  # fmt: skip
        assert words in text, words
    assert "Not recorded" not in text
    assert f"data:image/png;base64,{base64.b64encode(picture('blue', 2000)).decode()}" in text
    for group in GROUPS:
        assert f">{group.title}</h3>" in text, group.title


def test_the_verdict_stands_above_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosed(monkeypatch, finding())
    text = shown(report.write(made_run(tmp_path / "run")))
    places = [text.index(words) for words in ("Not trustworthy", "tau is above 1", "kNN top-1", "Curves", "Recipe")]
    assert places == sorted(places)


@pytest.mark.parametrize(("severity", "tone"), [("error", "error"), ("warning", "warning"), ("info", "healthy")])
def test_the_banner_has_the_tone_of_the_gravest_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, severity: str, tone: str
) -> None:
    diagnosed(monkeypatch, finding(severity=severity))
    read = Reader(report.write(made_run(tmp_path / "run")).read_text(encoding="utf-8"))
    assert [s.get("data-tone") for s in read.all("section") if s.get("class") == "verdict"] == [tone]


def test_a_consequence_names_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosed(monkeypatch, finding(), finding(id="jump", because=("tau_above_one",), cause="another guess"))
    text = shown(report.write(made_run(tmp_path / "run")))
    assert '<dt>Follows from</dt><dd class="from">E1</dd>' in text
    assert "another guess" not in text


def test_nothing_in_a_run_is_taken_for_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = dict.fromkeys(("what", "evidence", "cause", "fix", "source", "key", "id"), EVIL)
    diagnosed(monkeypatch, finding(**changes), finding(**changes, severity="info"), notes=(EVIL,))
    lines = [*records(), {"step": 40, "epoch": 4.0, EVIL: 1.0}]
    run = made_run(tmp_path / "evil", label=EVIL, lines=lines)
    (run / "recipe.lock.toml").write_text(f"# {EVIL}", encoding="utf-8")
    for name in ("facts.json", "status.json"):
        (run / name).write_text(json.dumps({"name": EVIL, "status": EVIL}), encoding="utf-8")
    text = report.write(run).read_text(encoding="utf-8")
    assert EVIL not in text
    assert escape(EVIL) in text
    read = Reader(text)
    assert len(read.all("script")) == 3
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in read.all("img"))
    assert EVIL in read.texts["h1"][0]


def test_a_picture_that_is_none_is_left_out(tmp_path: Path) -> None:
    run, found = made_run(tmp_path / "run"), a_snapshot()
    found["neighbours"]["queries"][0]["image"] = 'data:image/png;base64,AA" onerror="alert(1)'
    found["neighbours"]["queries"][1]["neighbours"][2]["image"] = "https://example.org/a.png"
    (run / "snapshot.json").write_text(json.dumps(found), encoding="utf-8")
    text = markup(report.write(run))
    assert "onerror" not in text
    assert "example.org" not in text
    assert text.count('<div class="row">') == 6


@pytest.mark.parametrize(
    "damage",
    [
        '"text"', "[]", "{}", '{"step": "x", "missing": 3}', '{"spectrum": {"values": [null, "x", 1e999]}}',
        '{"projection": {"tsne": [[1]], "labels": 3}}', '{"projection": {"pca": [[1, 2]], "labels": ["a", "b"]}}',
        '{"projection": {"tsne": [[1, 2]], "pca": [[1, 2], [3, 4]]}}', '{"neighbours": {"queries": [3, {}]}}', "{",
    ],
)  # fmt: skip
def test_a_damaged_snapshot_costs_only_itself(tmp_path: Path, damage: str) -> None:
    run = made_run(tmp_path / "run")
    (run / "snapshot.json").write_text(damage, encoding="utf-8")
    text = shown(report.write(run))
    assert "kNN top-1" in text
    assert "Nearest neighbours" not in text


# ---------------------------------------------------------------- what is missing


def test_what_is_missing_is_left_out_with_a_word_of_why(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "facts.json").write_text('{"name": "theirs", "total_steps": 9}', encoding="utf-8")
    text = shown(report.write(tmp_path / "bare"))
    for words in (
        "theirs", "No metrics yet.", "No snapshot of the features", "No views.png", "no recipe.lock.toml",
        "no env.json", "Not recorded: kNN top-1 (needs labelled test images and observer.knn)",
    ):  # fmt: skip
        assert words in text, words


def test_a_loop_of_somebody_elses_may_count_no_epochs(tmp_path: Path) -> None:
    run = tmp_path / "theirs"
    run.mkdir()
    lines = [{"step": step, "loss": 1.0 + step} for step in range(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    read = Reader(report.write(run).read_text(encoding="utf-8"))
    assert read.texts["option"] == ["steps"]
    assert json.loads(read.texts["script"][0])[0]["data"][0]["customdata"] == [0, 1, 2, 3, 4]
    (run / "facts.json").write_text('{"steps_per_epoch": 2}', encoding="utf-8")
    read = Reader(report.write(run).read_text(encoding="utf-8"))
    assert read.texts["option"] == ["epochs", "steps"]
    assert json.loads(read.texts["script"][0])[0]["data"][0]["x"] == [0, 0.5, 1, 1.5, 2]


def test_a_doctor_that_fails_costs_only_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Path) -> None:
        raise ValueError("oh no")

    monkeypatch.setattr(doctor, "examine_run", fail)
    text = shown(report.write(made_run(tmp_path / "run")))
    assert "No verdict: the doctor failed: ValueError: oh no" in text
    assert "kNN top-1" in text


def test_a_recipe_that_cannot_be_read_here_is_still_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    (run / "recipe.lock.toml").write_text('name = "x"\n[loss]\nuse = "gone"\n', encoding="utf-8")
    text = shown(report.write(run))
    assert 'use = "gone"' in text
    assert "its recipe cannot be read here" in text


def test_it_says_what_is_no_run(tmp_path: Path) -> None:
    made_run(tmp_path / "bright")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"brigth: is not there; did you mean 'bright'\?; give a run directory"):
        report.write(tmp_path / "brigth")
    with pytest.raises(UserError, match="empty: is no run directory"):
        report.write(tmp_path / "empty")
    with pytest.raises(UserError, match=r"should end in \.html"):
        report.write(tmp_path / "bright", tmp_path / "page.txt")
    with pytest.raises(UserError, match="cannot be written"):
        report.write(tmp_path / "bright", tmp_path / "nowhere" / "page.html")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


# ---------------------------------------------------------------- figures and curves


def run_of(*lines: dict[str, Any], tmp_path: Path) -> Any:
    return report.read_run(made_run(tmp_path / "run", lines=list(lines)), "run")


def test_related_metrics_share_a_chart(tmp_path: Path) -> None:
    drawn = {chart.title: chart for chart in charts(run_of(*records(), tmp_path=tmp_path))}
    assert [curve.name for curve in drawn["Gradient norm"].curves] == ["all", "backbone"]
    assert [curve.name for curve in drawn["Learning rate"].curves] == ["lr", "predictor"]
    assert [curve.name for curve in drawn["tau"].curves] == ["as scheduled", "as the target moved"]
    assert [curve.name for curve in drawn["Options of the loss"].curves] == ["temperature"]
    assert [curve.name for curve in drawn["Terms of the loss"].curves] == ["variance"]
    accuracy = drawn["Accuracy of features"]
    assert [curve.name for curve in accuracy.curves] == ["kNN", "probe", "probe, training views"]
    assert [(level.value, level.curve) for level in accuracy.levels] == [(0.25, 0)], "an untrained probe is no floor"
    assert drawn["Gradient norm"].log
    assert not drawn["Loss"].log


def test_rankme_is_drawn_as_a_share_too(tmp_path: Path) -> None:
    drawn = {chart.title: chart for chart in charts(run_of(*records(), tmp_path=tmp_path))}
    newest = {curve.name: curve.values[-1] for curve in drawn["Effective rank"].curves}
    assert newest == {"features": 0.75, "RankMe": pytest.approx(4 / 8), "projections": 0.25}


def test_no_metric_is_drawn_twice_and_none_is_lost(tmp_path: Path) -> None:
    mine = {"step": 40, "epoch": 4.0, "my_metric": 1.0, "knn_top5": 0.9}
    drawn = charts(run_of(*records(), mine, tmp_path=tmp_path))
    titles = [chart.title for chart in drawn]
    assert len(titles) == len(set(titles))
    assert {"my_metric", "knn_top5"} <= set(titles)
    curves = sum(len(chart.curves) for chart in drawn)
    counted = {"step", "epoch", "target_updates", "effective_rank", "projection_rank", "lidar", "lidar_images",
               "lidar_views", *KNN}  # fmt: skip
    assert curves == len({key for record in [*records(), mine] for key in record} - counted)


def test_a_metric_that_was_never_finite_is_left_out(tmp_path: Path) -> None:
    run = run_of({"step": 1, "epoch": 0.1, "loss": None}, {"step": 2, "epoch": 0.2, "loss": None}, tmp_path=tmp_path)
    assert charts(run) == []
    assert "Not recorded: " in shown(report.write(tmp_path / "run"))


def test_findings_are_marked_where_they_were_seen(tmp_path: Path) -> None:
    run = run_of(*records(), tmp_path=tmp_path)
    found = [
        finding(step=20), finding(id="b", step=21), finding(id="c", step=21, severity="warning"),
        finding(id="d", severity="warning", step=None), finding(id="e", severity="info", step=5),
    ]  # fmt: skip
    marks = [(mark.step, mark.epoch, mark.text, mark.severity) for mark in marked(run, found)]
    assert marks == [(5, 0.5, "I5", "info"), (20, 2.0, "E1, E2, W3", "error"), (21, 2.1, "", "error")]
    assert all(chart.marks == marked(run, found) for chart in charts(run, found))
    many = marked(run, [finding(id=str(i), step=40) for i in range(9)])
    assert [mark.text for mark in many] == ["E1 + 8"]


def test_without_a_random_network_no_figure_stands_in_for_it(tmp_path: Path) -> None:
    text = shown(report.write(made_run(tmp_path / "run", lines=[r for r in records() if r["step"] >= 10])))
    assert "0.5400" in text
    assert "→ 0.5400" not in text
    assert "random network → now" not in text


def test_a_probe_begins_untrained_and_not_as_the_random_network(tmp_path: Path) -> None:
    text = shown(report.write(made_run(tmp_path / "run", lines=records())))
    assert "random network → now; ± 0.0498 standard error" in text, "kNN keeps its floor"
    assert "untrained probe (chance) → now; " in text
    assert text.count("random network → now") == 1
    console = Console(file=io.StringIO(), width=200)
    summarise(tmp_path / "run", console)
    assert "beside the run: 0.2000 untrained, chance (step 0) -> 0.6000\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_figure_says_if_it_was_better_before(tmp_path: Path) -> None:
    late = {"step": 41, "epoch": 4.1, "knn_top1": 0.4, **KNN}
    assert "best 0.5400 at step 40" in shown(report.write(made_run(tmp_path / "run", lines=[*records(), late])))


# ---------------------------------------------------------------- while a run goes on


def test_only_a_page_that_is_written_again_reads_itself_again(tmp_path: Path) -> None:
    going, over = made_run(tmp_path / "going", status="running"), made_run(tmp_path / "over")

    def refreshes(text: str) -> list[str | None]:
        return [meta["content"] for meta in Reader(text).all("meta") if meta.get("http-equiv") == "refresh"]

    assert refreshes(report.write(going, reload=5).read_text(encoding="utf-8")) == ["5"]
    assert refreshes(report.write(going).read_text(encoding="utf-8")) == []
    assert refreshes(report.write(over, reload=5).read_text(encoding="utf-8")) == []


def test_watching_follows_a_run_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", status="running")
    out = tmp_path / "page.html"
    written, waits = [], []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        written.append(out.read_text(encoding="utf-8"))
        if len(waits) == 2:  # nothing happens during the first wait
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 41, "epoch": 4.1, "brand_new": 1.0}\n')
        if len(waits) == 4:
            (run / "status.json").write_text('{"status": "done", "step": 41, "of": 41}', encoding="utf-8")

    monkeypatch.setattr(report.time, "sleep", wait)
    report.show(run, out, watch=2.5)
    assert waits == [2.5] * 4
    assert written[0] == written[1], "nothing was written while nothing happened"
    assert "brand_new" not in written[1]
    assert "brand_new" in written[2]
    assert all('http-equiv="refresh" content="3"' in text for text in written)
    last = out.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in last
    assert "step 41 of 41" in last
    assert capsys.readouterr().out.startswith(f"{out}: open it in a browser\n")


def test_ctrl_c_leaves_a_page_that_no_longer_reads_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", wait)
    run = made_run(tmp_path / "run", status="running")
    report.show(run, watch=1)
    assert 'http-equiv="refresh"' not in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_is_over_is_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.time, "sleep", lambda seconds: pytest.fail("waited"))
    report.show(made_run(tmp_path / "run"), watch=1)


def test_a_page_needs_no_torch() -> None:
    code = "import sys, sslkit.report; print({'plotly', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


# ---------------------------------------------------------------- the observer


def ended(run: Path, monkeypatch: pytest.MonkeyPatch, status: str, *, step: int = 40, fails: bool = False,
          measures: bool = True) -> tuple[list[str], int]:  # fmt: skip
    """What the observer says at the end of a run, and how many snapshots it took."""
    said: list[str] = []
    taken = []

    def take(run: object) -> dict[str, Any]:
        taken.append(run)
        if fails:
            raise RuntimeError("out of memory\nand more")
        return a_snapshot()

    monkeypatch.setattr(snapshot, "take", take)
    info = SimpleNamespace(total_steps=40)
    seen = SimpleNamespace(directory=run, step=step, info=info, say=said.append)
    observer = ReportObserver(measures)
    observer.epoch_ended(seen)  # type: ignore[arg-type]
    observer.run_ended(seen, status)  # type: ignore[arg-type]
    return said, len(taken)


@pytest.mark.parametrize(
    ("status", "step", "number"),
    [("done", 40, 1), ("stopped", 20, 1), ("failed", 20, 0), ("interrupted", 20, 0), ("preempted", 20, 0),
     ("stopped", 0, 0)],
)  # fmt: skip
def test_a_run_with_time_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, step: int, number: int
) -> None:
    run = made_run(tmp_path / "run")
    (run / "snapshot.json").unlink()
    said, taken = ended(run, monkeypatch, status, step=step)
    assert taken == number
    assert said == [f"report: {run / 'report.html'}"]
    assert (run / "snapshot.json").is_file() == bool(number)


def test_a_snapshot_that_fails_costs_neither_page_nor_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(tmp_path / "run")
    said, taken = ended(run, monkeypatch, "done", fails=True)
    assert said == ["no snapshot of the features: RuntimeError: out of memory", f"report: {run / 'report.html'}"]
    assert taken == 1


def test_a_page_that_fails_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = ended(tmp_path / "gone", monkeypatch, "failed", step=20)
    assert len(said) == 1
    assert said[0].startswith("the report was not written: ")


def test_without_a_snapshot_the_features_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(made_run(tmp_path / "run"), monkeypatch, "done", measures=False)[1] == 0
