from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run as command
from test_python_api import mine
from torch import Tensor

import sslkit
from sslkit import evaluation, evaluation_file
from sslkit.evaluation import extracting, finetune, material, scoring, told
from sslkit.evaluation.protocols import ONCE, WORDS, Wanted, percentages
from sslkit.opened_run import open_run
from sslkit_convnet import ConvNet
from sslkit_watch import KNN

OBSERVERS = (KNN(bank=200, queries=100, k=20),)
SMALL = {"k": 20, "bank": 200, "queries": 100}
RUNS: dict[int, Path] = {}
PAGE = Path(__file__).parent.parent / "docs" / "reference" / "evaluation.md"


def trained(path: Path, **changes: Any) -> Path:
    train = sslkit.Train(epochs=2, batch_size=128, checkpoint_every=5, keep_checkpoints=9)
    sslkit.train(mine(observers=OBSERVERS, train=train, **changes), run_dir=path, quiet=True)
    return path


def copied(to: Path, seed: int = 0) -> Path:
    """A run of this seed, which is trained once for all tests."""
    if seed not in RUNS:
        RUNS[seed] = trained(Path(tempfile.mkdtemp(dir=to.parent.parent)) / "run", seed=seed)
    return Path(shutil.copytree(RUNS[seed], to))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copied(tmp_path / "run")


def recorded(run: Path) -> list[float]:
    """kNN at step 0 and after each epoch."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["knn_top1"] for record in records if "knn_top1" in record]


def opened(run: Path, queries: int = 100, keep: bool = True) -> material.Material:
    told.prepare(run)
    return material.open_material(open_run(run), (), queries, "cpu", keep, lambda text: None)


# ---------------------------------------------------------------- figures


def test_knn_is_what_the_run_recorded_before_and_after_training(run: Path) -> None:
    found = evaluation.evaluate(run, ["knn"], **SMALL)
    [record] = found.records
    assert record["random"] == recorded(run)[0], "the very weights of step 0"
    assert record["top1"] == recorded(run)[-1] == found.top1("knn")
    assert record["options"]["k"] == 20
    assert record["options"]["bank"] == 200
    assert record["options"]["queries"] == 100
    assert record["checkpoint"]["step"] == 20
    assert record["branch"] == "online"
    middle = evaluation.evaluate(run, ["knn"], checkpoint=10, floor=False, **SMALL)
    assert middle.top1("knn") == recorded(run)[1]
    assert "random" not in middle.records[0]


def test_the_random_network_is_of_the_runs_own_seed(tmp_path: Path) -> None:
    other = copied(tmp_path / "other", seed=1)
    assert evaluation.evaluate(other, ["knn"], **SMALL).records[0]["random"] == recorded(other)[0]


def test_branches_and_layers_are_told_apart(run: Path) -> None:
    both = [evaluation.evaluate(run, ["linear"], branch=branch, queries=100, floor=False) for branch in
            ("online", "target")]  # fmt: skip
    assert len({one.records[0]["checkpoint"]["weights"] for one in both}) == 2
    head = evaluation.evaluate(run, ["knn"], layer="projection", **SMALL)
    assert head.records[0]["options"]["layer"] == "projection"
    assert 0 < head.records[0]["random"] < 1
    assert len(evaluation_file.read(run)[0]) == 3, "each is a record of its own"


def test_each_network_asks_for_the_test_labels_once_and_for_each_seed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exams: list[material.Exam] = []
    made = material.Exam.__init__

    def remember(self: material.Exam, labels: Tensor) -> None:
        made(self, labels)
        exams.append(self)

    monkeypatch.setattr(material.Exam, "__init__", remember)
    monkeypatch.setattr(finetune, "RATES", finetune.RATES[:2])
    evaluation.evaluate(run, ["linear", "knn", "finetune"], labels=[2], epochs=1, seeds=2, **SMALL)
    [exam] = exams
    assert len(exam.asked) == 3 * 2 + 3 + 2 * 2
    with pytest.raises(RuntimeError, match="scored on the test images already"):
        exam.score(exam.asked[0], torch.zeros(100))


@pytest.mark.parametrize("name", ["knn", "linear", "linear_sgd", "finetune", "patches"])
def test_no_choice_depends_on_the_test_labels(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted((name,), k=20, queries=100, labels=(20,), epochs=2, patches=2)

    def outcome() -> list[tuple[Tensor, dict[str, float]]]:
        found = opened(run)
        network = material.networks(found, "backbone", floor=False)[0]
        return [scoring._predicted(found, network, p, wanted, 0) for p in scoring.protocols_of(found, wanted)]

    before = outcome()
    split = material._labelled

    def wrong(*arguments: Any) -> material.Split:
        found = split(*arguments)
        if found.name == "test":
            found.labels.copy_((found.labels + 1) % 10)
        return found

    monkeypatch.setattr(material, "_labelled", wrong)
    for (a, chosen_a), (b, chosen_b) in zip(before, outcome(), strict=True):
        assert torch.equal(a, b)
        assert chosen_a == chosen_b


@pytest.mark.slow
def test_finetuning_trains_the_backbone_and_more_labels_help(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", backbone=ConvNet(widths=(16, 32), strides=(2, 2), pool=4))
    found = opened(run, queries=0)
    network = material.networks(found, "backbone", floor=False)[0]
    assert network.backbone is not None
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    few, many = (finetune.finetuned(found, network, labels, 12, 0) for labels in (2, 100))
    accuracy = [found.exam.score(who, made[0]()) for who, made in (("few", few), ("many", many))]
    assert accuracy[1] > max(accuracy[0], 0.2) + 0.1, accuracy
    assert all(torch.equal(value, before[name]) for name, value in network.backbone.state_dict().items()), "a copy"
    assert few[1]["lr"] in finetune.RATES


def test_labels_are_the_same_share_of_each_class_and_the_same_images_for_every_run(run: Path) -> None:
    train = opened(run).train
    part = finetune.some_labels(train, 10, 0)
    for label in range(10):
        whole = int((train.labels == label).sum())
        assert int((part.labels == label).sum()) == round(whole / 10)
    assert torch.equal(finetune.some_labels(train, 10, 0).where, part.where)
    assert not torch.equal(finetune.some_labels(train, 10, 1).where, part.where)
    assert len(finetune.some_labels(train, 0.01, 0).where) == 10, "one of each class at least"
    assert finetune.some_labels(train, 100, 0) is train


def test_crops_for_finetuning_are_prepared_as_clean_images_are(run: Path) -> None:
    found = opened(run)
    crops = finetune.Crops(found)
    grey = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    made = crops(grey, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, found.opened.views.clean(grey).expand_as(made), rtol=0, atol=1e-5)


def test_patches_are_means_over_views_and_the_same_every_time(run: Path) -> None:
    found = opened(run, keep=False)
    network = material.networks(found, "backbone", floor=False)[0]
    one = extracting.features_of(found, network, found.test, 2)
    found.known.clear()
    assert torch.equal(extracting.features_of(found, network, found.test, 2), one)
    clean = extracting.features_of(found, network, found.test)
    assert one.shape == clean.shape
    assert not torch.allclose(one, clean)
    names = [record["protocol"] for record in evaluation.evaluate(run, ["patches"], patches=2, **SMALL).records]
    assert names == ["patches_knn", "patches_linear"]


def test_seeds_give_mean_and_sample_standard_deviation(run: Path) -> None:
    [record] = evaluation.evaluate(run, ["linear_sgd"], epochs=1, seeds=3, queries=100, floor=False).records
    assert len(record["seeds"]) == len(record["chosen"]) == 3
    assert record["top1"] == statistics.fmean(record["seeds"])
    assert record["spread"] == statistics.stdev(record["seeds"])
    alone, _ = evaluation.evaluate(run, ["knn", "linear_sgd"], epochs=1, seeds=2, floor=False, **SMALL).records
    assert (len(alone["seeds"]), alone["spread"]) == (1, None), "kNN draws nothing"


# ---------------------------------------------------------------- features that are kept


def test_features_are_computed_once_and_anew_for_other_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = evaluation.evaluate(run, ["knn"], say=said.append, **SMALL)
    assert len(said) == 4, "training and test images of two networks"
    again = evaluation.evaluate(run, ["knn"], say=said.append, **SMALL)
    assert len(said) == 4
    assert again.records[0]["top1"] == first.records[0]["top1"]
    evaluation.evaluate(run, ["knn"], checkpoint=10, say=said.append, **SMALL)
    assert len(said) == 6, "the random network is the same"
    evaluation.evaluate(run, ["knn"], say=said.append, cache=False, **SMALL)
    assert len(said) == 10


def test_a_damaged_file_of_features_is_made_anew(run: Path) -> None:
    first = evaluation.evaluate(run, ["knn"], **SMALL)
    for path in (run / "evaluation").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    assert evaluation.evaluate(run, ["knn"], **SMALL).records[0]["top1"] == first.records[0]["top1"]


# ---------------------------------------------------------------- what is written


def test_records_are_merged_by_what_they_measured(run: Path) -> None:
    evaluation.evaluate(run, ["knn"], **SMALL)
    evaluation.evaluate(run, ["knn"], **(SMALL | {"k": 5}))
    evaluation.evaluate(run, ["knn"], **SMALL)
    assert [record["options"]["k"] for record in evaluation_file.read(run)[0]] == [20, 5]
    written = json.loads((run / "evaluation.json").read_text())
    assert written["schema"] == 1


def test_the_report_has_them(run: Path) -> None:
    assert command("report", str(run)).exit_code == 0
    assert "Not evaluated" in (run / "report.html").read_text()
    [record] = evaluation.evaluate(run, ["knn"], **SMALL).records
    page = (run / "report.html").read_text()
    assert f"{record['top1']:.4f}" in page
    assert f"{record['random']:.4f}" in page
    assert "knn (k 20" in page


# ---------------------------------------------------------------- the command


ARGUMENTS = ("--k", "20", "--bank", "200", "--queries", "100")


def test_the_command_prints_a_table_and_a_line_of_markdown(run: Path) -> None:
    done = command("evaluate", str(run), "--protocol", "knn", *ARGUMENTS)
    assert done.exit_code == 0, done.output
    [record] = evaluation_file.read(run)[0]
    floors = f"(random {record['random']:.4f}, pixels {record['pixels']:.4f})"
    title = "knn (k 20, T 0.1, bank 200, 100 of 450 test images)"
    line = f"| mine | step 20, online | {title} {record['top1']:.4f} {floors} |"
    assert line in done.stdout
    assert WORDS["knn"] in done.stdout
    assert ONCE in done.stdout
    alone = command("evaluate", str(run), "--protocol", "knn", "--markdown", *ARGUMENTS)
    assert alone.stdout.strip() == line
    as_json = command("evaluate", str(run), "--protocol", "knn", "--json", *ARGUMENTS)
    assert json.loads(as_json.stdout)["runs"][0]["records"][0]["top1"] == record["top1"]


def test_several_runs_have_a_mean_and_a_spread(run: Path, tmp_path: Path) -> None:
    other = copied(tmp_path / "other", seed=1)
    done = command("evaluate", str(run), str(other), "--protocol", "knn", "--json", "--no-floor", *ARGUMENTS)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    tops = [recorded(run)[-1], recorded(other)[-1]]
    assert found["over_runs"][0]["top1"] == statistics.fmean(tops)
    assert found["over_runs"][0]["spread"] == statistics.stdev(tops)
    line = command("evaluate", str(run), str(other), "--protocol", "knn", "--markdown", "--no-floor", *ARGUMENTS)
    assert f"{statistics.fmean(tops):.4f} +- {statistics.stdev(tops):.4f}" in line.stdout
    assert "mine, 2 runs" in line.stdout


def test_runs_of_other_recipes_are_not_averaged(run: Path, tmp_path: Path) -> None:
    other = copied(tmp_path / "other", seed=1)
    lock = other / "recipe.lock.toml"
    lock.write_text(lock.read_text().replace("tau = 0.9\n", "tau = 0.8\n"))
    done = command("evaluate", str(run), str(other))
    assert done.exit_code == 2
    assert "differ in more than their seed (target_updater.tau" in done.output
    assert "given twice" in command("evaluate", str(run), str(run)).output
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--labels", "1,x"), "labels: should be percentages such as 1,10,100"),
        (("--labels", "0", "--protocol", "finetune"), "labels: should be percentages above 0"),
        (("--labels", "1"), "labels: is an option of finetune, and would be ignored by knn and linear"),
        (("--protocol", "linear", "--bank", "9"), "bank: is an option of knn and patches, and would be ignored by"),
        (("--protocol", "knn", "--seeds", "3"), "leave it out, or ask for linear, too"),
        (("--protocol", "finetune", "--layer", "projection"), "finetune trains the backbone"),
        (("--checkpoint", "7"), "has no checkpoint 7"),
        (("--set", "data_source.use=nothing"), "data_source"),
        (("--set", "backbone.widths=[4]"), "backbone.widths: cannot be set here"),
        (("--set", "view_generator.rotation=90"), "view_generator.rotation: cannot be set here"),
        (("--set", "seed=3"), "seed: cannot be set here"),
        (("--set", "data_source"), "data_source: cannot be set here"),
    ],
)
def test_mistakes_end_in_a_line(arguments: tuple[str, ...], said: str, run: Path) -> None:
    done = command("evaluate", str(run), *arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_python_says_what_is_wrong_too(run: Path) -> None:
    for wrong, said in (
        ({"protocols": ["linaer"]}, "there is no 'linaer'; did you mean 'linear'"),
        ({"protocols": []}, "none is named"),
        ({"protocols": "linaer"}, "there is no 'linaer'; did you mean 'linear'"),
        ({"protocols": [["knn"]], "k": 3}, r"there is no \['knn'\]; did you mean 'knn'"),
        ({"protocols": "finetune", "labels": 200}, "labels: should be percentages above 0 and up to 100, not .200."),
        ({"protocols": "knn", "overrides": "seed=3"}, "seed: cannot be set here"),
        ({"protocols": ["linaer"], "k": 3}, "there is no 'linaer'; did you mean 'linear'"),
        ({"protocols": ["linear"], "patches": 3}, "patches: is an option of patches, and would be ignored by linear"),
        ({"k": 0}, "k: should be a whole number of 1 or more"),
        ({"seeds": 1.5}, "seeds: should be"),
        ({"temperature": 0}, "temperature: should be a finite number above 0"),
        ({"temperature": float("inf")}, "temperature: should be a finite number above 0"),
        ({"temperature": 10**400}, "temperature: should be a finite number above 0"),
        ({"temperature": True}, "temperature: should be a finite number above 0"),
        ({"protocols": ["finetune"], "epochs": 0}, "epochs: should be"),
        ({"protocols": ["finetune"], "epochs": True}, "epochs: should be"),
        ({"protocols": ["finetune"], "labels": [True]}, "labels: should be"),
        ({"layer": "head"}, "layer: should be"),
        ({"device": "tpu"}, "device: should be"),
        ({"protocols": ["finetune"], "labels": [200]}, "labels: should be"),
    ):
        with pytest.raises(sslkit.UserError, match=said):
            evaluation.evaluate(run, **wrong)  # type: ignore[arg-type]
    assert percentages("1,10,0.5") == (1, 10, 0.5)


def test_other_data_are_taken_only_on_purpose(run: Path) -> None:
    lock = run / "recipe.lock.toml"
    lock.write_text(lock.read_text().replace("test_prints = 1", "test_prints = 2"))
    done = command("evaluate", str(run), "--protocol", "knn", *ARGUMENTS)
    assert done.exit_code == 2
    assert "its data are not what it was trained on" in done.output
    assert command("evaluate", str(run), "--protocol", "knn", "--set", "data_source.seed=6", *ARGUMENTS).exit_code == 0
    [record] = evaluation_file.read(run)[0]
    facts = open_run(run).facts
    assert record["data"]["fingerprint"] != facts["data_fingerprint"]
    assert record["overrides"] == ["data_source.seed=6"]
    assert record["recipe_hash"] == facts["recipe_hash"], "the run's own"


def test_a_run_that_cannot_be_written_to_is_known_before_anything_is_computed(run: Path, tmp_path: Path) -> None:
    (run / "evaluation").symlink_to(tmp_path)
    done = command("evaluate", str(run))
    assert done.exit_code == 2
    assert "remove the link" in done.output
    (run / "evaluation").unlink()
    (run / "evaluation").write_text("")
    done = command("evaluate", str(run))
    assert done.exit_code == 2
    assert "cannot be written" in done.output


# ---------------------------------------------------------------- data without labels, or without test images


def folder_of_images(path: Path, classes: int) -> Path:
    from PIL import Image

    pixels = torch.Generator().manual_seed(0)
    for number in range(40):
        inner = path / "train" / f"class{number % classes}" if classes else path
        inner.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 256, (16, 16, 3), generator=pixels, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(inner / f"{number}.png")
    return path


def trained_on(folder: Path, run: Path) -> Path:
    from sslkit_crops import TwoCrops
    from sslkit_datasets import Folder

    train = sslkit.Train(epochs=1, batch_size=8)
    views = TwoCrops(blur=(0.0, 0.0))
    sslkit.train(mine(data_source=Folder(root=str(folder), size=16), view_generator=views, train=train), run_dir=run,
                 quiet=True)  # fmt: skip
    return run


def test_without_labels_the_label_free_figures_are_named(tmp_path: Path) -> None:
    run = trained_on(folder_of_images(tmp_path / "images", 0), tmp_path / "run")
    done = command("evaluate", str(run))
    assert done.exit_code == 2
    assert "its data have no labels" in done.output
    assert "effective_rank " in done.output
    assert "does not rank sound ones" in done.output


def test_without_test_images_a_fifth_of_the_others_is_held_out(tmp_path: Path) -> None:
    run = trained_on(folder_of_images(tmp_path / "images", 2), tmp_path / "run")
    said: list[str] = []
    [record] = evaluation.evaluate(run, ["knn"], say=said.append).records
    assert (record["data"]["train"], record["data"]["test"]) == (32, 8)
    assert "20% of train" in record["options"]["test_set"]
    assert any("a fifth of the training images is held out" in line for line in said)


# ---------------------------------------------------------------- the reference


def test_the_reference_has_every_protocol_in_the_words_that_are_printed() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for name, words in WORDS.items():
        assert f"## {name}" in page
        assert words in page
    assert ONCE in page


def test_knn_is_that_of_the_run_unless_told_otherwise(run: Path) -> None:
    own = tomllib.loads((run / "recipe.lock.toml").read_text())["observers"]
    (knn,) = [table for table in own if table["use"] == "knn"]
    said: list[str] = []
    (record,) = sslkit.evaluate(run, ["knn"], floor=False, say=said.append).records
    assert (record["options"]["k"], record["options"]["temperature"]) == (knn["k"], knn["temperature"])
    (record,) = sslkit.evaluate(run, ["knn"], k=7, temperature=0.07, floor=False).records
    assert (record["options"]["k"], record["options"]["temperature"]) == (7, 0.07)
    sslkit.evaluate(run, ["knn"], k=10**6, floor=False, say=said.append)
    assert any("lets all of them vote" in line for line in said)
