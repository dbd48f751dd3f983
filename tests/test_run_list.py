from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, run
from hypothesis import given
from hypothesis import strategies as st

from sslkit.compare_groups import ABSENT
from sslkit.recipe import parse_recipe
from sslkit.run_list import age, aligned, listed

GOLDEN = ROOT / "tests" / "golden"


def made(path: Path, status: dict[str, Any] | None = None, accuracies: tuple[float, ...] = (0.1, 0.5)) -> Path:
    """Writes a run directory as a run would have."""
    path.mkdir(parents=True)
    (path / "recipe.lock.toml").write_text(parse_recipe(TINY, "tiny.toml").to_toml(), encoding="utf-8")
    records = [{"step": 10 * n, "epoch": 1.0 * n, "knn_top1": value} for n, value in enumerate(accuracies)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    told = {"status": "done", "step": 20, "of": 20, "time": "2026-01-01T00:00:00+00:00"} | (status or {})
    (path / "status.json").write_text(json.dumps(told), encoding="utf-8")
    return path


def dead() -> int:
    """The id of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder: Path, *options: str) -> list[str]:
    return [line.split()[0] for line in run("runs", str(folder), *options).output.splitlines()[1:]]


def test_runs_are_listed_with_what_they_say_of_themselves(tmp_path: Path) -> None:
    made(tmp_path / "sweep/lr=0.1/seed-10")
    made(tmp_path / "sweep/lr=0.1/seed-9", {"status": "running", "pid": dead(), "host": socket.gethostname()}, (0.1,))
    made(tmp_path / "alive", {"status": "running", "pid": os.getpid(), "host": socket.gethostname(), "step": 3}, ())
    made(tmp_path / ".hidden/no")
    made(tmp_path / "alive/checkpoints/no")
    lines = run("runs", str(tmp_path)).output.splitlines()
    recipe = parse_recipe(TINY, "tiny.toml")
    assert [line.split("  ")[0].strip() for line in lines] == [
        "run", "alive", "sweep/lr=0.1/seed-9", "sweep/lr=0.1/seed-10",
    ]  # fmt: skip
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:]]
    common = ["tiny", recipe.hash()]
    assert cells[0][1:6] == [*common, "running", "3 of 20", ABSENT]
    assert cells[1][1:6] == [*common, "died", "20 of 20", f"0.1000 → {ABSENT}"]
    assert cells[2][1:6] == [*common, "done", "20 of 20", "0.1000 → 0.5000"]


def test_a_run_of_an_older_version_is_listed() -> None:
    """With its verdict: nothing but files is read."""
    [found] = listed(GOLDEN / "0.1.0")
    assert (found.status, found.recipe, bool(found.verdict)) == ("stopped", "golden", True)
    assert not found.verdict.startswith("cannot")


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "facts.json", "recipe.lock.toml"])
@pytest.mark.parametrize(
    "text", ["", "[]", '{"step": "x", "time": 3, "status": [], "of": true}', "\x00\xff{", '{"a": ']
)
def test_whatever_a_file_holds_the_run_is_listed(tmp_path: Path, name: str, text: str) -> None:
    path = made(tmp_path / "runs/broken")
    made(tmp_path / "runs/sound")
    (path / name).write_text(text, encoding="latin-1")
    result = run("runs", str(tmp_path / "runs"))
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == ["run", "broken", "sound"]


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("metrics.jsonl", 299),
        ("metrics.jsonl", 400),
        ("metrics.jsonl", 5000),
        ("status.json", 400),
        ("facts.json", 400),
    ],
)
def test_a_number_that_no_machine_holds_hides_no_run(tmp_path: Path, name: str, digits: int) -> None:
    path = made(tmp_path / "runs/broken")
    made(tmp_path / "runs/sound")
    before = (path / "metrics.jsonl").read_text() if name == "metrics.jsonl" else ""
    for key in ("step", "of", "pid", "epoch", "knn_top1", "loss", "effective_rank", "steps_per_epoch"):
        told = json.dumps({"status": "running", "step": 30, "epoch": 3.0} | {key: "HUGE"})
        (path / name).write_text(before + told.replace('"HUGE"', "9" * digits), encoding="utf-8")
        result = run("runs", str(tmp_path / "runs"))
        assert result.exit_code == 0
        assert [line.split()[0] for line in result.output.splitlines()] == ["run", "broken", "sound"]
        compared = run("compare", "--group", str(tmp_path / "runs"), "--out", str(tmp_path / "compare.html"))
        assert compared.exit_code == 0, compared.output


def test_a_link_that_leads_out_is_told_in_the_verdict(tmp_path: Path) -> None:
    path = made(tmp_path / "runs/a")
    (path / "metrics.jsonl").unlink()
    (path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    [found] = listed(tmp_path / "runs")
    assert "is a link that leads out of the run's directory" in found.verdict


def test_orders(tmp_path: Path) -> None:
    made(tmp_path / "a", {"status": "done", "time": "2026-01-01T00:00:00+00:00"}, (0.1, 0.3))
    made(tmp_path / "b", {"status": "failed", "time": "2026-01-03T00:00:00+00:00"}, (0.1, 0.9))
    made(tmp_path / "c", {"status": "stopped", "time": "2026-01-02T00:00:00+00:00"}, (0.95,))
    assert names(tmp_path) == ["a", "b", "c"]
    assert names(tmp_path, "--sort", "knn") == ["b", "a", "c"], "the random network's accuracy is no result"
    assert names(tmp_path, "--sort", "age") == ["b", "c", "a"]
    assert names(tmp_path, "--sort", "status") == ["b", "c", "a"]


def test_as_json(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    [found] = json.loads(run("runs", str(tmp_path), "--json").output)
    recipe = parse_recipe(TINY, "tiny.toml")
    assert found.pop("verdict")
    assert found == {
        "name": "a", "directory": str(path), "recipe": "tiny", "hash": recipe.hash(), "seed": 0, "status": "done",
        "step": 20, "of": 20, "knn_floor": 0.1, "knn": 0.5, "time": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert json.loads(run("runs", str(tmp_path / "empty"), "--json").output) == []


def test_a_run_itself_is_listed_too(tmp_path: Path) -> None:
    assert [found.name for found in listed(made(tmp_path / "a"))] == ["a"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("none", "is not there; give the folder"), ("file", "is a file; give the folder"), ("empty", "there is no run")],
)
def test_a_folder_without_runs_is_a_line(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    result = run("runs", str(tmp_path / name))
    assert result.exit_code == 2
    assert result.output.startswith(f"{tmp_path / name}: {said}")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("past", "said"),
    [({"seconds": -5}, "0 s"), ({"seconds": 59}, "59 s"), ({"minutes": 59, "seconds": 59}, "59 min"),
     ({"hours": 23}, "23 h"), ({"days": 400}, "400 d")],
)  # fmt: skip
def test_ages(past: dict[str, int], said: str) -> None:
    assert age(timedelta(**past)) == said


@given(st.lists(st.lists(st.text(max_size=5), min_size=3, max_size=3), min_size=1))
def test_columns_are_below_one_another(rows: list[list[str]]) -> None:
    lines = aligned(rows)
    assert len(lines) == len(rows)
    assert all(line.isprintable() for line in lines)
    width = len(max((line for line in aligned([[row[0], "|", ""] for row in rows])), key=len)) - 1
    assert all(line.rindex("|") == width for line in aligned([[row[0], "|", ""] for row in rows]))


def test_no_torch_is_imported(tmp_path: Path) -> None:
    made(tmp_path / "a")
    code = f"import sys; from sslkit import run_list; run_list.show({str(tmp_path)!r}, sort='age', as_json=False); " \
           "heavy = {'torch', 'numpy'} & set(sys.modules); assert not heavy, heavy"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
