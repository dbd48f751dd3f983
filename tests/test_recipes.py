"""Every recipe that ships: it resolves, says where its numbers come from, and trains."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import noisy_cifar10, noisy_photos

from sslkit.cli import main
from sslkit.recipe import parse_recipe, read_recipe
from sslkit.sources import shipped

NAMES = sorted(shipped())
DATA = Path(os.environ.get("SSLKIT_DATA", "nowhere"))


@pytest.mark.parametrize("name", NAMES)
def test_it_resolves_and_survives_being_written(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert parse_recipe(recipe.to_toml(), "again.toml") == recipe


@pytest.mark.parametrize("name", NAMES)
def test_its_first_line_says_what_it_is(name: str) -> None:
    first = shipped()[name].read_text(encoding="utf-8").splitlines()[0]
    assert re.match(r"# \S.{20,}", first)


def test_byol_is_what_the_paper_and_solo_learn_say() -> None:
    table = json.loads(read_recipe("byol_cifar10").model_dump_json())
    assert table["backbone"] == table["backbone"] | {"use": "timm", "model": "resnet18", "stem": "small_image"}
    for head in ("projector", "predictor"):
        assert (table[head]["hidden_dim"], table[head]["out_dim"], table[head]["output_norm"]) == (4096, 256, "none")
    assert table["loss"] == {"use": "cosine", "form": "byol", "targets": "each"}
    tau = table["target_updater"]["tau"]
    assert (tau["use"], tau["start"], tau["end"]) == ("cosine", 0.99, 1.0)
    optimizer = table["optimizer"]
    assert (optimizer["use"], optimizer["lr"]["peak"], optimizer["lr_reference_batch"]) == ("lars", 1.0, 256)
    assert (optimizer["weight_decay"], optimizer["exclude_bias_and_norm"]) == (1e-5, True)
    assert (table["train"]["epochs"], table["train"]["batch_size"]) == (200, 256)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def records(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def slice_of_cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 640 training and 100 test images of real CIFAR-10, as a data folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10").mkdir()
    for split, images in (("train", 640), ("test", 100)):
        table = pq.read_table(DATA / "cifar10" / f"{split}.parquet")
        pq.write_table(table.slice(0, images), folder / "cifar10" / f"{split}.parquet")
    return folder


SMALL = ["train.batch_size=16", "train.compile=false", "train.log_every=1", "observers.knn.bank=64",
         "observers.knn.queries=32", "backbone.model=resnet10t", "backbone.stem=default",
         'train.accept=["batch_norm_small", "few_negatives", "stem_too_coarse"]']  # fmt: skip
"""What makes a recipe small enough for a test; everything of the method stays. It accepts what is due to that."""
SMALLER = {
    "mocov2_cifar10": ["loss.queue=64"],
    "nnbyol_cifar10": ["loss.queue=64"],
    "nnclr_cifar10": ["loss.queue=64"],
    "ressl_cifar10": ["loss.queue=64"],
    # The queue from the start; prototypes and a last layer that move within the fifteen steps.
    "swav_cifar10": ["loss.queue=64", "loss.queue_start_epochs=0.2", "loss.freeze_prototypes_epochs=0.1"],
    "dino_cifar10": ["projector.freeze_last_layer_epochs=0.1"],
    "empssl_cifar10": ["train.batch_size=8", "view_generator.views=[{count=4}]"],
    "wmse_cifar10": ["train.batch_size=64", "loss.sub_batch=32", "projector.out_dim=16"],
    "byol_images96": ["view_generator.size=32", "data_source.size=32"],
    "byol_images224": ["view_generator.size=32", "data_source.size=32"],
    "dino_images224": [
        "backbone.model=vit_tiny_patch16_224", "data_source.size=32", "projector.hidden_dim=256",
        "projector.out_dim=64", "projector.freeze_last_layer_epochs=0.1", "target_updater.tau.start=0.99",
        'view_generator.views=[{size=32},{size=32},{count=2,kind="local",size=16}]',
    ],
}  # fmt: skip
"""What else a recipe needs, where its own figures do not fit batches of 16."""


def small(name: str) -> list[str]:
    return [word for setting in [*SMALL, *SMALLER.get(name, [])] for word in ("--set", setting)]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 training and 100 test images of noise in CIFAR-10's layout, as a data folder."""
    folder = tmp_path_factory.mktemp("noise")
    noisy_cifar10(folder, train=640, test=100)
    return folder


@pytest.mark.parametrize("name", [n for n in NAMES if "cifar10" in n])
def test_the_cifar10_recipes_build_without_a_finding_and_take_a_step(
    name: str, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKIT_DATA", str(noise))
    monkeypatch.chdir(tmp_path)
    said = run("train", name, *small(name), "--set", "train.keep_checkpoints=1", "--steps", "1")
    assert "warning" not in said, said
    (loss,) = [r["loss"] for r in records(f"runs/{name}") if "loss" in r]
    assert math.isfinite(loss)


@pytest.mark.parametrize("name", [n for n in NAMES if "images" in n])
def test_the_recipes_for_folders_cut_views_from_originals_without_a_finding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy_photos(tmp_path, train=160, test=20)
    monkeypatch.setenv("SSLKIT_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    said = run("train", name, *small(name), "--set", "train.keep_checkpoints=1", "--steps", "2")
    assert "warning" not in said, said
    losses = [r["loss"] for r in records(f"runs/{name}") if "loss" in r]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="needs real CIFAR-10 under $SSLKIT_DATA")
@pytest.mark.parametrize("name", [n for n in NAMES if "cifar10" in n])
def test_the_cifar10_recipes_train_on_real_images(
    name: str, slice_of_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifteen steps, finite and without a warning. That each goes on exactly is shown in tests/test_resume.py."""
    monkeypatch.setenv("SSLKIT_DATA", str(slice_of_cifar10))
    monkeypatch.chdir(tmp_path)
    said = run("train", name, *small(name), "--steps", "15", "--run-dir", "run")
    assert "warning" not in said, said
    losses = {r["step"]: r["loss"] for r in records("run") if "loss" in r}
    assert list(losses) == list(range(1, 16))
    assert all(loss is not None and math.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) > 12, "it moves"
