"""`train.freeze`: what is named stays to the last bit, in both branches, and the rest is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn

import sslkit
from sslkit import checkpoint, doctor
from sslkit.build import Parts, choose_device
from sslkit.errors import UserError
from sslkit.freezing import freeze
from sslkit.preparation import prepare
from sslkit.recipe import parse_recipe
from sslkit.rules import Facts
from sslkit.starting_point import InitFrom
from sslkit_rules.frozen import frozen_random

OFF = ("health", "probe", "tensorboard", "report")
QUIET = TINY + "".join(f'\n[[observers]]\nuse = "{name}"\nenabled = false\n' for name in OFF)


FROZEN = 'train.freeze=["blocks.[01]"]'
"""The first convolution and its BatchNorm."""


def prepared(*overrides: str) -> tuple[Parts, Facts]:
    return prepare(parse_recipe(QUIET, "r.toml", overrides), None, (), choose_device("cpu"), lambda _: None)


def saved(run: Path) -> dict[str, Tensor]:
    found, _ = checkpoint.newest(run / "checkpoints")
    assert found
    weights: dict[str, Tensor] = found.parts["model"]
    return weights


def test_what_is_frozen_is_bit_equal_after_twenty_steps_and_the_rest_has_moved(
    tmp_path: Path,
) -> None:
    before = prepared(FROZEN)[0].model.state_dict()
    recipe = parse_recipe(QUIET, "r.toml", [FROZEN])
    sslkit.train(recipe, run_dir=tmp_path / "run", steps=20, quiet=True)
    after = saved(tmp_path / "run")
    kept = [name for name in after if ".backbone.blocks.0." in name or ".backbone.blocks.1." in name]
    assert any("running_mean" in name for name in kept), "statistics of BatchNorm are among them"
    assert {name.split(".")[0] for name in kept} == {"online", "target"}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    moved = [n for n, v in after.items() if n not in kept and v.is_floating_point() and v.numel() > 1]
    assert moved
    assert not any(torch.equal(after[name], before[name]) for name in moved)


def test_a_frozen_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = parse_recipe(QUIET, "r.toml", [FROZEN])
    sslkit.train(recipe, run_dir=tmp_path / "whole", steps=9, quiet=True)
    sslkit.train(recipe, run_dir=tmp_path / "parts", steps=5, quiet=True)
    sslkit.train(recipe, run_dir=tmp_path / "parts", steps=9, quiet=True)
    a, b = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_nothing_that_is_frozen_reaches_the_optimizer() -> None:
    parts, facts = prepared(FROZEN)
    given = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    still = [p for p in parts.model.parameters() if not p.requires_grad]
    assert still
    assert not any(id(p) in given for p in still)
    assert facts.unoptimised == ()


def network() -> nn.Module:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(stage, nn.Linear(4, 2))


def test_modules_and_parameters_are_named_exactly_or_by_a_pattern() -> None:
    made = network()
    freeze(made, None, ["0.1", "1.bias"])
    assert [name for name, p in made.named_parameters() if not p.requires_grad] == ["0.1.weight", "0.1.bias", "1.bias"]
    assert [name for name, module in made.named_modules() if not module.training] == ["0.1"]
    made = network()
    freeze(made, None, ["0.*"])
    assert not made[0][1].training  # type: ignore[index]
    assert made[1].weight.requires_grad  # type: ignore[index]


def test_a_target_without_a_backbone_is_left_alone() -> None:
    other = network()
    freeze(network(), other, ["0"])
    assert all(module.training for module in other.modules())


def test_names_that_are_none_and_freezing_everything() -> None:
    with pytest.raises(UserError, match=r"train.freeze: the backbone has no module '0.2'; did you mean '0\.\d'\?"):
        freeze(network(), None, ["0.2"])
    with pytest.raises(UserError, match="names the whole backbone"):
        freeze(network(), None, ["*"])


def test_a_recipe_without_it_hashes_as_before() -> None:
    assert "freeze" not in parse_recipe(TINY, "r.toml").computing()["train"]


# ---------------------------------------------------------------- the rule


def seen(**tables: Any) -> Any:
    assert frozen_random.before
    start = tables.pop("start", None)
    known = {"initialised": start.words, "initialised_by": start.place} if start else {}
    return frozen_random.before(Facts(recipe=tables, **known))


def test_frozen_weights_that_were_never_trained_are_warned_of() -> None:
    assert "layer1" in seen(train={"freeze": ["layer1"]}, backbone={"use": "timm"})
    assert seen(train={}, backbone={"use": "timm"}) is None
    assert seen(train={"freeze": ["layer1"]}, start=InitFrom(run="runs/x")) is None
    assert seen(train={"freeze": ["layer1"]}, backbone={"pretrained": True}) is None
    assert seen(train={"freeze": ["patch_embed"]}, backbone={}) is None, "MoCo v3's trick"
    small = {"pretrained": True, "stem": "small_image"}
    assert "conv1" in seen(train={"freeze": ["conv1", "layer1"]}, backbone=small)
    assert seen(train={"freeze": ["layer1"]}, backbone=small) is None
    timms = InitFrom(timm="resnet18.a1_in1k")
    assert seen(train={"freeze": ["conv1"]}, backbone=small, start=InitFrom(file="timm's w.safetensors")) is None
    for pattern in ("conv1", "conv*", "conv1.weight"):
        assert "conv1" in seen(train={"freeze": [pattern]}, backbone={"stem": "small_image"}, start=timms)
    assert seen(train={"freeze": ["layer1"]}, backbone={"stem": "small_image"}, start=timms) is None
    assert seen(train={"freeze": ["conv1", "layer1"]}, backbone={}, start=timms) is None


def test_facts_of_an_older_run_do_not_say_what_kind_of_start_it_had() -> None:
    assert frozen_random.before
    older = Facts.model_validate({"recipe": {"train": {"freeze": ["conv1"]}}, "initialised": "timm's resnet18.a1_in1k"})
    assert (older.initialised_by, frozen_random.before(older)) == ("", None)


def test_the_rule_is_one() -> None:
    assert doctor.RANKS[frozen_random.severity] == 1
