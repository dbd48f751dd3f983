"""What a run's directory gives to those who use it: weights, their digest, the projector, the network it began with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import test_embedding
import torch
from test_python_api import mine
from torch import nn

import sslkit
from sslkit.build import build
from sslkit.checkpoint import listed, load
from sslkit.encoder import encoder_of, load_encoder
from sslkit.opened_run import digest_of, open_run

run = test_embedding.run


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def test_the_initial_backbone_is_the_one_that_the_run_began_with(run: Path) -> None:
    parts = build(mine(), torch.device("cpu"), print)
    began = {
        name.removeprefix("online.backbone."): value
        for name, value in parts.model.state_dict().items()
        if name.startswith("online.backbone.")
    }
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    initial = open_run(run).initial_backbone().state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "nothing else is drawn differently"
    assert initial.keys() == began.keys()
    assert all(torch.equal(initial[name], value) for name, value in began.items())
    assert digest_of(initial) != open_run(run).weights


def test_the_projector_has_the_weights_of_the_branch(run: Path) -> None:
    model = load(listed(run / "checkpoints")[-1], wanted=("model",)).parts["model"]
    for branch in ("online", "target"):
        found = open_run(run, branch).projector().state_dict()  # type: ignore[arg-type]
        assert found
        assert all(torch.equal(value, model[f"{branch}.projector.{name}"]) for name, value in found.items())


def test_the_recipe_is_the_whole_one(run: Path) -> None:
    opened = open_run(run)
    assert opened.recipe().hash() == opened.facts["recipe_hash"]
    assert opened.recipe(["train.batch_size=64"]).train.batch_size == 64
    with pytest.raises(sslkit.UserError, match="batch_sise"):
        opened.recipe(["train.batch_sise=64"])


def test_weights_are_told_apart_by_their_digest(run: Path) -> None:
    last = open_run(run)
    assert open_run(run).weights == last.weights == digest_of(open_run(run).backbone.state_dict())
    assert len({last.weights, open_run(run, "target").weights, open_run(run, checkpoint=5).weights}) == 3
    encoder = encoder_of(last)
    assert digest_of(encoder.backbone.state_dict()) == last.weights, "the memory format is no part of it"


def test_a_digest_holds_names_types_shapes_and_values() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    others = (
        {"b": weights["a"], "n": weights["n"]},
        {"a": weights["a"].view(3, 2), "n": weights["n"]},
        {"a": weights["a"].view(torch.int32), "n": weights["n"]},
        {"a": weights["a"] + 1e-6, "n": weights["n"]},
        {"a": weights["a"], "n": torch.tensor(4)},
        {"a": weights["a"]},
        {"a": weights["a"][:, :0], "n": weights["n"]},
        {"a": weights["a"].bfloat16(), "n": weights["n"]},
    )
    assert len({digest_of(w) for w in (weights, *others)}) == len(others) + 1
    assert digest_of({"n": weights["n"], "a": weights["a"].t().contiguous().t()}) == digest_of(weights)


def test_an_encoder_of_another_backbone_prepares_images_alike(run: Path) -> None:
    opened = open_run(run)
    given: list[torch.Tensor] = []

    class Width(nn.Module):
        feature_dim = 3

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            given.append(images)
            return images.mean(dim=(2, 3))

    other = encoder_of(opened, Width())
    pictures = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert other.features(pictures).shape == (4, other.feature_dim) == (4, 3)
    assert torch.equal(given[0], opened.views.clean(pictures))
    assert torch.equal(encoder_of(opened).features(pictures), load_encoder(run).features(pictures))


@pytest.mark.parametrize("table", ["backbone", "view_generator", "projector", "train"])
def test_a_lock_file_that_was_changed_by_hand_is_told(copied: Path, table: str) -> None:
    lock = copied / "recipe.lock.toml"
    kept, skipping = [f"{table} = 3"], False
    for line in lock.read_text(encoding="utf-8").splitlines():
        skipping = line.startswith(f"[{table}") if line.startswith("[") else skipping
        kept += [] if skipping else [line]
    lock.write_text("\n".join(kept), encoding="utf-8")
    with pytest.raises(sslkit.UserError, match=rf"recipe\.lock\.toml: {table}: should be a table"):
        open_run(copied)
