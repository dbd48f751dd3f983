"""`init_from`: what is taken from a run, what is refused, and that it is never asked for again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import TINY as WHOLE
from torch import Tensor

import sslkit
from sslkit import checkpoint, initialise
from sslkit.build import Parts, choose_device
from sslkit.cli import main
from sslkit.errors import UserError
from sslkit.preparation import prepare
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.rules import Course, Facts
from sslkit.run_directory import read_json, read_metrics
from sslkit.starting_point import SEEN_FROM, InitFrom
from sslkit_rules.curves import quality
from sslkit_rules.progress import knn_not_improving

OFF = ("health", "probe", "tensorboard", "report")
TINY = WHOLE + "".join(f'\n[[observers]]\nuse = "{name}"\nenabled = false\n' for name in OFF)
"""The tiny recipe without what takes longer than its training."""
CONTRASTIVE = ["predictor=false", "target_updater.use=none", "loss.use=nt_xent", "loss.temperature=0.5"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the tiny recipe, of one that evaluates the target, and of one with neither predictor nor target."""
    place = tmp_path_factory.mktemp("runs")
    for name, overrides in (("byol", []), ("dino", ["target_updater.evaluate=target"]), ("simclr", CONTRASTIVE)):
        recipe = parse_recipe(TINY, "r.toml", [*overrides, f"name={name}"])
        sslkit.train(recipe, run_dir=place / name, steps=8, quiet=True)
    return place


@pytest.fixture(autouse=True)
def _beside_the_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source, tmp_path / "runs")
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)


def recipe(*overrides: str, init: object = "runs/byol") -> Recipe:
    text = json.dumps(init) if isinstance(init, str) else _inline(init)
    return parse_recipe(f"init_from = {text}\n{TINY}", "r.toml", overrides)


def _inline(table: Any) -> str:
    return "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) + " }"


def prepared(*overrides: str, init: object = "runs/byol", said: list[str] | None = None) -> Parts:
    lines = said if said is not None else []
    return prepare(recipe(*overrides, init=init), None, (), choose_device("cpu"), lines.append)[0]


def refused(*overrides: str, init: object = "runs/byol") -> str:
    with pytest.raises(UserError) as caught:
        prepared(*overrides, init=init)
    (line,) = caught.value.lines
    return line


def saved(run: str, part: str = "model") -> dict[str, Any]:
    found, problems = checkpoint.newest(Path("runs", run, "checkpoints"))
    assert found
    assert not problems
    state: dict[str, Any] = found.parts[part]
    return state


def same(module: Any, weights: dict[str, Tensor], prefix: str) -> bool:
    theirs = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    state = module.state_dict()
    assert list(state) == list(theirs)
    return all(torch.equal(state[k], theirs[k]) for k in state)


def command(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# ---------------------------------------------------------------- what is taken


def test_by_default_everything_that_both_have_is_taken() -> None:
    said: list[str] = []
    parts = prepared(said=said)
    weights = saved("byol")
    assert same(parts.model.online, weights, "online.")
    assert same(parts.model.predictor, weights, "predictor.")
    assert same(parts.model.target, weights, "target.")
    assert said == ["initialised from runs/byol, step 8 (its online network): backbone, projector, predictor, target"]
    assert not parts.optimizer.state_dict()["state"], "the optimizer begins afresh"
    assert parts.recipe.init_from == InitFrom(
        run=Path("runs/byol").resolve().as_posix(),
        checkpoint=8,
        branch="online",
        weights=initialise.weights_digest(Path("runs/byol/checkpoints/step-000000008")),
    )


def test_with_the_backbone_alone_the_rest_is_drawn_and_the_target_is_a_copy_of_what_was_initialised() -> None:
    said: list[str] = []
    parts = prepared(init={"run": "runs/byol", "parts": ["backbone"]}, said=said)
    fresh = prepare(parse_recipe(TINY, "r.toml"), None, (), choose_device("cpu"), said.append)[0]
    assert same(parts.model.online.backbone, saved("byol"), "online.backbone.")
    assert same(parts.model.online.projector, fresh.model.online.state_dict(), "projector.")
    assert same(parts.model.predictor, fresh.model.state_dict(), "predictor.")
    assert same(parts.model.target, parts.model.online.state_dict(), "")
    assert not any(p.requires_grad for p in parts.model.target.parameters())  # type: ignore[union-attr]
    assert said == [
        "initialised from runs/byol, step 8 (its online network): backbone",
        "not taken: projector: not asked for; begins as drawn",
        "not taken: predictor: not asked for; begins as drawn",
        "not taken: target: not asked for; begins as a copy of the online network",
    ]


def test_the_branch_is_the_one_that_the_run_measures_unless_it_is_named() -> None:
    weights = saved("dino")
    assert not torch.equal(weights["online.backbone.blocks.0.weight"], weights["target.backbone.blocks.0.weight"])
    for branch, prefix in (("evaluated", "target."), ("online", "online."), ("target", "target.")):
        parts = prepared(init={"run": "runs/dino", "branch": branch})
        assert same(parts.model.online, weights, prefix), branch
        assert same(parts.model.target, weights, "target."), branch
    line = refused(*CONTRASTIVE, init={"run": "runs/simclr", "branch": "target"})
    assert line == "init_from.branch: runs/simclr: has no target network of its own; use 'online'"


def test_what_only_one_of_the_two_has_is_said() -> None:
    said: list[str] = []
    prepared(init="runs/simclr", said=said)
    assert said[1:] == [
        "not taken: predictor: the run has none; begins as drawn",
        "not taken: target: the run has none; begins as a copy of the online network",
    ]
    said.clear()
    prepared(*CONTRASTIVE, said=said)
    assert said[1:] == [
        "not taken: predictor: there is none here to begin with it",
        "not taken: target: there is none here to begin with it",
    ]


def test_the_state_of_a_loss_is_taken_by_the_same_loss_alone() -> None:
    queue = ["predictor=false", "loss.use=moco", "loss.queue=256"]
    sslkit.train(parse_recipe(TINY, "r.toml", [*queue, "name=moco"]), run_dir="runs/moco", steps=3, quiet=True)
    parts = prepared(*queue, init="runs/moco")
    state = saved("moco", "loss")
    assert state
    assert same(parts.loss, state, "")
    assert "loss" in parts.initialised["taken"]  # type: ignore[index]
    other = prepared("loss.use=nnclr", "loss.queue=256", "target_updater.use=none", init="runs/moco")
    assert other.initialised["left"]["loss"] == "the run has another loss, 'moco'; begins as drawn"  # type: ignore[index]


def test_a_checkpoint_is_named_by_its_folder_its_step_or_as_the_best() -> None:
    for init in (
        "runs/byol/checkpoints/step-000000004",
        {"run": "runs/byol", "checkpoint": 4},
        {"run": "runs/byol/checkpoints/step-000000004/", "checkpoint": "last"},
    ):
        assert prepared(init=init).recipe.init_from.checkpoint == 4  # type: ignore[union-attr]
    state = Path("runs/byol/checkpoints/step-000000004/state.json")
    manifest = state.with_name("manifest.json")
    text = state.read_text().replace('"knn_top1": null', '"knn_top1": 0.5')
    state.write_text(text)
    files = json.loads(manifest.read_text())
    files["files"]["state.json"] = checkpoint._digest(state)
    manifest.write_bytes(checkpoint.sealed(files))
    if checkpoint.load(state.parent):  # the manifest is as it should be
        assert prepared(init={"run": "runs/byol", "checkpoint": "best"}).recipe.init_from.checkpoint == 4  # type: ignore[union-attr]
    line = refused(init={"run": "runs/dino", "checkpoint": "best"})
    assert line.startswith("init_from.checkpoint: runs/dino: kNN was not measured at any of its checkpoints")
    line = refused(init={"run": "runs/byol", "checkpoint": 5})
    assert line == "init_from.checkpoint: runs/byol: has no checkpoint 5; choose 'last', 'best' or a step of 4, 8"


# ---------------------------------------------------------------- what is refused


def test_weights_that_do_not_fit_are_refused_with_the_first_misfit_and_a_way() -> None:
    assert refused("backbone.widths=[8, 16]") == (
        "init_from: runs/byol, step 8 does not fit the backbone: blocks.3.weight is [8, 8, 3, 3] there and "
        "[16, 8, 3, 3] here (and 4 more); build the one that it was trained with"
    )
    assert refused("projector.hidden_dim=24", "predictor.hidden_dim=8").endswith(
        'or begin it anew: init_from.parts = ["backbone"]'
    )
    assert "is unknown here" in refused("backbone.widths=[8]", "backbone.strides=[2]")
    both = {"run": "runs/byol", "parts": ["backbone", "projector"]}
    assert "does not fit the projector" in refused("projector.hidden_dim=24", init=both)
    prepared("predictor.hidden_dim=24", init=both)


def test_a_part_that_is_named_has_to_be_there() -> None:
    line = refused(init={"run": "runs/simclr", "parts": ["backbone", "predictor"]})
    assert line == "init_from.parts: 'predictor': the run has none; leave it out"
    line = refused(*CONTRASTIVE, init={"run": "runs/byol", "parts": ["backbone", "target"]})
    assert line == "init_from.parts: 'target': there is none here to begin with it; leave it out"


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ("runs/gone", f"init_from: runs/gone: is not there; give the directory of a run, as runs/NAME; {SEEN_FROM}"),
        ("runs", "init_from: runs: is no run directory (it has no recipe.lock.toml); give one as runs/NAME"),
    ],
)
def test_a_run_that_is_not_there(init: str, says: str) -> None:
    assert refused(init=init) == says


def test_a_run_without_a_checkpoint_and_one_whose_checkpoints_are_damaged() -> None:
    for file in Path("runs/byol/checkpoints").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    before = sorted(Path("runs/byol").rglob("*"))
    with pytest.raises(UserError) as caught:
        prepared()
    assert caught.value.lines[-1].startswith("init_from: runs/byol: none of its checkpoints is sound")
    assert "is not what the manifest says" in refused(init={"run": "runs/byol", "checkpoint": 8})
    assert sorted(Path("runs/byol").rglob("*")) == before, "another run is read, never mended"
    shutil.rmtree("runs/byol/checkpoints")
    assert refused().startswith("init_from: runs/byol: has no checkpoint yet")


def test_of_a_damaged_checkpoint_the_one_before_is_taken_with_a_word() -> None:
    Path("runs/byol/checkpoints/step-000000008/model.safetensors").write_bytes(b"")
    said: list[str] = []
    parts = prepared(said=said)
    assert parts.initialised["step"] == 4  # type: ignore[index]
    assert said[0].startswith(
        f"warning: {Path('runs/byol/checkpoints/step-000000008').resolve()}: model.safetensors is not what"
    )
    Path("runs/byol/checkpoints/step-000000004/manifest.json").write_text("[")
    with pytest.raises(UserError, match="none of its checkpoints is sound"):
        prepared()


def test_a_source_that_trains_on_may_remove_the_checkpoint_that_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load

    def late(path: Path, wanted: Any = None) -> checkpoint.Checkpoint:
        if path.name == "step-000000008":
            shutil.rmtree(path)
        return load(path, wanted)

    monkeypatch.setattr(checkpoint, "load", late)
    said: list[str] = []
    prepared(said=said)
    assert said[0].startswith("initialised from runs/byol, step 4"), "no word of it: nothing is damaged"


def test_values_that_are_no_way_to_begin(tmp_path: Path) -> None:
    def error(init: object, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            recipe(*overrides, init=init)
        return caught.value.lines[0]

    assert error({"run": "x", "parts": ["projector"]}).startswith("r.toml:1: init_from.parts: should name the backbone")
    assert "unknown option; did you mean 'parts'?" in error({"run": "x", "part": ["backbone"]})
    assert "init_from: needs exactly one of 'run', 'timm' and 'file', not none" in error({"parts": ["backbone"]})
    assert "init_from: should be a run's directory" in error("x", "init_from=3")
    assert "weights" in error({"run": "x", "weights": "abc"})
    assert recipe("init_from=false").init_from is None


# ---------------------------------------------------------------- where paths start


def test_a_path_is_seen_from_the_recipe_that_says_it_and_an_override_from_here() -> None:
    Path("deep").mkdir()
    Path("deep/base.toml").write_text(f'init_from = "../runs/byol"\n{TINY}')
    Path("over.toml").write_text('extends = "deep/base.toml"\n[init_from]\nparts = ["backbone"]\n')
    here = Path("runs/byol").resolve().as_posix()
    assert read_recipe("deep/base.toml").init_from == InitFrom(run=here)
    assert read_recipe("over.toml").init_from == InitFrom(run=here, parts=("backbone",))
    for override in ("init_from=runs/byol", "init_from.run=runs/byol"):
        assert read_recipe("deep/base.toml", [override]).init_from == InitFrom(run=here)
    Path("deep/wrong.toml").write_text(f'init_from = "runs/byol"\n{TINY}')
    wrong = command("check", "deep/wrong.toml")
    assert wrong.exit_code == 2
    assert wrong.output.startswith("deep/wrong.toml:1: init_from: deep/runs/byol: is not there; a path in a recipe is ")


# ---------------------------------------------------------------- the run itself


def init_file(init: object = "runs/byol") -> str:
    text = json.dumps(init) if isinstance(init, str) else _inline(init)
    Path("init.toml").write_text(f"init_from = {text}\n{TINY}".replace('name = "tiny"', 'name = "init"'))
    return "init.toml"


def losses(run: str) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(Path(run)) if "loss" in r]


def tensors(run: str) -> dict[str, bytes]:
    newest = checkpoint.listed(Path(run, "checkpoints"))[-1]
    return {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}


def test_an_initialised_run_goes_on_bit_for_bit_without_its_source() -> None:
    file = init_file()
    assert command("train", file, "--steps", "12", "--run-dir", "whole").exit_code == 0
    first = command("train", file, "--steps", "5")
    assert "kNN top-1 of the initialised network" in first.output
    shutil.rmtree("runs/byol")
    on = command("train", file, "--steps", "12")
    assert on.exit_code == 0, on.output
    assert "initialised from" not in on.output
    assert losses("runs/init") == losses("whole")
    assert tensors("runs/init") == tensors("whole")
    facts = [json.loads((p / "state.json").read_text())["facts"]["initialised"]
             for p in checkpoint.listed(Path("runs/init/checkpoints"))]  # fmt: skip
    assert facts[0] == facts[-1] == read_json(Path("runs/init/env.json"))["initialised"]
    assert facts[0] == {
        "run": "runs/byol", "step": 8, "branch": "online", "recipe": "byol",
        "recipe_hash": read_recipe("tiny.toml").hash(), "weights": facts[0]["weights"],
        "taken": ["backbone", "projector", "predictor", "target"], "left": {}, "fork": False,
    }  # fmt: skip
    assert len(facts[0]["weights"]) == 64


def test_the_first_measurement_is_of_the_initialised_network() -> None:
    command("train", init_file(), "--steps", "1")
    (first, *_) = [r["knn_top1"] for r in read_metrics(Path("runs/init")) if "knn_top1" in r]
    fresh = command("train", "tiny.toml", "--steps", "1")
    (drawn, *_) = [r["knn_top1"] for r in read_metrics(Path("runs/tiny")) if "knn_top1" in r]
    assert first != drawn
    assert "kNN top-1 of the random network" in fresh.output


def test_a_killed_run_that_saved_nothing_is_initialised_again() -> None:
    file = init_file()
    command("train", file, "--steps", "4")
    whole = losses("runs/init")
    for path in checkpoint.listed(Path("runs/init/checkpoints")):
        path.rename(path.with_name(f".tmp-{path.name}-1"))
    again = command("train", file, "--steps", "4")
    assert "initialised from runs/byol, step 8" in again.output
    assert losses("runs/init") == whole


def test_the_lock_file_names_step_and_weights_and_trains_to_the_same_losses_from_anywhere() -> None:
    command("train", init_file(), "--steps", "6")
    lock = Path("runs/init/recipe.lock.toml")
    assert '[init_from]\nrun = "../byol"\ncheckpoint = 8\nbranch = "online"\n' in lock.read_text()
    sslkit.train("tiny.toml", run_dir="runs/byol", steps=12, quiet=True)  # the source goes on
    Path("elsewhere").mkdir()
    shutil.move("runs", "elsewhere/runs")
    again = command(
        "train", "elsewhere/runs/init/recipe.lock.toml", "--run-dir", "elsewhere/runs/again", "--steps", "6"
    )
    assert again.exit_code == 0, again.output
    assert losses("elsewhere/runs/again") == losses("elsewhere/runs/init")
    other = Path("elsewhere/runs/simclr/checkpoints/step-000000008")
    shutil.rmtree("elsewhere/runs/byol/checkpoints/step-000000008")
    shutil.copytree(other, "elsewhere/runs/byol/checkpoints/step-000000008")
    changed = command("train", "elsewhere/runs/init/recipe.lock.toml", "--run-dir", "elsewhere/runs/more")
    assert changed.exit_code == 2
    assert "init_from.weights: names other weights than those of" in changed.stderr


def test_one_hash_before_a_run_and_in_it_and_another_for_other_weights() -> None:
    file = init_file()
    command("train", file, "--steps", "1")
    lock = read_recipe("runs/init/recipe.lock.toml")
    assert lock.hash() == initialise.pinned(read_recipe(file)).hash()
    assert (
        lock.hash()
        == json.loads(next(Path("runs/init/checkpoints").glob("*/state.json")).read_text())["facts"]["recipe_hash"]
    )
    assert f"({lock.hash()})" in command("check", file).output
    assert "the same in all that is computed" in command("diff", file, "runs/init").output
    shutil.copytree("runs/byol", "runs/copied")
    assert initialise.pinned(read_recipe(init_file("runs/copied"))).hash() == lock.hash(), "where they lie is nothing"
    for other in ("runs/dino", {"run": "runs/byol", "parts": ["backbone"]}, {"run": "runs/byol", "checkpoint": 4}):
        assert initialise.pinned(read_recipe(init_file(other))).hash() != lock.hash()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("runs/dino", '{ run = "runs/dino" }'),
        ({"run": "runs/byol", "checkpoint": 4}, '{ run = "runs/byol", checkpoint = 4 }'),
        ({"run": "runs/byol", "parts": ["backbone"]}, '{ run = "runs/byol", parts = ["backbone"] }'),
    ],
)
def test_another_beginning_is_refused_on_a_run_that_has_begun(change: object, told: str) -> None:
    command("train", init_file(), "--steps", "1")
    refused = command("train", init_file(change), "--steps", "2")
    assert refused.exit_code == 2
    was = '{ run = "runs/byol", checkpoint = 8, branch = "online" }'
    assert f"  init.toml:1: init_from: {was} -> {told}" in refused.stderr


def test_taking_init_from_out_of_a_recipe_is_refused_and_the_same_weights_elsewhere_are_not() -> None:
    command("train", init_file(), "--steps", "1")
    shutil.move("runs/byol", "runs/moved")
    assert command("train", init_file("runs/moved"), "--steps", "2").exit_code == 0
    gone = command("train", "init.toml", "--set", "init_from=false", "--steps", "3")
    assert gone.exit_code == 2
    assert "-> unset" in gone.stderr
    Path("tiny.toml").write_text(TINY)
    command("train", "tiny.toml", "--steps", "1")
    added = command("train", "tiny.toml", "--set", "init_from=runs/moved", "--steps", "2")
    assert "--set init_from=runs/moved: init_from: unset -> { run =" in added.stderr


def test_check_and_the_dry_run_begin_with_the_weights_too() -> None:
    wrong = ("--set", "init_from=runs/byol", "--set", "backbone.widths=[8, 16]")
    for words in (["check", "tiny.toml"], ["train", "tiny.toml", "--dry-run"]):
        found = command(*words, *wrong)
        assert found.exit_code == 2
        assert found.stderr.startswith("--set init_from=runs/byol: init_from: runs/byol, step 8 does not fit the backb")
    planned = command("train", init_file(), "--dry-run")
    assert "initialised from runs/byol, step 8" in planned.output
    assert not Path("runs/init").exists()


def test_pretrained_weights_are_not_fetched_for_a_backbone_that_is_given_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sslkit_convnet import ConvNet

    asked, make = [], ConvNet.build
    monkeypatch.setattr(ConvNet, "build", lambda self, run: (asked.append(run.weights_follow), make(self, run))[1])
    prepared()
    prepare(parse_recipe(TINY, "r.toml"), None, (), choose_device("cpu"), print)
    assert asked == [True, False]


def test_python_begins_with_a_run_too() -> None:
    found = sslkit.load_recipe("tiny.toml").replace(init_from=Path("runs/byol"), name="python")
    result = sslkit.train(found, steps=2, quiet=True)
    assert result.status == "stopped"
    assert read_json(Path("runs/python/env.json"))["initialised"]["step"] == 8


# ---------------------------------------------------------------- what the doctor makes of it


def test_the_figure_at_step_0_is_no_random_floor() -> None:
    records: list[dict[str, Any]] = [{"step": s, "epoch": float(s), "knn_top1": 0.9} for s in range(0, 1001, 100)]
    facts = {"total_steps": 1000, "steps_per_epoch": 1, "recipe": {}}
    random, started = (Course(Facts(**facts, initialised=i), {}, list(records)) for i in ("", "runs/x, step 8"))  # type: ignore[arg-type]
    assert knn_not_improving.during
    assert knn_not_improving.during(random)
    assert knn_not_improving.during(started) is None, "to keep what another run had learnt is no fault"
    assert (quality(random).floor, quality(started).floor) == (0.9, None)  # type: ignore[union-attr]


def test_a_target_that_is_slow_from_the_start_leaves_no_random_start() -> None:
    slow = ("tiny.toml", "--set", "target_updater.tau=0.999")
    assert "[tau_slow]" in command("check", *slow).output
    started = (*slow, "--set", "init_from=runs/byol", "--set", "name=init")
    told = [command("check", *started), command("train", *started, "--steps", "8"), command("doctor", "runs/init")]
    assert not any("tau_slow" in each.output for each in told)
    backbone = ("--set", 'init_from={ run = "runs/byol", parts = ["backbone"] }')
    assert "tau_slow" not in command("check", *slow, *backbone).output, "a copy of what was initialised"


def test_a_target_that_was_apart_in_the_run_is_no_finding() -> None:
    command("train", init_file(), "--steps", "1")
    assert "target_starts_apart" not in command("doctor", "runs/init").output
    facts = read_json(Path("runs/init/facts.json"))
    assert facts["target_gap"] > 0
    assert (facts["initialised"], facts["initialised_by"]) == ("runs/byol, step 8", "run")
    assert command("report", "runs/init").exit_code == 0
    assert "initialised network" in Path("runs/init/report.html").read_text()
