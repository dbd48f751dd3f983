"""`init_from` a file or timm: what is taken, what is left out, what is refused, and that it is pinned."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY as WHOLE
from conftest import run
from safetensors.torch import save_file
from torch import Tensor, nn

import sslkit
from sslkit import evaluation
from sslkit.api import Pretrained
from sslkit.build import Parts, choose_device
from sslkit.errors import UserError
from sslkit.initialise import pinned
from sslkit.opened_run import digest_of
from sslkit.preparation import prepare
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.run_directory import read_json, read_metrics
from sslkit.starting_point import PICKLES, InitFrom
from sslkit_convnet import ConvNet

OFF = ("health", "probe", "tensorboard", "report")
TINY = WHOLE + "".join(f'\n[[observers]]\nuse = "{name}"\nenabled = false\n' for name in OFF)
"""The tiny recipe without what takes longer than its training."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(init: object, *overrides: str) -> Recipe:
    if isinstance(init, dict):
        text = "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in init.items()) + " }"
    else:
        text = json.dumps(init)
    return parse_recipe(f"init_from = {text}\n{TINY}", "r.toml", overrides)


def prepared(init: object, *overrides: str, said: list[str] | None = None) -> Parts:
    lines = said if said is not None else []
    return prepare(recipe(init, *overrides), None, (), choose_device("cpu"), lines.append)[0]


def refused(init: object, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        prepared(init, *overrides)
    (line,) = caught.value.lines
    return line


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Weights of the tiny recipe's backbone, other than the ones that its seed draws."""
    drawn = prepare(parse_recipe(TINY, "r.toml"), None, (), choose_device("cpu"), lambda _: None)[0]
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in drawn.model.online.backbone.state_dict().items()
    }


def same(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    state = module.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("init", ["w.safetensors", {"file": "w.safetensors"}])
def test_a_file_gives_the_backbone_and_the_target_is_a_copy_of_it(init: object, weights: dict[str, Tensor]) -> None:
    save_file(weights, "w.safetensors")
    said: list[str] = []
    parts = prepared(init, said=said)
    assert same(parts.model.online.backbone, weights)
    assert same(parts.model.target.backbone, weights)  # type: ignore[union-attr, arg-type]
    drawn = prepare(parse_recipe(TINY, "r.toml"), None, (), choose_device("cpu"), said.append)[0]
    assert same(parts.model.online.projector, drawn.model.online.projector.state_dict())
    assert said == ["initialised from w.safetensors: backbone; heads and loss begin as drawn"]


def test_a_prefix_is_taken_off_and_what_is_ignored_is_left_out(weights: dict[str, Tensor]) -> None:
    whole = {f"encoder.{name}": value for name, value in weights.items()}
    save_file({**whole, "encoder.fc.weight": torch.ones(2), "decoder.x": torch.ones(1)}, "w.safetensors")
    said: list[str] = []
    parts = prepared({"file": "w.safetensors", "prefix": "encoder.", "ignore": ["fc.*"]}, said=said)
    assert same(parts.model.online.backbone, weights)
    assert said[1] == "not taken from w.safetensors: decoder.x, encoder.fc.weight"
    assert "encoder.fc.weight" not in refused({"file": "w.safetensors", "prefix": "encoder."})
    assert "fc.weight is unknown here" in refused({"file": "w.safetensors", "prefix": "encoder."})


def test_what_does_not_fit_is_named(weights: dict[str, Tensor]) -> None:
    first = next(iter(weights))
    save_file({name: value for name, value in weights.items() if name != first}, "less.safetensors")
    assert f"{first} is missing there" in refused("less.safetensors")
    save_file({**weights, first: torch.ones(1)}, "other.safetensors")
    assert f"{first} is [1] there and " in refused("other.safetensors")
    save_file(weights, "w.safetensors")
    assert "init_from.prefix: no tensor of w.safetensors begins with 'x.'" in refused(
        {"file": "w.safetensors", "prefix": "x."}
    )
    assert "init_from.ignore: 'fc.*' matches no tensor" in refused({"file": "w.safetensors", "ignore": ["fc.*"]})


def test_weights_that_are_no_numbers_to_begin_with_are_named(weights: dict[str, Tensor]) -> None:
    name = list(weights)[1]
    for number in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            wrong = weights[name].clone().to(dtype)
            wrong.view(-1)[0] = number
            save_file({**weights, name: wrong}, "w.safetensors")
            says = f"init_from: w.safetensors: {name} has values that are not finite"
            assert refused("w.safetensors").startswith(says)
    for given in (torch.int8, torch.bool):
        save_file({**weights, name: weights[name].to(given)}, "w.safetensors")
        there = str(given).removeprefix("torch.")
        assert f"does not fit the backbone: {name} is {there} there and float32 here" in refused("w.safetensors")
    save_file({key: value.half() for key, value in weights.items()}, "w.safetensors")
    prepared("w.safetensors")


def test_files_that_are_none(weights: dict[str, Tensor]) -> None:
    assert "is not there" in refused("w.safetensors")
    Path("w.safetensors").write_bytes(b"\xff" * 100)
    assert "is no sound .safetensors file" in refused("w.safetensors")
    Path("d.safetensors").mkdir()
    assert "is a folder or a device" in refused("d.safetensors")
    torch.save(weights, "w.pth")
    assert "may run code" in refused({"file": "w.pth"})
    if hasattr(os, "mkfifo"):
        os.mkfifo("p.safetensors")
        assert "is a folder or a device" in refused("p.safetensors")


@pytest.mark.parametrize("place", ["w.pth", "their weights/it's.pth.tar"])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_the_conversion_that_the_refusal_names_gives_the_file(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, place: str, key: str | None
) -> None:
    # `python` is that of the environment that sslkit is in, whether or not it is activated.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    Path(place).parent.mkdir(exist_ok=True)
    torch.save(weights if key is None else {key: weights, "epoch": 3}, place)
    command = refused({"file": place}).partition("convert it: ")[2]
    assert str(Path.cwd()) not in command
    assert os.system(command) == 0
    assert same(prepared({"file": str(Path(place).with_suffix(".safetensors"))}).model.online.backbone, weights)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ({"file": "a.safetensors", "run": "runs/x"}, "exactly one of 'run', 'timm' and 'file', not 'run' and 'file'"),
        ({"prefix": "x."}, "exactly one of 'run', 'timm' and 'file', not none"),
        ({"timm": "resnet18", "parts": ["backbone", "projector"]}, "'parts' can only be those of a run"),
        ({"timm": "resnet18", "prefix": "x."}, "'prefix' and 'ignore' are about the names in a 'file'"),
        ({"timm": "resnet18", "branch": "target"}, "'checkpoint' and 'branch' are those of a run"),
    ],
)
def test_tables_that_contradict_themselves(init: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(init)


def test_short_forms_and_paths() -> None:
    assert recipe("timm:resnet18.a1_in1k").init_from.timm == "resnet18.a1_in1k"  # type: ignore[union-attr]
    here = Path.cwd().as_posix()
    assert recipe("sub/w.safetensors").init_from.file == f"{here}/sub/w.safetensors"  # type: ignore[union-attr]
    override = parse_recipe(TINY, "elsewhere/r.toml", ["init_from.file=w.safetensors"])
    assert override.init_from.file == f"{here}/w.safetensors"  # type: ignore[union-attr]


# ---------------------------------------------------------------- what is recorded


def test_the_lock_pins_the_weights_and_the_path_is_not_in_the_hash(weights: dict[str, Tensor]) -> None:
    save_file(weights, "w.safetensors")
    first = sslkit.train(recipe("w.safetensors"), run_dir="runs/a", steps=3, quiet=True)
    lock = parse_recipe(Path("runs/a/recipe.lock.toml").read_text(), "runs/a/recipe.lock.toml")
    assert lock.init_from.weights == pinned(recipe("w.safetensors")).init_from.weights  # type: ignore[union-attr]
    assert lock.hash() == pinned(recipe("w.safetensors")).hash()
    shutil.copy("w.safetensors", "copy.safetensors")
    assert pinned(recipe("copy.safetensors")).hash() == lock.hash()
    origin = read_json(Path("runs/a/env.json"))["initialised"]
    assert (origin["file"], origin["taken"]) == ("w.safetensors", ["backbone"])
    again = sslkit.train(lock, run_dir="runs/b", steps=3, quiet=True)
    assert [r["loss"] for r in read_metrics(again.directory) if "loss" in r] == [
        r["loss"] for r in read_metrics(first.directory) if "loss" in r
    ]

    save_file({name: value + 1 for name, value in weights.items()}, "w.safetensors")
    with pytest.raises(UserError, match="names other weights than"):
        sslkit.train(lock, run_dir="runs/c", steps=3, quiet=True)


def test_a_run_that_has_begun_does_not_need_the_file_any_more(weights: dict[str, Tensor]) -> None:
    save_file(weights, "w.safetensors")
    sslkit.train(recipe("w.safetensors"), run_dir="runs/a", steps=3, quiet=True)
    shutil.copy("w.safetensors", "copy.safetensors")
    sslkit.train(recipe("copy.safetensors"), run_dir="runs/a", steps=4, quiet=True)
    Path("w.safetensors").unlink()
    sslkit.train(recipe("w.safetensors"), run_dir="runs/a", steps=5, quiet=True)
    with pytest.raises(UserError, match="another recipe") as caught:
        sslkit.train(recipe({"file": "w.safetensors", "prefix": "x"}), run_dir="runs/a", steps=6, quiet=True)
    assert "init_from" in str(caught.value)
    with pytest.raises(UserError, match="another recipe"):
        sslkit.train(parse_recipe(TINY, "r.toml"), run_dir="runs/a", steps=6, quiet=True)


def test_check_says_where_the_weights_are_from(weights: dict[str, Tensor]) -> None:
    save_file(weights, "w.safetensors")
    Path("r.toml").write_text('init_from = "w.safetensors"\n' + TINY)
    assert "initialised from w.safetensors: backbone" in run("check", "r.toml").output
    Path("w.safetensors").unlink()
    told = run("check", "r.toml")
    assert told.exit_code == 2
    assert "r.toml:1: init_from.file: w.safetensors: is not there" in told.output


# ---------------------------------------------------------------- timm


@pytest.fixture
def fetched(weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What names the backbone was asked for; what it gives are `weights`, and a number drawn at random."""
    names: list[str] = []

    def given(self: ConvNet, name: str, run: Any) -> Pretrained:
        names.append(name)
        first = next(iter(weights))
        return Pretrained({**weights, first: torch.rand(weights[first].shape)}, weights)

    monkeypatch.setattr(ConvNet, "pretrained_weights", given)
    return names


def test_timms_weights_are_the_backbones_and_what_is_drawn_follows_from_the_seed(
    fetched: list[str], weights: dict[str, Tensor]
) -> None:
    said: list[str] = []
    a, b = prepared("timm:some.tag", said=said), prepared({"timm": "some.tag"})
    assert fetched == ["some.tag"] * 2
    assert said == ["initialised from timm's some.tag: backbone; heads and loss begin as drawn"]
    assert same(a.model.online.backbone, b.model.online.backbone.state_dict())
    state = a.model.online.backbone.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in list(weights)[1:])
    another = prepared("timm:some.tag", "seed=1")
    other = another.model.online.backbone.state_dict()
    assert not torch.equal(other[next(iter(weights))], state[next(iter(weights))])
    digests = {parts.recipe.init_from.weights for parts in (a, b, another)}  # type: ignore[union-attr]
    assert digests == {digest_of(weights)}, "what is drawn is no part of what timm has"


def test_a_folder_of_timms_is_seen_from_the_recipe_and_the_lock_file_from_itself(fetched: list[str]) -> None:
    Path("deep").mkdir()
    here = Path.cwd().as_posix()
    Path("deep/r.toml").write_text('init_from = "timm:local-dir:../rn"\n' + TINY)
    deep = read_recipe("deep/r.toml")
    assert deep.init_from == InitFrom(timm=f"local-dir:{here}/rn")
    assert deep.init_from.words == "timm's local-dir:rn"  # type: ignore[union-attr]
    for override in ("init_from=timm:local-dir:x", "init_from.timm=local-dir:x"):
        assert read_recipe("deep/r.toml", [override]).init_from == InitFrom(timm=f"local-dir:{here}/x")
    for name in ("hf-hub:somebody/rn", "local-dir:"):
        assert recipe({"timm": name}).init_from == InitFrom(timm=name)

    sslkit.train(deep, run_dir="runs/a", steps=2, quiet=True)
    assert fetched == [f"local-dir:{here}/rn"]
    text = Path("runs/a/recipe.lock.toml").read_text()
    assert "local-dir:../../rn" in text
    assert parse_recipe(text, "runs/a/recipe.lock.toml").init_from.timm == fetched[0]  # type: ignore[union-attr]
    assert read_json(Path("runs/a/env.json"))["initialised"]["timm"] == "local-dir:rn"
    sslkit.train(deep, run_dir="runs/a", steps=3, quiet=True)


def test_timms_weights_are_pinned_and_not_fetched_again(fetched: list[str]) -> None:
    sslkit.train(recipe("timm:some.tag"), run_dir="runs/a", steps=3, quiet=True)
    lock = parse_recipe(Path("runs/a/recipe.lock.toml").read_text(), "runs/a/recipe.lock.toml")
    assert lock.init_from.weights  # type: ignore[union-attr]
    asked = len(fetched)
    sslkit.train(recipe("timm:some.tag"), run_dir="runs/a", steps=5, quiet=True)
    assert len(fetched) == asked
    with pytest.raises(UserError, match="another recipe"):
        sslkit.train(recipe("timm:other.tag"), run_dir="runs/a", steps=6, quiet=True)
    changed = lock.replace(init_from={"timm": "some.tag", "weights": "0" * 64})
    with pytest.raises(UserError, match=r"names other weights than timm's some.tag"):
        sslkit.train(changed, run_dir="runs/b", steps=3, quiet=True)


def test_what_a_run_began_with_is_measured_beside_it(fetched: list[str]) -> None:
    sslkit.train(recipe("timm:some.tag"), run_dir="runs/a", steps=2, quiet=True)
    (record,) = evaluation.evaluate(Path("runs/a"), ["knn"], k=20, bank=200, queries=100).records
    assert fetched == ["some.tag"] * 2
    assert 0 < record["initialised"] < 1


def test_a_backbone_that_is_not_timms_says_so() -> None:
    assert "init_from.timm: backbone 'convnet' is not one of timm's" in refused("timm:resnet18")


@pytest.mark.parametrize("end", PICKLES)
def test_a_pickle_named_alone_is_refused_as_one(end: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{end}"
    file.write_bytes(b"")
    done = run("check", "quickstart", "--set", f"init_from={file}")
    assert done.exit_code == 2
    assert "torch.save" in done.output
    assert "save_file" in done.output
