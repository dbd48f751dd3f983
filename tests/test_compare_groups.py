"""Runs that differ in their seed alone, drawn as one."""

from __future__ import annotations

import json
import re
import socket
import statistics
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, run
from hypothesis import given
from hypothesis import strategies as st
from test_report_browser import PHONE, Opened, opened, until  # noqa: F401 - a fixture

from sslkit.charts import Curve, Drawings, thinned
from sslkit.compare import compare
from sslkit.compare_groups import ABSENT, Group, grouped, spread, summary
from sslkit.recipe import parse_recipe
from sslkit.recorded import read_runs

Made = Callable[..., Path]
KNN = {"knn_k": 20, "knn_temperature": 0.1, "knn_bank": 200, "knn_queries": 100}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Writes a run directory as a run would have; its accuracies are ten steps apart."""

    def write(name: str, *overrides: str, knn: Sequence[Any] = (0.1, 0.5), data: str = "abc", **status: Any) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "recipe.lock.toml").write_text(parse_recipe(TINY, "tiny.toml", overrides).to_toml(), encoding="utf-8")
        records = [
            {"step": 10 * n, "epoch": 1.0 * n, "knn_top1": value, "loss": 4.0 - n, **KNN} for n, value in enumerate(knn)
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        (path / "status.json").write_text(json.dumps({"status": "done", "of": 20} | status), encoding="utf-8")
        (path / "env.json").write_text(json.dumps({"data_fingerprint": data}), encoding="utf-8")
        return path

    return write


def groups(*paths: Path) -> list[Group]:
    return grouped(read_runs(paths))


def members(found: Sequence[Group]) -> dict[str, list[str]]:
    return {group.name: [one.name for one in group.runs] for group in found}


# ---------------------------------------------------------------- who belongs together


def test_runs_that_differ_in_their_seed_alone_are_a_group(made: Made) -> None:
    paths = [
        made("s/peak=0.1/seed-0"), made("s/peak=0.1/seed-1", "seed=1", "train.log_every=7", "name=other"),
        made("s/peak=0.2/seed-0", "optimizer.lr.peak=0.2"),
        made("s/peak=0.2/seed-1", "optimizer.lr.peak=0.2", "seed=1"),
        made("alone", "loss.form=simsiam"),
    ]  # fmt: skip
    assert members(groups(*paths)) == {
        "peak=0.1": ["peak=0.1/seed-0", "peak=0.1/seed-1"], "peak=0.2": ["peak=0.2/seed-0", "peak=0.2/seed-1"],
        "alone": ["alone"],
    }  # fmt: skip


def test_runs_on_other_data_are_another_group(made: Made) -> None:
    found = groups(made("a"), made("b", "seed=1"), made("c", "seed=2", data="other"))
    assert members(found) == {"a and 1 more": ["a", "b"], "c": ["c"]}


def test_a_recipe_that_cannot_be_read_is_alone(made: Made) -> None:
    paths = [made("a"), made("b"), made("c")]
    for path in paths[:2]:
        lock = path / "recipe.lock.toml"
        lock.write_text(lock.read_text().replace('use = "cosine"\nform', 'use = "gone"\nform'))
    assert members(groups(*paths)) == {"a": ["a"], "b": ["b"], "c": ["c"]}


def test_every_group_has_a_name_of_its_own(made: Made) -> None:
    """Two sweeps have folders of the same names."""
    paths = [made(f"{s}/x/seed-{n}", f"seed={n}", f"optimizer.lr.peak={s}") for s in (1, 2) for n in (0, 1)]
    assert members(groups(*paths)) == {
        "1/x/seed-0 and 1 more": ["1/x/seed-0", "1/x/seed-1"], "2/x/seed-0 and 1 more": ["2/x/seed-0", "2/x/seed-1"],
    }  # fmt: skip


# ---------------------------------------------------------------- mean and spread


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=2, max_size=6),
)
def test_mean_and_band_are_numpys(values: list[list[float]]) -> None:
    from sslkit.recorded import Run

    runs = [
        Run(f"{n}", [{"step": i, "epoch": i / 2, "x": x} for i, x in enumerate(row)], {"status": "done"}, None, None)
        for n, row in enumerate(values)
    ]
    curve = Group("g", runs).curve("x")
    matrix = np.array(values)
    mean, sd = matrix.mean(axis=0), matrix.std(axis=0, ddof=1)
    assert (curve.steps, curve.epochs) == ([0, 1, 2], [0.0, 0.5, 1.0])
    np.testing.assert_allclose(np.array(curve.values, dtype=float), mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.array(curve.band, dtype=float), np.stack([mean - sd, mean + sd], 1), atol=1e-12)
    assert Group("g", runs).last("x", ".6f") == f"{mean[-1]:.6f} ± {sd[-1]:.6f} (n {len(values)})"


def test_the_spread_is_that_of_a_sample() -> None:
    values = [0.5, 0.7, 0.9]
    assert spread(values) == f"0.7000 ± {statistics.stdev(values):.4f} (n 3)"
    assert spread(values[:1], ".1f") == "0.5 (n 1)"
    assert spread([]) == ABSENT


def test_copies_of_a_run_are_one_draw(made: Made) -> None:
    """Else the spread of one run, copied, would be nought. The copy that got furthest counts."""
    [group] = groups(
        made("g/a", knn=(0.1, 0.5)), made("g/b", knn=(0.1, 0.6, 0.7)), made("g/c", "seed=1", knn=(0.1, 0.4, 0.5)),
        made("g/d", "seed=1", knn=(0.1, 0.9), status="failed"),
    )  # fmt: skip
    assert group.accuracy() == f"0.1000 → {spread([0.7, 0.5])}"
    assert group.problems() == [
        "g: a is left out of the mean: its seed is that of b, so it is no other draw",
        "g: d is left out of the mean: it failed at step 10",
    ]
    [row] = summary([group]).rows
    assert row[1] == "2 of 4"
    [copies] = groups(made("h/a"), made("h/b"))
    assert copies.accuracy() == "0.1000 → 0.5000 (n 1)"
    assert copies.curve("loss").band == ()


def test_a_single_run_has_no_band_and_no_spread(made: Made) -> None:
    [group] = groups(made("a"))
    assert group.curve("knn_top1") == Curve("a", [0, 10], [0.0, 1.0], [0.1, 0.5], ())
    assert group.accuracy() == "0.1000 → 0.5000 (n 1)"


def test_a_mean_is_of_all_runs_or_there_is_none(made: Made) -> None:
    """Else it would jump where one run leaves."""
    [group] = groups(made("g/a", knn=(0.1, 0.5, 0.9)), made("g/b", "seed=1", knn=(0.3, None)))
    assert group.curve("knn_top1").values == [0.2, None]
    assert group.curve("loss").values == [4.0, 3.0]
    assert (group.reached, group.accuracy()) == (10, f"{'0.2000'} → {ABSENT}")
    assert group.problems() == ["g: is drawn up to step 10, where b stands"]


@pytest.mark.parametrize(
    ("status", "how"),
    [({"status": "failed"}, "failed"), ({"status": "lost"}, "was ended"),
     ({"status": "running", "pid": 2**22 + 1, "host": socket.gethostname()}, "died")],
)  # fmt: skip
def test_a_run_that_ended_early_is_left_out_and_named(made: Made, status: dict[str, Any], how: str) -> None:
    [group] = groups(made("g/a", knn=(0.1, 0.5, 0.9)), made("g/b", "seed=1", knn=(0.3,), **status))
    assert group.curve("knn_top1").values == [0.1, 0.5, 0.9]
    assert group.problems() == [f"g: b is left out of the mean: it {how} at step 0"]
    [row] = summary([group]).rows
    assert row[:4] == ["g", "1 of 2", "20", "0.1000 → 0.9000 (n 1)"]
    [alone] = groups(made("c", knn=(0.3, 0.4), **status))
    assert alone.curve("knn_top1").values == [0.3, 0.4], "there is nothing else to show"


def test_a_step_that_was_recorded_twice_counts_once(made: Made) -> None:
    path = made("a")
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "epoch": 1.0, "knn_top1": 0.7}) + "\n")
    [group] = groups(path, made("b", "seed=1"))
    assert group.curve("knn_top1").values == [0.1, 0.6]
    assert group.last("knn_top1", ".1f") == "0.6 ± 0.1 (n 2)"


# ---------------------------------------------------------------- the page


def test_the_page_has_groups_runs_and_no_seed(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for peak in ("0.1", "0.2"):
        for seed in (0, 1):
            made(f"s/peak={peak}/seed-{seed}", f"seed={seed}", f"optimizer.lr.peak={peak}", knn=(0.1, 0.5 + seed / 10))
    out = tmp_path / "compare.html"
    compare([tmp_path / "s"], out, group=True)
    text = unescape(out.read_text(encoding="utf-8"))
    assert capsys.readouterr().out == (
        f"{out}: 4 runs in 2 groups, kNN top-1: peak=0.1 0.1000 → 0.5500 ± 0.0707 (n 2), "
        "peak=0.2 0.1000 → 0.5500 ± 0.0707 (n 2)\n"
    )
    for shown in ("<h2>Groups</h2>", "<h2>Runs</h2>", "peak=0.1/seed-1", "optimizer.lr.peak", "0.5500 ± 0.0707 (n 2)"):
        assert shown in text
    assert '<th scope="row">seed</th>' not in text
    assert re.findall(r'<button type="button" aria-pressed="true" data-curve="(\d)">', text) == ["0", "1"]


def test_what_is_left_out_is_said_on_the_page_and_on_the_terminal(made: Made, tmp_path: Path) -> None:
    made("s/a")
    made("s/b", "seed=1", knn=(0.3,), status="failed")
    result = run("compare", "--group", str(tmp_path / "s"), "--out", str(tmp_path / "compare.html"))
    said = "s: b is left out of the mean: it failed at step 0"
    assert result.exit_code == 0
    assert result.output.splitlines()[1] == said
    assert (tmp_path / "compare.html").read_text(encoding="utf-8").count(said) == 1


# ---------------------------------------------------------------- bands


def test_a_band_goes_out_below_and_back_above_and_leaves_gaps() -> None:
    from sslkit.charts import Chart

    curve = Curve("<b>", [0, 10, 20, 30], [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, None, 4.0],
                  [(0.5, 1.5), (1.5, 2.5), None, (3.5, 4.5)])  # fmt: skip
    drawn = Drawings()
    drawn.chart(Chart("t", "m", [curve]), ["other", "<b>"])
    [figure] = json.loads(drawn.data)
    band, line = figure["data"]
    assert band["y"] == [0.5, 1.5, 2.5, 1.5, None, 3.5, 4.5, None]
    assert band["x"] == [0.0, 1.0, 1.0, 0.0, None, 3.0, 3.0, None]
    assert band["customdata"] == [0, 10, 10, 0, None, 30, 30, None]
    assert (band["meta"], line["meta"], band["fill"], band["hoverinfo"]) == (1, 1, "toself", "skip")
    assert band["name"] == "&lt;b&gt;"


def test_a_thinned_curve_keeps_the_band_of_its_points() -> None:
    values = [float(i % 7) for i in range(500)]
    curve = Curve("a", list(range(500)), values, values, [(v - 1, v + 1) for v in values])
    thin = thinned(curve, 50)
    assert len(thin.band) == len(thin.values) <= 50
    assert [(v - 1, v + 1) for v in thin.values if v is not None] == list(thin.band)


@pytest.mark.parametrize("width", [1280, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_a_band_with_its_line(
    made: Made,
    tmp_path: Path,
    opened: Opened,  # noqa: F811
    width: int,
    scheme: str,
) -> None:
    for peak in ("0.1", "0.2"):
        for seed in (0, 1, 2):
            made(f"s/peak={peak}/seed-{seed}", f"seed={seed}", f"optimizer.lr.peak={peak}",
                 knn=(0.1, 0.4 + seed / 10 + float(peak), 0.5 + seed / 20))  # fmt: skip
    out = tmp_path / "compare.html"
    compare([tmp_path / "s"], out, group=True)
    with opened(out, width, scheme) as page:
        filled = "[...plots[1].querySelectorAll('.fills path')].map(p => [getComputedStyle(p).fill, " \
                 "getComputedStyle(p).fillOpacity, p.getBoundingClientRect().height > 5])"  # fmt: skip
        found = page.evaluate(filled)
        assert [shown for _, opacity, shown in found if float(opacity) > 0] == [True, True]
        assert len({fill for fill, _, _ in found}) == 2
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.click('button[data-curve="0"]')
        until(page, "plots[1].data.filter(t => t.visible === false).length === 2")
        assert page.evaluate("plots[1].data.filter(t => t.visible === false).map(t => t.meta)") == [0, 0]
        page.select_option("#over", "steps")
        until(page, "plots[1].data[0].x.includes(20)")
        assert page.evaluate("plots[1].data.map(t => Math.max(...t.x))") == [20] * 4
