from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, generator
from PIL import Image

from sslkit import health, snapshot
from sslkit.build import build
from sslkit.features import chosen
from sslkit.recipe import parse_recipe
from sslkit.report import text as page_text
from sslkit.run_directory import RunDirectory
from sslkit.trainer import Trainer
from sslkit_watch.report import ReportObserver


class Pictures:
    """`number` images of one colour each, and labels."""

    def __init__(self, number: int, channels: int = 3, side: int = 8, labelled: bool = True) -> None:
        pixels = torch.randint(256, (number, channels, 1, 1), generator=generator(1), dtype=torch.uint8)
        self.tensor = pixels.expand(-1, -1, side, side).contiguous()
        self.labels = torch.arange(number) % 5 if labelled else None

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        return self.tensor[indices]


def a_run(
    train: Pictures, test: Pictures | None = None, *, names: tuple[str, ...] | None = tuple("abcde"), step: int = 0,
    features: dict[str, torch.Tensor] | None = None,
) -> Any:  # fmt: skip
    made = {"train": torch.randn(len(train), 16, generator=generator(2)),
            "test": torch.randn(len(test) if test else 0, 16, generator=generator(3)), **(features or {})}  # fmt: skip
    data = SimpleNamespace(train=train, test=test, class_names=names)
    return SimpleNamespace(data=data, step=step, features=lambda split, indices: made[split][indices], made=made)


def pixels_of(address: str) -> np.ndarray[Any, Any]:
    head, _, body = address.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


# ---------------------------------------------------------------- spectrum


@pytest.mark.parametrize("number", [10, 200])
def test_the_spectrum_is_that_of_the_centred_features(number: int) -> None:
    run = a_run(Pictures(number))
    found = snapshot.take(run)["spectrum"]
    z = run.made["train"].double().numpy()
    expected = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
    assert found["values"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(health.effective_rank(run.made["train"]))
    assert (found["images"], found["dimensions"]) == (number, 16)


# ---------------------------------------------------------------- the plane


def test_pca_shows_the_directions_of_most_variance() -> None:
    run = a_run(Pictures(50), Pictures(300))
    found = snapshot.take(run)["projection"]
    z = run.made["test"].double().numpy()
    z = z - z.mean(axis=0)
    _, sigma, directions = np.linalg.svd(z, full_matrices=False)
    expected = z @ directions[:2].T
    got = np.array(found["pca"])
    for axis in (0, 1):
        cosine = got[:, axis] @ expected[:, axis] / np.linalg.norm(got[:, axis]) / np.linalg.norm(expected[:, axis])
        assert abs(cosine) == pytest.approx(1, abs=1e-6)
    assert np.abs(got).max() == 1
    assert found["explained"] == pytest.approx((sigma[:2] ** 2 / (sigma**2).sum()).tolist(), rel=1e-4)
    assert found["labels"] == ["abcde"[i % 5] for i in range(300)]


def test_tsne_keeps_clusters_together_and_is_the_same_every_time() -> None:
    test = Pictures(100)
    centres = 20 * torch.eye(16)[:5]
    rows = centres[test.labels] + torch.randn(100, 16, generator=generator(4))
    run = a_run(Pictures(20), test, step=snapshot.WORTH_A_MAP, features={"test": rows})
    found = snapshot.take(run)["projection"]
    points, labels = np.array(found["tsne"]), np.array(found["labels"])
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 99 * np.eye(100)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.97
    assert snapshot.take(run)["projection"] == found


def test_a_short_run_waits_for_no_tsne() -> None:
    assert "tsne" not in snapshot.take(a_run(Pictures(20), Pictures(100), step=snapshot.WORTH_A_MAP - 1))["projection"]


@pytest.mark.parametrize("rows", [torch.ones(100, 16), 1e4 + 1e-9 * torch.ones(100, 16), torch.zeros(100, 16)])
def test_collapsed_features_have_no_map(rows: torch.Tensor) -> None:
    found = snapshot.take(a_run(Pictures(20), Pictures(100), step=1000, features={"test": rows, "train": rows[:20]}))
    assert not {"pca", "tsne"} & set(found["projection"])
    assert len(found["neighbours"]["queries"]) == snapshot.QUERIES
    json.dumps(found, allow_nan=False)


def test_at_most_so_many_images_are_looked_at() -> None:
    found = snapshot.take(a_run(Pictures(4000), Pictures(900)))
    assert found["spectrum"]["images"] == found["neighbours"]["bank"] == snapshot.BANK == 3000
    assert len(found["projection"]["pca"]) == len(found["projection"]["labels"]) == snapshot.POINTS == 500


def test_the_images_are_among_those_of_knn() -> None:
    """Whose features are known by then, so that they cost no forward pass."""
    asked: dict[str, torch.Tensor] = {}
    train, test = Pictures(12_000), Pictures(3_000)
    run = a_run(train, test)
    features = run.features
    run.features = lambda split, indices: (asked.update({split: indices}), features(split, indices))[1]
    snapshot.take(run)
    assert torch.isin(asked["train"], chosen(train, 10_000)).all()
    assert torch.isin(asked["test"], chosen(test, 2_000)).all()


# ---------------------------------------------------------------- neighbours


def test_neighbours_are_the_most_similar_images_of_the_bank() -> None:
    train, test = Pictures(60), Pictures(40)
    run = a_run(train, test)
    found = snapshot.take(run)["neighbours"]
    assert found["split"] == "test"
    bank = torch.nn.functional.normalize(run.made["train"].double(), dim=1)
    for query, place in zip(found["queries"], [0, 6, 11, 17, 22, 28, 33, 39], strict=True):
        row = torch.nn.functional.normalize(run.made["test"][place].double(), dim=0)
        values, nearest = (bank @ row).topk(6)
        assert [cell["cosine"] for cell in query["neighbours"]] == pytest.approx(values.tolist(), abs=1e-4)
        assert query["label"] == "abcde"[place % 5]
        for cell, index in zip(query["neighbours"], nearest.tolist(), strict=True):
            assert (pixels_of(cell["image"]) == train.tensor[index].permute(1, 2, 0).numpy()).all()
            assert cell["label"] == "abcde"[index % 5]
            assert cell["agrees"] == (index % 5 == place % 5)
        assert (pixels_of(query["image"]) == test.tensor[place].permute(1, 2, 0).numpy()).all()


def test_without_test_images_training_images_are_looked_at_and_none_is_its_own_neighbour() -> None:
    train = Pictures(40)
    found = snapshot.take(a_run(train))
    assert found["projection"]["split"] == found["neighbours"]["split"] == "train"
    for query in found["neighbours"]["queries"]:
        assert max(cell["cosine"] for cell in query["neighbours"]) < 0.999


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("tested", [True, False])
def test_few_images_are_enough(number: int, tested: bool) -> None:
    found = snapshot.take(a_run(Pictures(number), Pictures(number) if tested else None, step=1000))
    assert len(found["neighbours"]["queries"]) == number
    assert {len(query["neighbours"]) for query in found["neighbours"]["queries"]} == {number - (not tested)}
    json.dumps(found, allow_nan=False)


def test_without_labels_nothing_agrees_or_differs() -> None:
    found = snapshot.take(a_run(Pictures(30, labelled=False), Pictures(30, labelled=False), names=None))
    assert found["projection"]["labels"] == []
    cells = [cell for query in found["neighbours"]["queries"] for cell in [query, *query["neighbours"]]]
    assert {cell["label"] for cell in cells} == {None}
    assert {cell["agrees"] for query in found["neighbours"]["queries"] for cell in query["neighbours"]} == {None}


def test_labels_without_names_are_numbers() -> None:
    found = snapshot.take(a_run(Pictures(30), Pictures(30), names=None))
    assert set(found["projection"]["labels"]) == set("01234")


@pytest.mark.parametrize(("channels", "shape"), [(1, (8, 8)), (3, (8, 8, 3)), (2, (8, 8)), (4, (8, 8, 3))])
def test_pictures_are_grey_or_coloured(channels: int, shape: tuple[int, ...]) -> None:
    found = snapshot.take(a_run(Pictures(10, channels), Pictures(10, channels)))
    assert pixels_of(found["neighbours"]["queries"][0]["image"]).shape == shape


def test_large_pictures_are_made_small() -> None:
    found = snapshot.take(a_run(Pictures(5, side=200)))
    assert pixels_of(found["neighbours"]["queries"][0]["image"]).shape == (64, 64, 3)


def test_features_that_are_not_finite_are_said_to_be() -> None:
    rows = torch.full((10, 16), torch.nan)
    found = snapshot.take(a_run(Pictures(10), Pictures(10), features={"test": rows}))
    assert set(found) == {"step", "missing"}
    assert "not finite" in found["missing"][0]


# ---------------------------------------------------------------- in a run


def test_a_run_ends_with_a_page_and_trains_the_same(tmp_path: Path) -> None:
    losses = {}
    for watched in (False, True):
        parts = build(parse_recipe(TINY, "r.toml"), torch.device("cpu"), print)
        parts.observers.pop("report", None)
        if watched:
            parts.observers["report"] = ReportObserver(snapshot=True)
        files, said = RunDirectory(tmp_path / f"run-{watched}"), []
        files.open_metrics(0)
        trainer = Trainer(parts, files, say=said.append)
        trainer.fit(20)
        trainer.bus.emit("run_ended", run=trainer, status="done")
        files.close()
        lines = (files.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[watched] = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
        assert (files.path / "report.html").is_file() == (files.path / "snapshot.json").is_file() == watched
    assert losses[True] == losses[False]
    assert said[-1] == f"report: {tmp_path / 'run-True' / 'report.html'}"
    page = page_text(tmp_path / "run-True")
    assert page.count('<div class="row">') == snapshot.QUERIES
    assert "Features in the plane" in page
