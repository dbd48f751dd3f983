"""Several runs of one recipe: which they are, how they are led, and that nothing of them is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import TINY, run
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from sslkit import sweeping
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.run_directory import read_json, read_metrics
from sslkit.sweeping import ended, held, plan, pool, summarise
from sslkit.sweeping.jobs import How, Job, said
from sslkit.sweeping.pool import Task

FAKE = """
import json, os, sys, time
from pathlib import Path
arguments = sys.argv[1:]
sets = dict(arguments[i + 1].split("=", 1) for i, a in enumerate(arguments) if a == "--set")
run = Path(arguments[arguments.index("--run-dir") + 1])
behaviour = os.environ.get("FAKE_" + sets.get("train.batch_size", ""), "")
with open("calls.txt", "a") as calls:
    calls.write(f"begin {run.parent.name}/{run.name} threads {os.environ.get('OMP_NUM_THREADS')}\\n")
if behaviour == "mistake":
    print("recipe.toml:3: optimizer.lr: should be above 0")
    print("  as it says there")
    sys.exit(2)
if behaviour == "killed":
    os.kill(os.getpid(), 9)
if behaviour.startswith("wait"):
    while not Path(behaviour.partition(" ")[2]).exists():
        time.sleep(0.01)
accuracy = 0.5 + 0.1 * int(sets["seed"])
record = {"step": 20, "epoch": 2.0, "knn_top1": accuracy}
(run / "metrics.jsonl").write_text(json.dumps({"step": 0, "epoch": 0.0, "knn_top1": 0.1}) + "\\n" + json.dumps(record))
status = "preempted" if behaviour == "preempted" else "stopped" if "--steps" in arguments else "done"
(run / "status.json").write_text(json.dumps({"status": status, "step": 20, "of": 20}))
(run / "facts.json").write_text("{}")
with open("calls.txt", "a") as calls:
    calls.write(f"end {run.parent.name}/{run.name}\\n")
"""
"""In the place of a training: it leaves what one would."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny recipe in a folder of its own, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def faked(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Trainings are replaced by something that takes no time; gives what was called."""
    (tmp_path / "fake_train.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(pool, "POLL", 0.01)
    plain = Job.task

    def task(job: Job) -> Task:
        made = plain(job)
        return Task(made.name, "fake_train", made.arguments, made.log)

    monkeypatch.setattr(Job, "task", task)

    def calls() -> list[str]:
        path = tmp_path / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    return calls


def sweep(*arguments: str) -> Result:
    return run("sweep", "./tiny.toml", *arguments)


# ---------------------------------------------------------------- what was asked for


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (".03,.06", [".03", ".06"]),
        ("[0.08, 1.0],[0.2, 1.0]", ["[0.08, 1.0]", "[0.2, 1.0]"]),
        ('{ use = "cosine", start = 0.9 }, 0.5', ['{ use = "cosine", start = 0.9 }', "0.5"]),
        ("\"a,b\",'c,d'", ['"a,b"', "'c,d'"]),
        ('"[",x', ['"["', "x"]),
        ("one", ["one"]),
    ],
)
def test_commas_inside_a_value_do_not_divide(text: str, parts: list[str]) -> None:
    assert plan.split(text) == parts


@pytest.mark.parametrize(
    ("written", "plain"),
    [(".03", "0.03"), ("3e-2", "0.03"), ("0.030", "0.03"), ("5.", "5.0"), ("007", "7"), ("-1", "-1"), ("sgd", "sgd"),
     ("1e-5", "1e-05"), ("[1, 2]", "[1, 2]"), ("resnet18", "resnet18")],
)  # fmt: skip
def test_a_number_has_one_spelling_that_toml_reads(written: str, plain: str) -> None:
    assert plan.plain(written) == plain


def test_a_grid_is_all_combinations() -> None:
    grid = plan.read_grid(["optimizer.lr.peak=.1,.2", "loss.form=byol,simsiam,x"])
    found = plan.combinations(grid)
    assert len(found) == 6
    assert found[0] == {"optimizer.lr.peak": "0.1", "loss.form": "byol"}
    assert found[1] == {"optimizer.lr.peak": "0.1", "loss.form": "simsiam"}
    assert len({tuple(values.items()) for values in found}) == 6
    assert plan.combinations({}) == [{}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["optimizer.lr"], "should read KEY=V1,V2"),
        (["=1,2"], "should read KEY=V1,V2"),
        (["a.b=1,,2"], "should read KEY=V1,V2"),
        (["a.b=1", "a.b=2"], "a.b has a --grid already"),
        (["a.b=.1,0.1"], "0.1 is given twice"),
    ],
)
def test_a_grid_that_cannot_be_read_is_a_line(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan.read_grid(options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "optimizer.lr.peak=.1", "--set", "optimizer.lr.peak=.2"], "is given by --set as well"),
        (["--grid", "seed=1,2"], "--grid seed: the seeds of a sweep are the recipe's and those after it; use --seeds"),
        (["--set", "seed=1"], "--set seed: the seeds"),
        (["--grid", "optimizer.lr.pea=.1"], "did you mean"),
        (["--grid", "train.batch_size=1,2"], "train.batch_size"),
        (["--grid", "observers.knn.k=020,20"], "20 is given twice"),
        (["--grid", "loss.form='byol',byol"], "are the same recipe; leave one out"),
        (["--trials", "3"], "--trials: only with --search"),
        (["--by", "lidar"], "--by: only with --search"),
        (["--dir", ""], "--dir is empty"),
        (["--dir", "tiny.toml"], "is a file; choose another --dir"),
    ],
)
def test_a_mistake_is_told_before_anything_begins(recipe: Path, arguments: list[str], said: str) -> None:
    result = sweep(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["tiny.toml"]


def test_a_dry_run_shows_the_runs_and_leaves_nothing(recipe: Path) -> None:
    result = sweep("--grid", "optimizer.lr.peak=.1,.2", "--grid", "loss.form=byol,simsiam", "--seeds", "3", "--dry-run")
    lines = result.output.splitlines()
    assert result.exit_code == 0
    assert len(lines) == 13
    folder = "runs/tiny-sweep/peak=0.1,form=byol/seed-0"
    assert lines[0] == f"{folder}: new; --set optimizer.lr.peak=0.1 --set loss.form=byol --set seed=0"
    assert lines[-1] == "12 runs, 12 to train"
    assert not (recipe.parent / "runs").exists()


def test_a_number_in_the_place_of_a_schedule_is_told(recipe: Path) -> None:
    told = sweep("--grid", "optimizer.lr=.1,.2", "--grid", "loss.form=byol,simsiam", "--dry-run").output.splitlines()
    assert told[0] == (
        "note: optimizer.lr: is one number throughout each run, without the recipe's warmup_cosine; its own numbers "
        "are optimizer.lr.peak, optimizer.lr.warmup_steps, optimizer.lr.start, optimizer.lr.end"
    )
    assert not any(line.startswith("note:") for line in told[1:])
    schedule = '{ use = "cosine", start = 0.9 }'
    other = sweep("--grid", f"optimizer.lr={schedule}", "--set", "optimizer.lr.use=constant", "--dry-run").output
    assert "note:" not in other


def test_seeds_begin_with_the_recipes_own(recipe: Path) -> None:
    recipe.write_text(f"seed = 7\n{TINY}", encoding="utf-8")
    lines = sweep("--seeds", "2", "--dry-run").output.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == [f"runs/tiny-sweep/all/seed-{n}" for n in (7, 8)]


# ---------------------------------------------------------------- folders


def test_a_folder_is_called_by_what_is_needed_of_its_keys() -> None:
    assert plan.folder_name({"optimizer.lr": "0.03"}, []) == "lr=0.03"
    both = {"optimizer.lr.peak": "1", "target_updater.tau.peak": "2"}
    assert plan.folder_name(both, []) == "lr.peak=1,tau.peak=2"
    assert plan.folder_name({"loss.use": "cosine"}, []) == "loss.use=cosine"
    assert plan.folder_name({"view_generator.scale": "[0.08, 1.0]"}, []) == "scale=0.08-1.0"
    assert plan.folder_name({}, []) == "all"


def test_a_folder_that_is_taken_gets_a_number() -> None:
    assert plan.folder_name({"a.b": "x/y"}, ["b=x-y", "b=x-y-2"]) == "b=x-y-3"
    assert plan.folder_name({"a.b": "Y"}, ["b=y"]) == "b=Y-2"


@given(st.lists(st.dictionaries(st.sampled_from(["a.b", "c.b", "d.use"]), st.text(max_size=200), min_size=1)))
def test_every_folder_is_one_that_file_systems_take(combinations: list[dict[str, str]]) -> None:
    taken: list[str] = []
    for values in combinations:
        name = plan.folder_name(values, taken)
        assert len(name) <= 120
        assert not set(name) & set('/\\:*?"<>| \0\n')
        assert name not in (".", "..")
        assert not name.endswith((".", " "))
        assert name.lower() not in {other.lower() for other in taken}
        taken.append(name)


# ---------------------------------------------------------------- the note of a folder


def test_runs_are_led_one_after_another_and_told(recipe: Path, faked: Callable[[], list[str]]) -> None:
    result = sweep("--grid", "train.batch_size=64,128", "--seeds", "2")
    assert result.exit_code == 0, result.output
    names = [f"batch_size={size}/seed-{seed}" for size in (64, 128) for seed in (0, 1)]
    assert [call.split()[:2] for call in faked()] == [[word, name] for name in names for word in ("begin", "end")]
    lines = result.output.splitlines()
    assert lines[0] == "batch_size=64/seed-0: begins"
    assert lines[1].startswith("[1/4] batch_size=64/seed-0: done, kNN top-1 0.1000 -> 0.5000, ")
    assert lines[-3:] == [
        "  batch_size=64   0.5500 ± 0.0707 (n 2)",
        "  batch_size=128  0.5500 ± 0.0707 (n 2)",
        "compare them: sslkit compare --group runs/tiny-sweep",
    ]
    log = (recipe.parent / "runs/tiny-sweep/batch_size=64/seed-0/log.txt").read_text().splitlines()
    assert log[0].endswith("--set train.batch_size=64 --set seed=0 --run-dir "
                           "runs/tiny-sweep/batch_size=64/seed-0 --device auto")  # fmt: skip


def test_a_reader_that_goes_away_does_not_end_it(
    faked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as left:
            main(["sweep", "./tiny.toml", "--grid", "optimizer.lr.peak=0.01,0.02,0.03", "--dir", "sp"])
    assert left.value.code == 0
    assert len([call for call in faked() if call.startswith("end")]) == 3


def test_repeated_it_skips_what_is_done_and_takes_more_values(recipe: Path, faked: Callable[[], list[str]]) -> None:
    sweep("--grid", "train.batch_size=64,128")
    before = len(faked())
    result = sweep("--grid", "train.batch_size=128,64")
    assert result.output.startswith("2 of 2 are finished already\n")
    assert len(faked()) == before
    result = sweep("--grid", "train.batch_size=64,32", "--seeds", "2")
    assert result.output.startswith("1 of 4 is finished already\n")
    assert [call.split()[1] for call in faked()[before::2]] == [
        "batch_size=64/seed-1", "batch_size=32/seed-0", "batch_size=32/seed-1",
    ]  # fmt: skip
    note = read_json(recipe.parent / "runs/tiny-sweep/sweep.json")
    assert list(note["folders"]) == ["batch_size=64", "batch_size=128", "batch_size=32"]


def test_more_steps_go_on_and_fewer_are_done(faked: Callable[[], list[str]]) -> None:
    assert sweep("--steps", "20").exit_code == 0
    assert len(faked()) == 2
    assert "1 of 1 is finished already" in sweep("--steps", "10").output
    assert len(faked()) == 2
    sweep("--steps", "30")
    assert len(faked()) == 4


def test_another_recipe_in_the_folder_is_refused_with_the_difference(
    recipe: Path, faked: Callable[[], list[str]]
) -> None:
    sweep("--grid", "train.batch_size=64,128")
    result = sweep("--grid", "train.batch_size=64,128", "--set", "optimizer.lr.peak=0.2")
    assert result.exit_code == 2
    assert "runs/tiny-sweep: holds a sweep of another recipe; choose another --dir, or undo:" in result.output
    assert "  optimizer.lr.peak: 0.1 -> 0.2" in result.output
    result = sweep("--grid", "loss.form=byol")
    assert result.exit_code == 2
    assert "holds a sweep over train.batch_size, and this one is over loss.form" in result.output
    assert sweep("--grid", "train.batch_size=64", "--set", "train.log_every=3").exit_code == 0, "changes no run"


def test_a_folder_that_no_sweep_made_is_left_alone(recipe: Path, faked: Callable[[], list[str]]) -> None:
    (recipe.parent / "runs/mine").mkdir(parents=True)
    (recipe.parent / "runs/mine/recipe.lock.toml").write_text("")
    result = sweep("--dir", "runs")
    assert (result.exit_code, faked()) == (2, [])
    assert "runs: holds runs and no sweep.json, so it is no sweep's; choose another --dir" in result.output


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"recipe": 3}', '{"path": 1}', "{" * 10_000])
def test_a_note_that_is_spoilt_is_a_line(recipe: Path, faked: Callable[[], list[str]], text: str) -> None:
    (recipe.parent / "bad").mkdir()
    (recipe.parent / "bad/sweep.json").write_text(text)
    result = sweep("--dir", "bad")
    assert result.exit_code == 2
    assert result.output.startswith("bad/sweep.json: ")
    assert result.output.count("choose another --dir") == 1


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"folders": [1]}, "folders"),
        ({"folders": {"batch_size=64": 3}}, "folders.batch_size=64"),
        *(({"folders": {name: {"train.batch_size": "64"}}}, f"folders.{name}")
          for name in ("../../outside", "..", "/tmp/outside", "a/b", "C:outside", "..\\outside", "")),
        ({"keys": [["train.batch_size"]]}, "keys.0"),
        ({"example": {"train.batch_size": None}}, "example.train.batch_size"),
        ({"search": 1}, "search"),
        ({"more": 1}, "more"),
    ],
)  # fmt: skip
def test_a_note_of_a_stranger_is_held_to_its_form(
    recipe: Path, faked: Callable[[], list[str]], changed: dict[str, Any], where: str
) -> None:
    path = recipe.parent / "there/sweep.json"
    path.parent.mkdir()
    note = plan.noted(path.parent, str(recipe), (), ["train.batch_size"], {"train.batch_size": "64"})
    assert note.folder_of({"train.batch_size": "64"}) == "batch_size=64"
    note.write()
    assert sweep("--grid", "train.batch_size=64", "--dir", "there", "--dry-run").exit_code == 0
    path.write_text(json.dumps(read_json(path) | changed))
    result = sweep("--grid", "train.batch_size=64", "--dir", "there")
    assert (result.exit_code, faked()) == (2, [])
    assert result.output.startswith(f"there/sweep.json: cannot be read ({where}")
    assert result.output.endswith("choose another --dir\n")


def test_what_another_sweep_noted_meanwhile_is_kept(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a sweep's first look at the folder and its lock another one comes and goes."""

    @contextmanager
    def after_another(folder: Path) -> Iterator[None]:
        note = plan.noted(folder, str(recipe), (), ["train.batch_size"], {"train.batch_size": "32"})
        note.folder_of({"train.batch_size": "32"})
        with held(folder):
            note.write()
            yield

    monkeypatch.setattr(pool, "run", lambda *_: None)
    monkeypatch.setattr(sweeping, "held", after_another)
    assert sweep("--grid", "train.batch_size=64").exit_code == 0
    note = read_json(recipe.parent / "runs/tiny-sweep/sweep.json")
    assert list(note["folders"]) == ["batch_size=32", "batch_size=64"]


def test_two_sweeps_in_one_folder_are_refused(recipe: Path, tmp_path: Path) -> None:
    with held(tmp_path / "runs"):
        result = sweep("--dir", "runs")
    assert (result.exit_code, result.output) == (
        2, "runs: another sweep goes on here; wait for it, or choose another --dir\n",
    )  # fmt: skip
    with held(tmp_path / "runs"):
        pass


# ---------------------------------------------------------------- runs that end otherwise


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("mistake", "FAILED: recipe.toml:3: optimizer.lr: should be above 0 (all of it: runs/tiny-sweep/"),
        ("killed", "FAILED: killed by SIGKILL; the same command goes on with it"),
        ("preempted", "[0/2] batch_size=64/seed-0: preempted at step 20 of 20; the same command goes on with it"),
    ],
)
def test_a_run_that_ends_otherwise_is_told_and_stops_no_other(
    faked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, behaviour: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_64", behaviour)
    result = sweep("--grid", "train.batch_size=64,128")
    assert result.exit_code == 1
    assert said in result.output
    assert "batch_size=128/seed-0: done" in result.output
    monkeypatch.delenv("FAKE_64")
    result = sweep("--grid", "train.batch_size=64,128")
    assert result.exit_code == 0
    assert "1 of 2 is finished already" in result.output


def test_two_at_a_time_share_the_cores(
    faked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first waits for what the second leaves, so they go on together; the third takes the place that is free."""
    monkeypatch.setenv("FAKE_32", f"wait {tmp_path}/runs/tiny-sweep/batch_size=64/seed-0/status.json")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    assert sweep("--grid", "train.batch_size=32,64,128", "--jobs", "2", "--device", "cpu").exit_code == 0
    begun = [call for call in faked() if call.startswith("begin")]
    assert len(begun) == 3
    assert all(call.endswith("threads 3") for call in begun)


def test_places_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-abc")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in pool.places(3, "auto")] == ["4", "GPU-abc", "4"]
    assert pool.places(2, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 2, "what the user chose stays"
    assert pool.places(1, "cuda") == [{}], "one alone has everything"


def test_a_run_that_another_process_trains_is_waited_for(
    recipe: Path, faked: Callable[[], list[str]], tmp_path: Path
) -> None:
    """As that of a sweep that was killed does, while it saves."""
    folder = tmp_path / "runs/tiny-sweep/batch_size=64/seed-0"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from filelock import FileLock\n"
         "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)\n"
         "while not Path(sys.argv[2]).exists(): __import__('time').sleep(0.01)",
         str(folder / ".lock"), str(tmp_path / "runs/tiny-sweep/batch_size=128/seed-0/status.json")],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        result = sweep("--grid", "train.batch_size=64,128")
    assert result.exit_code == 0
    assert result.output.startswith("batch_size=64/seed-0: another process trains in it; waiting until it has saved\n")
    assert [call.split()[1] for call in faked()[::2]] == ["batch_size=128/seed-0", "batch_size=64/seed-0"]
    with FileLock(folder / ".lock", timeout=0):
        pass


def test_lines_at_the_margin_since_the_last_command_are_what_a_run_said(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"x" * 50_000 + b"\n$ python\nbegun\nwhat \x1b[31mwent\xff wrong\n  because\n\n")
    assert said(log) == ["begun", "what \\x1b[31mwent\ufffd wrong"]
    with log.open("ab") as file:
        file.write(b"$ python\n")
    assert said(log) == said(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("log", "status", "told"),
    [
        (["$ x", "epoch 1", "the loss is not finite", "lower optimizer.lr"], {"message": "the loss is not finite"},
         "the loss is not finite"),
        (["$ x", "the loss is not finite", "$ x", "optimizer.lr: should be above 0"],
         {"message": "the loss is not finite"}, "optimizer.lr: should be above 0"),
        (["$ x", "a line"], {"message": ["a line"]}, "a line"),
        (["$ x"], {}, "ended with 1"),
    ],
)  # fmt: skip
def test_a_run_that_failed_is_told_by_what_happened_not_by_the_advice(
    tmp_path: Path, log: list[str], status: dict[str, Any], told: str
) -> None:
    """`status.json` of an earlier attempt says nothing of this one."""
    (tmp_path / "log.txt").write_text("\n".join(log))
    (tmp_path / "status.json").write_text(json.dumps({"status": "failed", **status}))
    outcome = Job("a/seed-0", tmp_path, (), How("r.toml", (), None, "cpu")).outcome(1)
    assert (outcome.kind, outcome.text) == ("failed", f"{told} (all of it: {tmp_path / 'log.txt'})")


def test_the_random_networks_accuracy_is_nobodys_result(recipe: Path, faked: Callable[[], list[str]]) -> None:
    """As of runs that are too short to be measured again."""
    sweep()
    path = recipe.parent / "runs/tiny-sweep/all/seed-0/metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    assert "kNN" not in sweep().output
    assert Job("all/seed-0", path.parent, (), How("", (), None, "cpu")).figures().startswith(
        "kNN top-1 0.1000 before training, "
    )  # fmt: skip


def test_one_finished_run_is_nothing_to_compare(recipe: Path, faked: Callable[[], list[str]]) -> None:
    assert "compare them" not in sweep().output
    assert "compare them" in sweep("--seeds", "2").output
    status = recipe.parent / "runs/tiny-sweep/all/seed-1/status.json"
    status.write_text(json.dumps({"status": "interrupted", "step": 4, "of": 20}))
    told: list[str] = []
    jobs = [Job(f"all/seed-{n}", status.parent.parent / f"seed-{n}", (), How("", (), None, "cpu")) for n in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslkit.sweeping.tell", told.append)
        summarise(Path("runs/tiny-sweep"), jobs)
    assert [line for line in told if "all" in line] == ["  all  0.5000 (n 1)"]
    assert not any("compare" in line for line in told)


def test_the_exit_code_says_how_it_ended() -> None:
    assert [ended(None, 0), ended(None, 2), ended(signal.SIGINT, 2), ended(signal.SIGTERM, 0)] == [0, 1, 130, 0]


def test_leave_for_local_code_and_the_options_are_passed_on(tmp_path: Path) -> None:
    job = Job("a/seed-1", tmp_path, ("x.y=a b", "seed=1"), How("r.toml", ("x.y=a b",), 5, "cpu"))
    assert job.task().arguments == [
        "train", "r.toml", "--set", "x.y=a b", "--set", "seed=1", "--run-dir", str(tmp_path), "--device", "cpu",
        "--steps", "5",
    ]  # fmt: skip
    from sslkit import local

    with local.allowed():
        assert job.task().arguments[-1] == "--allow-local-code"


# ---------------------------------------------------------------- signals

SLEEPER = """
import os, signal, sys, time
from pathlib import Path
log = Path(sys.argv[1])
def told(number, frame):
    with log.open("a") as file:
        file.write(f"{signal.Signals(number).name}\\n")
for name in ("SIGINT", "SIGTERM"):
    signal.signal(getattr(signal, name), told)
log.write_text(f"{os.getpid()}\\n")
while len(log.read_text().splitlines()) < 2:
    time.sleep(0.01)
time.sleep(0.3)  # as long as a checkpoint takes; a second signal would be noted
"""
LEADER = """
import sys
from pathlib import Path
from sslkit.sweeping import pool
class Two:
    left_over = ["one", "two", "three"]
    def take(self):
        name = self.left_over.pop(0)
        return pool.Task(name, "sleeper", [name + ".txt"], Path(name + ".log"))
    def left(self): return bool(self.left_over)
    def ended(self, task, code): print("ended", task.name, code, flush=True)
print("received", pool.run(Two(), [{}, {}]), flush=True)
"""


@pytest.fixture
def led(tmp_path: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A process that leads two others, once both have begun."""
    for name, text in (("sleeper.py", SLEEPER), ("leader.py", LEADER)):
        (tmp_path / name).write_text(text)
    found = os.pathsep.join([str(tmp_path), *sys.path])
    leader = subprocess.Popen(
        [sys.executable, "leader.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": found}, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    logs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    until(lambda: all(log.exists() and log.read_text() for log in logs))
    return leader, logs


def until(condition: Callable[[], object], patience: float = 60) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is over and not yet looked after by anybody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_passed_on_once_and_waited_for(led: tuple[subprocess.Popen[str], list[Path]], name: str) -> None:
    leader, logs = led
    os.killpg(leader.pid, getattr(signal, name))  # as a terminal does, to the whole group
    out, _ = leader.communicate(timeout=60)
    assert sorted(out.splitlines()) == ["ended one 0", "ended two 0", f"received {getattr(signal, name).value}"]
    assert [log.read_text().splitlines()[1:] for log in logs] == [[name], [name]]
    assert not any(alive(int(log.read_text().split()[0])) for log in logs)
    assert not (logs[0].parent / "three.txt").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a process to its parent")
def test_a_killed_sweep_leaves_nobody_behind(led: tuple[subprocess.Popen[str], list[Path]]) -> None:
    leader, logs = led
    leader.kill()
    leader.communicate(timeout=60)
    until(lambda: not any(alive(int(log.read_text().split()[0])) for log in logs))
    assert [log.read_text().splitlines()[1:] for log in logs] == [["SIGTERM"], ["SIGTERM"]]


def test_an_error_of_the_sweep_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    log = tmp_path / "one.txt"

    class Broken:
        begun = False

        def take(self) -> Task | None:
            if self.begun:
                until(lambda: log.exists() and log.read_text())
                raise ValueError("a mistake")
            self.begun = True
            return Task("one", "sleeper", [str(log)], tmp_path / "log")

        def left(self) -> bool:
            return True

        def ended(self, task: Task, code: int) -> None: ...

    with pytest.raises(ValueError, match="a mistake"):
        pool.run(Broken(), [{}, {}])
    assert not alive(int(log.read_text().split()[0]))


# ---------------------------------------------------------------- whole


def figures(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of every run, without what a clock says."""
    timings = ("images_per_second", "data_wait")
    return {
        path.parent.relative_to(folder).as_posix(): [
            {key: value for key, value in record.items() if key not in timings} for record in read_metrics(path.parent)
        ]
        for path in sorted(folder.glob("*/*/metrics.jsonl"))
    }


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A sweep as a user starts it."""
    found = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "sslkit", "sweep", "./tiny.toml", *arguments], cwd=folder, text=True,
        env={**os.environ, "PYTHONPATH": found}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep_trains_what_train_trains(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(TINY.replace("epochs = 2", "epochs = 1"), encoding="utf-8")
    swept = sweep("--grid", "optimizer.lr.peak=.3", "--steps", "2")
    assert swept.exit_code == 0, swept.output
    alone = run("train", "./tiny.toml", "--set", "optimizer.lr.peak=0.3", "--steps", "2", "--run-dir", "all/one/run")
    assert alone.exit_code == 0
    [found] = figures(tmp_path / "runs/tiny-sweep").values()
    assert found == figures(tmp_path / "all")["one/run"]
    assert "[1/1] peak=0.3/seed-0: stopped, kNN top-1 0.1" in swept.output


ASKED: Sequence[str] = ("--grid", "optimizer.lr.peak=.1,.3", "--jobs", "2")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a process to its parent")
def test_a_sweep_that_is_killed_amid_its_runs_comes_to_the_same(recipe: Path, tmp_path: Path) -> None:
    """Its runs are asked to end by the system; by its own signals they are in the tests above."""
    recipe.write_text(TINY.replace("epochs = 2", "epochs = 6"), encoding="utf-8")
    with begin(tmp_path, *ASKED, "--dir", "whole") as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    folder = tmp_path / "ended"

    def amid() -> bool:
        return any(
            read_json(path).get("status") == "running" and any(path.parent.glob("checkpoints/step-*"))
            for path in folder.glob("*/*/status.json")
        )

    with begin(tmp_path, *ASKED, "--dir", "ended") as process:
        until(amid)
        process.kill()
        out, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, out
    assert figures(folder) != figures(tmp_path / "whole"), "it was not amid"
    with begin(tmp_path, *ASKED, "--dir", "ended") as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "goes on from step" in out
    assert figures(folder) == figures(tmp_path / "whole")
    assert len(figures(folder)) == 2


def test_what_is_remembered_can_be_read(recipe: Path, faked: Callable[[], list[str]]) -> None:
    sweep("--grid", "loss.form=byol,simsiam")
    note = json.loads((recipe.parent / "runs/tiny-sweep/sweep.json").read_text())
    assert note["keys"] == ["loss.form"]
    assert note["folders"] == {"form=byol": {"loss.form": "byol"}, "form=simsiam": {"loss.form": "simsiam"}}
    shutil.rmtree(recipe.parent / "runs")
