"""What evaluations of a run leave behind, for those that come after them and beside them."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run as command
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from test_evaluation import SMALL, copied, folder_of_images, opened, trained_on
from torch import Tensor

import sslkit
from sslkit import evaluation, evaluation_file, features
from sslkit.evaluation import extracting, material, scoring, told
from sslkit.evaluation.protocols import Wanted
from sslkit.exporting import card
from sslkit.opened_run import open_run
from sslkit.report.evaluated import evaluated
from sslkit.run_directory import refuse_strays

HUGE = int("1" + "0" * 400)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copied(tmp_path / "run")


class Set:
    """As many images as are asked for, of which nothing is read."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number


class Shards(Set):
    """Gives the first images of a set, or fewer than are asked for."""

    def sample(self, n: int) -> Tensor:
        return torch.arange(max(1, n - 2))


# ---------------------------------------------------------------- which images


def test_views_of_an_image_do_not_depend_on_what_was_asked_for_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 64)
    whole = opened(run, queries=0, keep=False)
    network = material.networks(whole, "backbone", floor=False)[0]
    alone = extracting.features_of(whole, network, whole.test, 3)
    assert len(alone) > 2 * 64
    some = opened(run, queries=20)
    extracting.features_of(some, network, some.test, 3)
    later = opened(run, queries=0)
    said: list[str] = []
    later.say = said.append
    torch.testing.assert_close(extracting.features_of(later, network, later.test, 3), alone, rtol=1e-5, atol=1e-6)
    assert f"features of {len(alone) - 20}" in said[0], "what was kept is used"
    rows = alone[torch.searchsorted(whole.test.where, some.test.where)]
    torch.testing.assert_close(extracting.features_of(some, network, some.test, 3), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("images", [Set(1000), Shards(1000)])
def test_so_many_are_chosen_among_labelled_images(images: Set) -> None:
    labelled = torch.arange(0, 1000, 10)
    split = material.Split("test", images, labelled, labelled % 7)  # type: ignore[arg-type]
    found = material.some(split, 30)
    assert len(found.where) == 30
    assert torch.isin(found.where, labelled).all()
    assert torch.equal(found.labels, found.where % 7)
    assert (found.where.diff() > 0).all()
    assert torch.equal(material.some(split, 30).where, found.where)
    assert material.some(split, 0) is split
    assert material.some(split, 100) is split
    whole = material.Split("test", images, torch.arange(1000), torch.zeros(1000, dtype=torch.int64))  # type: ignore[arg-type]
    assert torch.equal(material.some(whole, 30).where, features.chosen(images, 30)), "those of the observer knn"  # type: ignore[arg-type]


def test_queries_are_labelled_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = material.open_data

    def partly(*arguments: object) -> object:
        data = real(*arguments)  # type: ignore[arg-type]
        data.test.labels[torch.arange(len(data.test)) % 5 != 0] = -1  # type: ignore[index, union-attr, arg-type]
        return data

    monkeypatch.setattr(material, "open_data", partly)
    found = opened(run, queries=20)
    assert len(found.test.where) == 20
    assert (found.test.where % 5 == 0).all()


def test_a_bank_is_of_images_that_are_not_held_out(tmp_path: Path) -> None:
    run = trained_on(folder_of_images(tmp_path / "images", 2), tmp_path / "run")
    [record] = evaluation.evaluate(run, ["knn"], bank=30, queries=5, k=3, floor=False).records
    assert (record["options"]["bank"], record["options"]["queries"]) == (30, 5)
    assert record["data"]["train"] == 32


def test_the_exam_alone_has_test_labels(run: Path) -> None:
    assert not hasattr(opened(run).test, "labels")


def test_percentages_that_stand_twice_are_measured_once(run: Path) -> None:
    found = scoring.protocols_of(opened(run), Wanted(("finetune",), labels=(10, 10.0, 2, 10)))
    assert [protocol.options["labels"] for protocol in found] == [10, 2]
    assert found[0].title.startswith("finetune (labels 10%,")


# ---------------------------------------------------------------- features


def test_features_that_do_not_hold_any_more_are_removed(run: Path) -> None:
    def kept() -> set[str]:
        return {path.name for path in (run / "evaluation").glob("*.safetensors")}

    (run / "evaluation").mkdir()
    (run / "evaluation" / "trained-test-mine.safetensors").touch()
    evaluation.evaluate(run, ["knn"], checkpoint=10, **SMALL)
    first = kept()
    assert len(first) == 5
    evaluation.evaluate(run, ["knn"], **SMALL)
    assert len(kept()) == 5
    assert len(kept() & first) == 3, "the random network is the same; a stranger's file stays"
    evaluation.evaluate(run, ["patches"], patches=2, floor=False, **SMALL)
    assert len(kept()) == 7, "views and clean images are kept beside one another"


def test_features_that_are_not_those_of_the_network_are_not_used(run: Path) -> None:
    """A run may be a stranger's, with all that lies in it."""
    first = evaluation.evaluate(run, ["knn"], floor=False, **SMALL).records[0]["top1"]
    [path] = (run / "evaluation").glob("trained-train-*.safetensors")
    sound = load_file(path)
    for features_ in (torch.randn(sound["features"].shape), sound["features"][:, :-1], sound["features"] * 1.1):
        save_file({**sound, "features": features_.contiguous()}, path)
        said: list[str] = []
        assert evaluation.evaluate(run, ["knn"], floor=False, say=said.append, **SMALL).records[0]["top1"] == first
        assert "features that are not those of this network" in said[0]
        assert len(said) == 2
    for positions in (sound["positions"] - sound["positions"][0] - 1, sound["positions"] + 10**6):
        save_file({**sound, "positions": positions}, path)
        assert evaluation.evaluate(run, ["knn"], floor=False, **SMALL).records[0]["top1"] == first


# ---------------------------------------------------------------- evaluation.json


def test_a_file_of_a_newer_version_stays_as_it_is(run: Path) -> None:
    path = run / "evaluation.json"
    path.write_text('{"schema": 2, "records": {"new": 1}}')
    done = command("evaluate", str(run), "--protocol", "knn")
    assert done.exit_code == 2
    assert "has the schema 2, and this version of sslkit knows 1" in done.output
    assert path.read_text() == '{"schema": 2, "records": {"new": 1}}'
    assert not list((run / "evaluation").glob("*.safetensors")), "it is known before anything is computed"


@pytest.mark.parametrize("damaged", ["{", "[]", '{"schema": 1}', '{"records": []}', "\udcff"])
def test_a_damaged_file_is_moved_aside(damaged: str, run: Path) -> None:
    path = run / "evaluation.json"
    said: list[str] = []
    for name in ("evaluation.json.damaged", "evaluation.json.damaged-2"):
        path.write_bytes(damaged.encode(errors="surrogateescape"))
        told.prepare(run, said.append)
        assert not path.exists()
        assert (run / name).read_bytes() == damaged.encode(errors="surrogateescape")
        assert name in said[-1]
    assert len(said) == 2


def test_what_is_sound_in_a_damaged_file_stays(run: Path) -> None:
    (run / "evaluation.json").write_text('{"schema": 1, "records": [3, {"protocol": "knn"}]}')
    told.prepare(run)
    assert evaluation_file.read(run)[0] == [{"protocol": "knn"}]
    assert (run / "evaluation.json.damaged").is_file()


def test_a_weaker_evaluation_takes_nothing_away(run: Path) -> None:
    [strong] = evaluation.evaluate(run, ["knn"], **SMALL).records
    [weak] = evaluation.evaluate(run, ["knn"], floor=False, **SMALL).records
    assert "random" not in weak
    [kept] = evaluation_file.read(run)[0]
    assert (kept["random"], kept["pixels"]) == (strong["random"], strong["pixels"])
    assert kept["date"] == weak["date"]
    for seeds in (2, 1):
        evaluation.evaluate(run, ["linear_sgd"], epochs=1, seeds=seeds, floor=False, queries=100)
    assert [len(record["seeds"]) for record in evaluation_file.read(run)[0]] == [1, 2, 1]
    assert "seeds 2" in evaluation_file.read(run)[0][1]["title"]


def test_two_evaluations_of_a_run_do_not_end_each_other(run: Path) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(60):
                told.prepare(run)
            told.keep(run, [{"protocol": "knn", "options": number}])
        except BaseException as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # they take turns in the midst of anything
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failed == []
    assert sorted(record["options"] for record in evaluation_file.read(run)[0]) == [0, 1, 2, 3]


def test_features_are_written_by_one_evaluation_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[bool] = []
    save = extracting.save_file

    def watched(*arguments: Any) -> None:
        with pytest.raises(Timeout):
            FileLock(run / "evaluation" / ".lock", timeout=0).acquire()
        alone.append(True)
        save(*arguments)

    monkeypatch.setattr(extracting, "save_file", watched)
    evaluation.evaluate(run, ["knn"], floor=False, **SMALL)
    assert len(alone) == 2


def test_a_file_that_another_process_puts_into_its_place_is_no_stray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([self / ".evaluation.json.tmp"]))
    refuse_strays(tmp_path)


def test_a_figure_of_the_same_weights_stands_once_however_they_were_asked_for(run: Path) -> None:
    evaluation.evaluate(run, ["knn"], **SMALL)
    last = open_run(run).step
    evaluation.evaluate(run, ["knn"], checkpoint=last, **SMALL)
    [record] = evaluation_file.read(run)[0]
    assert record["checkpoint"]["which"] == last


def test_the_report_tells_other_data_from_the_runs_own(run: Path) -> None:
    assert command("report", str(run)).exit_code == 0
    evaluation.evaluate(run, ["knn"], floor=False, **SMALL)
    evaluation.evaluate(run, ["knn"], floor=False, overrides=["data_source.seed=6"], **SMALL)
    own, other = re.findall(r'<td data-head="Data">(.*?)</td>', (run / "report.html").read_text())
    assert own == "1,347 training, 100 test"
    assert other == "1,347 training, 100 test, other data than the run&#x27;s data_source.seed=6"


# ---------------------------------------------------------------- several runs


def test_runs_that_measure_knn_otherwise_are_not_averaged(run: Path, tmp_path: Path) -> None:
    other = copied(tmp_path / "other", seed=1)
    lock = other / "recipe.lock.toml"
    lock.write_text(re.sub(r"(?m)^k = \d+$", "k = 100", lock.read_text()))
    done = command("evaluate", str(run), str(other), "--protocol", "knn", "--no-floor")
    assert done.exit_code == 2
    assert "measure kNN with k 20, T 0.1 and with k 100, T 0.1" in done.output
    assert "give --k and --temperature" in done.output
    given = ("--k", "9", "--queries", "50")
    assert command("evaluate", str(run), str(other), "--protocol", "knn", "--no-floor", *given).exit_code == 0


def test_copies_of_a_run_are_no_samples(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    done = command("evaluate", str(run), str(copy), "--protocol", "knn")
    assert done.exit_code == 2
    assert "are both of seed 0" in done.output
    assert not (run / "evaluation.json").exists()
    one = open_run(run)
    other = replace(one, run=copy, info=replace(one.info, seed=1))
    with pytest.raises(sslkit.UserError, match="have the same weights"):
        evaluation._same([one, other], Wanted())
    evaluation._same([one, replace(other, weights="other")], Wanted())


# ---------------------------------------------------------------- readers


def test_the_reports_table_takes_nothing_on_trust() -> None:
    evil = "<script>alert(1)</script>"
    records = [{"title": evil, "top1": 0.5, "branch": evil, "checkpoint": {"step": 3}, "chosen": [evil, {"C": evil}]}]
    page = "".join(evaluated([*records, {"title": "y", "top1": "0.3"}, {"top1": float("nan")}]))
    assert "<script" not in page
    assert "&lt;script" in page
    assert "0.5000" in page
    assert ">y<" not in page
    assert "Not evaluated" in "".join(evaluated([]))
    assert "Not evaluated" not in "".join(evaluated([], "it is damaged"))
    assert "it is damaged." in "".join(evaluated([], "it is damaged"))


@pytest.mark.parametrize("figure", [HUGE, -HUGE, 1.5, -0.1, float("inf"), float("nan"), True, "0.5"])
def test_a_figure_that_is_no_share_is_left_out(figure: object) -> None:
    record = json.loads(json.dumps({"title": "y", "protocol": "knn", "top1": figure, "spread": figure}))
    assert "Not evaluated" in "".join(evaluated([record]))
    page = "".join(evaluated([record | {"top1": 0.5}]))
    assert "0.5000" in page
    assert "±" not in page
    assert "not measured" in card._evaluated(record, ["random"])
    assert "±" not in card._evaluated(record | {"top1": 0.5}, ["random"])


def test_a_report_is_written_whatever_evaluation_json_says(run: Path) -> None:
    (run / "evaluation.json").write_text(f'{{"schema": 1, "records": [{{"protocol": "knn", "top1": {HUGE}}}]}}')
    done = command("report", str(run))
    assert done.exit_code == 0, done.output


def test_figures_below_their_floors_and_few_test_images_are_told() -> None:
    record = {"title": "knn (k 20)", "top1": 0.3, "random": 0.35, "pixels": 0.2, "spread": None, "data": {"test": 33}}
    below, few = told.warnings([told.Evaluation(Path("run"), "run", 0, [record])])
    assert below == "knn (k 20): not above the random network (0.3500); by this measure the features are worth no more"
    assert few.startswith("33 test images are few: the standard error of such a top-1 is 0.080")
    assert not told.warnings(
        [told.Evaluation(Path("run"), "run", 0, [record | {"random": 0.1, "data": {"test": 10_000}}])]
    )


@pytest.mark.parametrize("tops", [(0.5, 0.1), (0.1, 0.5), (0.3, 0.1)])
def test_several_runs_are_held_to_their_floors_in_the_mean(tops: tuple[float, ...]) -> None:
    record = {"title": "knn (k 20)", "random": 0.25, "pixels": 0.2, "data": {"test": 10_000}}
    found = [told.Evaluation(Path(f"{top}"), "run", 0, [record | {"top1": top}]) for top in tops]
    said = told.warnings(found)
    words = "knn (k 20): not above the random network (0.2500) and raw pixels (0.2000) in the mean over 2 runs"
    assert [line.partition(";")[0] for line in said] == ([words] if sum(tops) < 0.5 else [])
