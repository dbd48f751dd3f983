from __future__ import annotations

import json
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st

from sslkit.compare import DRAWN, accuracies, charts, compare, losses, options, ranks
from sslkit.compare import summary as summary_of
from sslkit.errors import UserError
from sslkit.recipe import parse_recipe
from sslkit.recorded import ABSENT, PROTOCOL, Run, expanded, names, natural
from sslkit.recorded import read_runs as read

KNN = {"knn_k": 20, "knn_temperature": 0.1, "knn_bank": 200, "knn_queries": 100}
RECORDS: list[dict[str, Any]] = [
    {"step": 0, "epoch": 0.0, "knn_top1": 0.25, **KNN},
    {"step": 1, "epoch": 0.1, "loss": 4.0, "cosine": 0.0, "lr": 0.0, "tau": 0.9, "std_sqrt_d": 0.99},
    {"step": 10, "epoch": 1.0, "loss": 2.5, "cosine": 0.4, "lr": 0.1, "tau": 0.95, "std_sqrt_d": 0.98},
    {"step": 10, "epoch": 1.0, "effective_rank": 12.34, "effective_rank_share": 0.5},
    {"step": 10, "epoch": 1.0, "knn_top1": 0.5, **KNN},
]
Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Writes a run directory as a run would have."""

    def write(
        name: str,
        *overrides: str,
        records: list[dict[str, Any]] | None = None,
        status: str = "done",
        data: str = "abc",
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        recipe = parse_recipe(TINY, "tiny.toml", overrides)
        (path / "recipe.lock.toml").write_text(recipe.to_toml(), encoding="utf-8")
        lines = [json.dumps(record) + "\n" for record in (RECORDS if records is None else records)]
        (path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        (path / "status.json").write_text(json.dumps({"status": status, "step": 0, "of": 20}), encoding="utf-8")
        (path / "env.json").write_text(json.dumps({"data_fingerprint": data}), encoding="utf-8")
        return path

    return write


def summary(*paths: Path) -> list[dict[str, str]]:
    table = summary_of(read(paths))
    return [dict(zip(table.headers, row, strict=True)) for row in table.rows]


def without(*keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in keys} for record in RECORDS]


# ---------------------------------------------------------------- the whole page


def test_a_page_shows_the_runs(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare.html"
    compare([made("one"), str(made("two", "seed=1"))], out)
    text = out.read_text(encoding="utf-8")
    for shown in ("2 runs compared", "one", "two", "0.2500 → 0.5000", "4.0000 → 2.5000", "kNN accuracy (top-1)"):
        assert shown in text
    assert "do not compare" not in text
    assert capsys.readouterr().out == f"{out}: 2 runs, kNN top-1: one 0.2500 → 0.5000, two 0.2500 → 0.5000\n"


def test_what_does_not_compare_is_said_on_the_page_and_on_the_terminal(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.html"
    compare([made("one"), made("two", "loss.form=simsiam", data="other")], out)
    text = unescape(out.read_text(encoding="utf-8"))
    runs = read([tmp_path / "one", tmp_path / "two"])
    for warning in (losses(runs), accuracies(runs), ranks(runs)):
        assert warning
        assert text.count(warning) == 2, "below the table, and at the chart"
    assert accuracies(runs) in capsys.readouterr().out


def test_a_directory_named_like_a_script_is_text(made: Made, tmp_path: Path) -> None:
    evil = "<script>alert(1)<"
    out = tmp_path / "compare.html"
    compare([made(evil), made("plain")], out)
    text = out.read_text(encoding="utf-8")
    assert evil not in text
    assert escape(evil) in text


def test_one_run_is_a_page_too(made: Made, tmp_path: Path) -> None:
    compare([made("alone")], tmp_path / "compare.html")
    assert "<h1>alone</h1>" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_a_run_that_goes_on_is_read_to_its_last_whole_line(made: Made, tmp_path: Path) -> None:
    path = made("going", status="running")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "epoch": 1.1, "lo')
    [row] = summary(path)
    assert row["status"] == "running"
    assert row["step"] == "10 of 20"
    compare([path], tmp_path / "compare.html")


def test_a_page_is_written_again(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    path = made("run")
    compare([path], out)
    before = out.read_text(encoding="utf-8")
    (path / "status.json").write_text('{"status": "failed", "step": 10, "of": 20}', encoding="utf-8")
    compare([path], out)
    assert ">failed</td>" in out.read_text(encoding="utf-8")
    assert ">failed</td>" not in before


# ---------------------------------------------------------------- what cannot be compared


def refused(*paths: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(paths)
    assert all("\n" not in line for line in caught.value.lines)
    return str(caught.value)


def test_a_path_that_is_not_there_names_the_nearest(made: Made, tmp_path: Path) -> None:
    made("tau_cosine")
    said = refused(tmp_path / "tau_cosin")
    assert said.startswith(f"{tmp_path}/tau_cosin: is not there; did you mean 'tau_cosine'?; give a run directory")


def test_a_file_is_no_run(made: Made) -> None:
    assert "is a file; give a run directory" in refused(made("run") / "metrics.jsonl")


def test_a_folder_stands_for_the_runs_below_it(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [made(f"runs/{name}") for name in ("b", "a/seed-10", "a/seed-9", ".hidden/c", "b/checkpoints/d")]
    assert expanded([tmp_path / "runs", tmp_path / "none"]) == ([paths[2], paths[1], paths[0], tmp_path / "none"], [])
    young = made("runs/young", records=[])
    compare([tmp_path / "runs"], tmp_path / "compare.html")
    said = capsys.readouterr().out
    assert f"{young}: is left out, since it has no metrics yet" in said
    assert "3 runs, kNN top-1: seed-9 0.2500" in said
    assert f"{paths[0]}: is given twice" in refused(*expanded([tmp_path / "runs", paths[0]])[0])


def test_numbers_sort_by_what_they_are() -> None:
    names = ["b-1", "a-10", "b", "a-9", "a-0.1", "a-1", "a-0.03", "a-1e-05"]
    assert sorted(names, key=natural) == ["a-1e-05", "a-0.03", "a-0.1", "a-1", "a-9", "a-10", "b", "b-1"]


def test_a_folder_without_runs_says_what_one_looks_like(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith("give one such as runs/NAME")


@pytest.mark.parametrize("text", [None, "", '{"step": 0, "ep', "3\n", '{"loss": 1.0}\n'])
def test_a_run_without_metrics_is_told_to_wait(made: Made, text: str | None) -> None:
    path = made("young")
    (path / "metrics.jsonl").unlink()
    if text is not None:
        (path / "metrics.jsonl").write_text(text)
    assert refused(path) == f"{path}: has no metrics yet; wait for the first ones, or leave it out"


def test_a_run_given_twice_is_refused(made: Made, tmp_path: Path) -> None:
    path = made("run")
    assert "is given twice" in refused(path, tmp_path / "." / "x" / ".." / "run")
    assert refused(path, path) == f"{path}: is given twice"


def test_all_mistakes_are_told_at_once(made: Made, tmp_path: Path) -> None:
    lines = refused(tmp_path / "a", made("good"), tmp_path / "b").splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("name", ["metrics.jsonl", "compare", "compare.html.txt"])
def test_out_has_to_be_a_page_so_that_no_other_file_is_overwritten(made: Made, tmp_path: Path, name: str) -> None:
    path = made("run")
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"--out .*should end in \.html"):
        compare([path], path / name)
    assert (path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("place", ["missing/compare.html", "folder.html"])
def test_a_place_that_cannot_be_written_is_one_line(made: Made, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match=r"^--out .*cannot be written: .*; choose another place$"):
        compare([made("run")], tmp_path / place)


# ---------------------------------------------------------------- names


def test_runs_of_one_name_are_told_apart_by_their_folders(made: Made) -> None:
    runs = read([made("a/run"), made("b/run"), made("b/other")])
    assert [run.name for run in runs] == ["a/run", "b/run", "other"]
    assert [row[0] for row in summary_of(runs).rows] == ["a/run", "b/run", "other"]


def test_only_as_many_folders_are_shown_as_are_needed() -> None:
    assert names([Path("/x/a/run"), Path("/y/a/run"), Path("/run")]) == ["x/a/run", "y/a/run", "/run"]


def test_what_cannot_be_printed_is_spelt_out() -> None:
    assert names([Path("/r/\x1b[31mred"), Path("/r/\udc80"), Path("/r/größe")]) == ["\\x1b[31mred", "\\udc80", "größe"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), unique_by=tuple, min_size=1, max_size=6))
def test_every_run_has_a_name_of_its_own_that_ends_its_path(parts: list[list[str]]) -> None:
    places = [Path("/", *folders) for folders in parts]
    found = names(places)
    assert len(set(found)) == len(places)
    for name, place in zip(found, places, strict=True):
        assert f"/{place.as_posix()}".endswith(f"/{name}")


# ---------------------------------------------------------------- the table of runs


def test_a_row_says_where_figures_began_and_stand(made: Made) -> None:
    path = made("run")
    [row] = summary(path)
    recipe = parse_recipe((path / "recipe.lock.toml").read_text(), "recipe.lock.toml")
    assert row == {
        "run": "run", "recipe": "tiny", "hash": recipe.hash(), "step": "10 of 20", "status": "done",
        "loss": "4.0000 → 2.5000", "kNN top-1": "0.2500 → 0.5000",
        "kNN protocol": "k 20, T 0.1, bank 200, 100 queries", "effective rank": "12.3", "tau": "0.9 → 0.95",
    }  # fmt: skip


def test_only_the_random_network_is_a_floor(made: Made) -> None:
    """A run that was measured first after some training has none."""
    [late] = summary(made("late", records=RECORDS[1:]))
    assert late["kNN top-1"] == f"{ABSENT} → 0.5000"
    [early] = summary(made("early", records=RECORDS[:2]))
    assert early["kNN top-1"] == f"0.2500 → {ABSENT}"


def test_what_a_run_did_not_record_is_a_dash(made: Made) -> None:
    path = made("bare", records=[{"step": 1, "epoch": 0.1, "grad_norm": 1.0}])
    (path / "status.json").unlink()
    [row] = summary(path)
    assert row["step"] == f"1 of {ABSENT}"
    assert {row[key] for key in ("status", "loss", "kNN top-1", "kNN protocol", "effective rank", "tau")} == {ABSENT}


def test_a_run_measured_with_two_protocols_shows_both(made: Made) -> None:
    other = {**RECORDS[-1], "knn_k": 5}
    path = made("run", records=[*RECORDS, {**other, "step": 20, "epoch": 2.0}])
    [row] = summary(path)
    assert row["kNN protocol"] == "k 20, T 0.1, bank 200, 100 queries; k 5, T 0.1, bank 200, 100 queries"
    assert "protocols" in accuracies(read([path]))


def test_a_recipe_that_cannot_be_read_here_leaves_the_curves(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plugin is gone, or an option was renamed since."""
    path = made("old")
    lock = path / "recipe.lock.toml"
    lock.write_text(lock.read_text().replace('use = "cosine"\nform', 'use = "gone"\nform'))
    compare([path, made("new")], tmp_path / "compare.html")
    said = capsys.readouterr().out
    assert "old: its recipe cannot be read here: " in said
    assert "gone" in said
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "its recipe cannot be read here" in text
    row, _ = summary(path, tmp_path / "new")
    assert (row["recipe"], row["hash"], row["loss"]) == (ABSENT, ABSENT, "4.0000 → 2.5000")


# ---------------------------------------------------------------- the table of options


def differing(*paths: Path) -> list[list[str]]:
    [table] = options(read(paths))
    assert table.headers == ["option", *(path.name for path in paths)]
    return [list(row) for row in table.rows]


def test_the_options_that_differ_have_a_row_each(made: Made) -> None:
    rows = differing(made("a"), made("b", "seed=3", "optimizer.lr.peak=0.2"), made("c", "seed=3"))
    assert rows == [["seed", "0", "3", "3"], ["optimizer.lr.peak", "0.1", "0.2", "0.1"]]


def test_a_schedule_beside_a_number_is_one_value(made: Made) -> None:
    [row] = differing(made("cosine"), made("constant", "target_updater.tau=0.95"))
    assert row == ["target_updater.tau", '{ use = "cosine", start = 0.9, end = 1.0 }', "0.95"]


def test_a_component_that_is_not_there_has_no_options(made: Made) -> None:
    rows = differing(made("a"), made("b", "optimizer.use=adamw", "optimizer.lr=0.1"))
    assert ["optimizer.use", '"sgd"', '"adamw"'] in rows
    assert ["optimizer.momentum", "0.9", "unset"] in rows


def test_what_changes_nothing_that_is_computed_is_left_out(made: Made) -> None:
    paths = made("a"), made("b", "train.log_every=7", "name=other")
    assert differing(*paths) == []
    [table] = options(read(paths))
    assert table.text == "None of those that change what is computed."


def test_one_run_differs_from_nothing(made: Made) -> None:
    assert options(read([made("a")])) == []


# ---------------------------------------------------------------- what does not compare


def test_like_runs_compare(made: Made) -> None:
    runs = read([made("a"), made("b", "seed=1", "target_updater.tau=0.9", "optimizer.lr.peak=0.2")])
    assert (losses(runs), accuracies(runs), ranks(runs)) == ("", "", "")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("loss.form=simsiam", "the options of loss"),
        ("view_generator.contrast=0.1", "the options of view_generator"),
        ("predictor.use=identity", "predictor (mlp, identity)"),
        ("projector.out_dim=4", "the options of projector"),
    ],
)
def test_losses_of_different_tasks_do_not_compare(made: Made, override: str, named: str) -> None:
    runs = read([made("a"), made("b", override)])
    assert losses(runs) == f"Losses do not compare: the runs differ in {named}. The easier task has the lower loss."
    assert losses([runs[0]]) == ""


def test_all_that_differs_is_named(made: Made) -> None:
    runs = read([made("a"), made("b", "loss.form=simsiam", "view_generator.contrast=0.1", "predictor.use=identity")])
    assert "the options of loss, the options of view_generator and predictor (mlp, identity)." in losses(runs)


@pytest.mark.parametrize("key", PROTOCOL)
def test_accuracies_of_different_protocols_do_not_compare(made: Made, key: str) -> None:
    records = [{**record, key: 7} if key in record else record for record in RECORDS]
    runs = read([made("a"), made("b", records=records)])
    assert accuracies(runs) == "kNN accuracies do not compare: they were measured with different protocols."


def test_accuracies_on_different_data_do_not_compare(made: Made) -> None:
    runs = read([made("a"), made("b", data="other")])
    assert accuracies(runs).endswith("measured with different data (data_fingerprint in env.json).")


def test_data_that_nothing_is_known_of_are_not_called_different(made: Made) -> None:
    path = made("b")
    (path / "env.json").unlink()
    assert accuracies(read([made("a"), path])) == ""


def test_runs_without_an_accuracy_are_named(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = [made(name, records=without("knn_top1", *PROTOCOL)) for name in "bc"]
    compare([made("a"), *bare], tmp_path / "all.html")
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{tmp_path / 'all.html'}: 3 runs, kNN top-1: a 0.2500 → 0.5000", "no kNN accuracy was recorded of b, c",
    ]  # fmt: skip
    compare(bare, tmp_path / "none.html")
    assert capsys.readouterr().out == f"{tmp_path / 'none.html'}: 2 runs\n"


def test_a_run_without_accuracies_does_not_count(made: Made) -> None:
    records = without("knn_top1", *PROTOCOL)
    assert accuracies(read([made("a"), made("b", records=records, data="other")])) == ""


@pytest.mark.parametrize("override", ["loss.form=simsiam", "backbone.widths=[8, 16]"])
def test_ranks_of_different_methods_or_backbones_do_not_compare(made: Made, override: str) -> None:
    assert "Effective ranks do not compare" in ranks(read([made("a"), made("b", override)]))


# ---------------------------------------------------------------- curves


def drawn(*runs: Run) -> dict[str, list[str]]:
    return {chart.title: [curve.name for curve in chart.curves] for chart in charts(runs, {})}


def test_what_some_run_recorded_is_drawn_in_the_order_of_the_list(made: Made) -> None:
    simsiam = [{key: value for key, value in record.items() if key != "tau"} for record in RECORDS]
    runs = read([made("byol"), made("simsiam", records=simsiam)])
    found = drawn(*runs)
    assert list(found) == [title for title, _ in DRAWN.values()]
    assert found.pop("tau") == ["byol"]
    assert all(curves == ["byol", "simsiam"] for curves in found.values())
    assert "tau" not in drawn(runs[1])


def test_a_curve_has_the_figures_of_the_file(made: Made) -> None:
    [run] = read([made("a")])
    curve = run.curve("loss")
    assert (curve.steps, curve.epochs, curve.values) == ([1, 10], [0.1, 1.0], [4.0, 2.5])


@pytest.mark.parametrize("value", [None, float("nan"), "high", True])
def test_what_is_no_number_is_a_gap_and_in_no_table(made: Made, value: object) -> None:
    record = {"step": 12, "epoch": 1.2, "loss": value}
    path = made("a", records=[*RECORDS, record])
    [run] = read([path])
    assert run.curve("loss").values == [4.0, 2.5, None]
    assert summary(path)[0]["loss"] == "4.0000 → 2.5000"


def test_what_is_drawn_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    for key in (*DRAWN, *PROTOCOL):
        assert f"| `{key}` |" in page
