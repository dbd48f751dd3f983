"""A changed recipe on a run that is there, and `--fork`: what is said, which way it goes, and what goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import TINY as WHOLE
from conftest import run

import sslkit
from sslkit import checkpoint
from sslkit.recipe import parse_recipe, read_recipe
from sslkit.run_directory import read_json, read_metrics

OFF = ("health", "probe", "tensorboard", "report")
TINY = WHOLE + "".join(f'\n[[observers]]\nuse = "{name}"\nenabled = false\n' for name in OFF)
"""The tiny recipe without what takes longer than its training."""
CHANGED = ("--set", "optimizer.weight_decay=0.0005")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe, stopped at step 8 of 20."""
    place = tmp_path_factory.mktemp("runs")
    sslkit.train(parse_recipe(TINY, "r.toml"), run_dir=place / "tiny", steps=8, quiet=True)
    return place


@pytest.fixture(autouse=True)
def _beside_the_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source, tmp_path / "runs")
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)


def fork(*arguments: str, steps: int = 3) -> Result:
    return run("train", "tiny.toml", "--fork", "--steps", str(steps), *arguments)


def refused(*arguments: str) -> list[str]:
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    return found.stderr.splitlines()


def state(folder: str, step: int) -> dict[str, Any]:
    return checkpoint.load(Path(folder, "checkpoints", f"step-{step:09d}")).parts


def losses(folder: str) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(Path(folder)) if "loss" in r]


def at(line: str) -> int:
    return TINY.splitlines().index(line) + 1


# ---------------------------------------------------------------- a changed recipe


def test_the_refusal_says_what_changed_where_and_each_way() -> None:
    Path("tiny.toml").write_text(TINY.replace("out_dim = 8\n\n[loss]", "out_dim = 8\nbias = false\n\n[loss]"))
    assert refused("train", "tiny.toml", *CHANGED, "--set", "seed=3") == [
        "runs/tiny: holds a run of another recipe, at step 8 of 20; put back what differs, or begin a new run",
        "  --set seed=3: seed: 0 -> 3",
        f"  tiny.toml:{at('[loss]') - 1}: predictor.bias: true -> false",
        "  --set optimizer.weight_decay=0.0005: optimizer.weight_decay: 0.0001 -> 0.0005",
        "  from its weights: sslkit train tiny.toml --set=optimizer.weight_decay=0.0005 --set=seed=3 --fork",
        "  from the beginning: sslkit train tiny.toml --set=optimizer.weight_decay=0.0005 --set=seed=3 --resume never",
    ]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny"]


def test_what_was_taken_out_is_told_at_the_table_that_lacks_it() -> None:
    Path("tiny.toml").write_text(TINY.replace("weight_decay = 1e-4\n", ""))
    line = refused("train", "tiny.toml")[1]
    assert line == f"  tiny.toml:{at('[optimizer]')}: optimizer.weight_decay: 0.0001 -> 0.0"


def test_each_way_that_a_refusal_names_can_be_gone() -> None:
    shutil.move("runs/tiny", "my runs")
    chosen = ("train", "tiny.toml", *CHANGED, "--run-dir", "my runs")
    Path("my runs-2").mkdir()
    for line in refused(*chosen)[2:]:
        words = line.partition(": sslkit ")[2]
        assert words.endswith("--run-dir 'my runs-3'")
        import shlex

        assert run(*shlex.split(words), "--steps", "1").exit_code == 0
        shutil.rmtree("my runs-3")


def test_python_is_told_in_its_words() -> None:
    with pytest.raises(sslkit.UserError) as caught:
        sslkit.train(parse_recipe(TINY, "r.toml", ["seed=1"]), quiet=True)
    assert caught.value.lines == (
        "runs/tiny: holds a run of another recipe, at step 8 of 20; put back what differs, or begin a new run",
        "  seed: 0 -> 1",
        "  from its weights: fork=True, or the run's directory instead of True",
        "  from the beginning: another run_dir or name",
    )


def test_what_auto_chose_is_no_difference_and_another_choice_is() -> None:
    auto = TINY.replace("compile = false\n", "")
    Path("auto.toml").write_text(auto.replace('"tiny"', '"auto"'))
    assert run("train", "auto.toml", "--steps", "2").exit_code == 0
    lock = read_recipe("runs/auto/recipe.lock.toml")
    assert (lock.train.compile, lock.train.compile_chosen) == (False, False)
    assert lock.hash() == read_recipe("auto.toml").hash() != read_recipe("tiny.toml").hash()
    (saved,) = checkpoint.listed(Path("runs/auto/checkpoints"))
    assert checkpoint.load(saved).facts["recipe_hash"] == lock.hash()
    assert "the same in all that is computed" in run("diff", "runs/auto", "auto.toml").output
    for same in ("auto", "false"):
        assert run("train", "auto.toml", "--set", f"train.compile={same}", "--steps", "2").exit_code == 0
    assert '"auto" -> true' in refused("train", "auto.toml", "--set", "train.compile=true")[1]
    other = read_recipe("runs/auto/recipe.lock.toml", ["train.compile=true"])
    assert other.computing()["train"]["compile"] is True, "what was chosen counts only as long as it is so"


def test_a_run_of_before_that_says_what_auto_chose_goes_on() -> None:
    Path("tiny.toml").write_text(TINY.replace("compile = false\n", ""))
    assert run("train", "tiny.toml", "--steps", "9").exit_code == 0


# ---------------------------------------------------------------- forks


def test_a_fork_begins_with_the_weights_at_step_0_and_all_else_afresh() -> None:
    done = fork(*CHANGED)
    assert done.exit_code == 0, done.output
    assert done.output.startswith(
        "initialised from runs/tiny, step 8 (its online network): backbone, projector, predictor, target\n"
    )
    assert [step for step, _ in losses("runs/tiny-2")] == [1]
    assert read_json(Path("runs/tiny-2/env.json"))["initialised"]["fork"] is True
    made = sslkit.load_encoder("runs/tiny-2").backbone.state_dict()
    assert not all(torch.equal(v, state("runs/tiny", 8)["model"][f"online.backbone.{k}"]) for k, v in made.items())
    by_hand = ["init_from=runs/tiny", "init_from.branch=online", "name=hand"]
    assert run("train", "tiny.toml", *CHANGED, *(f"--set={o}" for o in by_hand), "--steps", "3").exit_code == 0
    assert losses("runs/hand") == losses("runs/tiny-2")


def test_the_same_command_goes_on_with_the_fork_and_another_begins_another() -> None:
    whole = fork(*CHANGED, "--run-dir", "whole", steps=7)
    assert whole.exit_code == 0
    fork(*CHANGED)
    sslkit.train("tiny.toml", steps=12, quiet=True)  # the run that was forked goes on by itself
    on = fork(*CHANGED, steps=7)
    assert "going on from step 3 (runs/tiny-2/" in on.output
    assert losses("runs/tiny-2") == losses("whole")
    assert run("train", "tiny.toml", *CHANGED, "--run-dir", "runs/tiny-2", "--steps", "8").exit_code == 0, (
        "unnamed, too"
    )
    assert "initialised from runs/tiny, step 12" in fork("--set", "optimizer.weight_decay=0.0003").output
    assert "runs/tiny-4" in fork(*CHANGED, "--resume", "never").output, "never: yet another"
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny", "tiny-2", "tiny-3", "tiny-4"]


def test_a_finished_fork_is_finished() -> None:
    fork(steps=20)
    assert "runs/tiny-2: this run is finished" in fork(steps=20).output


def test_a_fork_goes_where_it_is_told_and_from_any_run() -> None:
    shutil.copytree("runs/tiny", "elsewhere")
    for words in (["--fork", "elsewhere"], ["--fork", "elsewhere/checkpoints/step-000000004", "--run-dir", "there"]):
        assert run("train", "tiny.toml", *words, "--steps", "1").exit_code == 0
    assert read_json(Path("runs/tiny-2/env.json"))["initialised"]["run"] == "elsewhere"
    assert read_json(Path("there/env.json"))["initialised"]["step"] == 4
    other = run("train", "tiny.toml", "--set", "name=other", "--fork", "runs/tiny", "--steps", "1")
    assert "run directory: runs/other\n" in other.output, "its own name is free"


def test_parts_that_do_not_fit_any_more_are_left_out_with_a_word_and_the_lock_names_the_others() -> None:
    wider = ("--set", "projector.out_dim=12", "--set", "predictor.out_dim=12")
    done = fork(*wider)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[:4] == [
        "initialised from runs/tiny, step 8 (its online network): backbone",
        "not taken: projector: does not fit: 3.weight is [8, 16] there and [12, 16] here; begins as drawn",
        "not taken: predictor: does not fit: 0.weight is [16, 8] there and [16, 12] here (and 1 more); begins as drawn",
        "not taken: target: does not fit: projector.3.weight is [8, 16] there and [12, 16] here; begins as a copy of "
        "the online network",
    ]
    assert read_recipe("runs/tiny-2/recipe.lock.toml").init_from.parts == ("backbone",)  # type: ignore[union-attr]
    assert "going on from step 3" in fork(*wider, steps=4).output
    again = run("train", "runs/tiny-2/recipe.lock.toml", "--run-dir", "again", "--steps", "4")
    assert again.exit_code == 0, again.output
    assert losses("again") == losses("runs/tiny-2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fork", "runs/gone"], "--fork: runs/gone is not there, and a fork begins with the weights of a run"),
        (["--fork", "runs"], "--fork: runs holds no run, and a fork begins with the weights of a run"),
        (["--fork", "--set", "name=x"],
         "--fork: runs/x is not there, and a fork begins with the weights of a run; give the directory of one: "
         "--fork RUN"),
        (["--fork", "--run-dir", "runs/tiny"],
         "--fork: runs/tiny is the run to fork itself; choose another --run-dir"),
        (["--fork", "--set", "backbone.widths=[8, 16]"],
         "--fork: runs/tiny, step 8 does not fit the backbone: blocks.3.weight is [8, 8, 3, 3] there and "
         "[16, 8, 3, 3] here (and 4 more); build the one that it was trained with"),
        (["--fork", "--run-dir", "taken", "--resume", "never"],
         "taken: holds a run already, and --resume never was given; choose another --run-dir"),
    ],
)  # fmt: skip
def test_what_cannot_be_forked(words: list[str], says: str) -> None:
    shutil.copytree("runs/tiny", "taken")
    assert refused("train", "tiny.toml", *words) == [says]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny"], "nothing is left of it"


def test_a_fork_into_the_directory_of_another_run_is_refused() -> None:
    shutil.copytree("runs/tiny", "taken")
    lines = refused("train", "tiny.toml", "--fork", "--run-dir", "taken")
    assert lines[0].startswith("taken: holds a run of another recipe, at step 8 of 20;")
    assert lines[1].startswith("  init_from: unset -> { run = ")
    assert lines[2:] == ["  beside it: sslkit train tiny.toml --fork --run-dir taken-2"]


def test_the_run_that_is_forked_is_left_as_it_was() -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path("runs/tiny").rglob("*")}
    fork()
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path("runs/tiny").rglob("*")}


def test_a_fork_can_be_looked_at_first() -> None:
    planned = run("train", "tiny.toml", "--fork", "--dry-run")
    assert planned.exit_code == 0
    assert "initialised from runs/tiny, step 8" in planned.output
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny"]


def test_python_forks_too() -> None:
    found = sslkit.train("tiny.toml", fork=True, steps=1, quiet=True)
    assert found.directory == Path("runs/tiny-2")
    assert sslkit.train("tiny.toml", fork="runs/tiny", steps=2, quiet=True).directory == Path("runs/tiny-2"), "goes on"
    with pytest.raises(
        sslkit.UserError, match="fork=True: runs/tiny is the run to fork itself; choose another run_dir"
    ):
        sslkit.train("tiny.toml", fork=True, run_dir="runs/tiny", quiet=True)


def test_a_fork_of_a_run_whose_lock_is_damaged_or_foreign_is_not_gone_on_with() -> None:
    fork()
    Path("runs/tiny-2/recipe.lock.toml").write_text("name = 3")
    assert "run directory: runs/tiny-3" in fork().output
    (Path("runs/tiny-3/env.json")).write_text(json.dumps({"initialised": 3}))
    assert "run directory: runs/tiny-4" in fork().output
