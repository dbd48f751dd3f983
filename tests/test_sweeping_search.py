"""A search: what Optuna is asked and told, and what is measured."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, run

import sslkit
from sslkit import sweeping
from sslkit.build import open_data
from sslkit.errors import RunFailed, UserError
from sslkit.run_directory import read_json, read_metrics
from sslkit.sweeping import held_out, pool, search, spaces
from sslkit.sweeping.pool import Task, Work

STRANGE = ("NaN", "1" + "0" * 400)
"""Values that JSON may have, and nothing can be reckoned with."""


def pretend(task: Task) -> int:
    """In the place of a training, or of a measurement: it leaves what one would, and gives the exit code."""
    if task.module == "sslkit":
        sets = dict(task.arguments[i + 1].split("=", 1) for i, a in enumerate(task.arguments) if a == "--set")
        folder = Path(task.arguments[task.arguments.index("--run-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        with Path("calls.txt").open("a") as calls:
            calls.write(f"{task.name}\n")
        if os.environ.get("FAKE_SOME") and "trial-0001/seed-0" in task.name:
            return int(os.environ["FAKE_SOME"])
        asked = [float(sets["optimizer.lr.peak"]), int(sets["seed"])]
        (folder / "asked.json").write_text(json.dumps(asked))
        (folder / "status.json").write_text(json.dumps({"status": "done", "step": 20, "of": 20}))
        return 0
    folder, by = Path(task.arguments[0]), task.arguments[1]
    if os.environ.get("FAKE_MEASURE") == "mistake":
        task.log.write_text("labels: are missing\n")
        return 2
    if (said := os.environ.get("FAKE_MEASURE", "")) in STRANGE:
        (folder / search.FIGURE).write_text(f'{{"by": "{by}", "value": {said}}}')
        return 0
    if os.environ.get("FAKE_MEASURE") == "killed":
        return -9
    peak, seed = json.loads((folder / "asked.json").read_text())
    value = 1 - abs(math.log10(peak) + 1) + seed / 100  # the best is 0.1
    (folder / search.FIGURE).write_text(json.dumps({"by": by, "value": value, "knn_queries": 36.0}))
    return 0


def one_after_another(work: Work, places: Sequence[Mapping[str, str]]) -> None:
    """In the place of `pool.run`, without processes; as many tasks are taken at a time as there are places."""
    taken: list[Task] = []
    while taken or work.left():
        while len(taken) < len(places) and (task := work.take()):
            taken.append(task)
        work.ended(taken[0], pretend(taken[0]))
        del taken[0]


@pytest.fixture(autouse=True)
def _optuna() -> None:
    """Tests here want Optuna; in CI it has to be there."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("optuna")


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A search whose runs take no time, and whose figure is the greater the nearer the rate is to 0.1."""
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    monkeypatch.setattr(pool, "run", one_after_another)

    def called(*arguments: str) -> tuple[int, str]:
        result = run("sweep", "./tiny.toml", "--search", "optimizer.lr.peak=.001..1:log", *arguments)
        return result.exit_code, result.output

    return called


def trials(folder: str = "runs/tiny-sweep") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(Path(folder) / "sweep.json")["search"]["trials"]
    return found


# ---------------------------------------------------------------- where it looks


@pytest.mark.parametrize(
    ("text", "space"),
    [
        (".01..1:log", spaces.Space(0.01, 1.0, True, False)),
        ("1e-4..1e-2", spaces.Space(1e-4, 1e-2, False, False)),
        ("64..512:log", spaces.Space(64, 512, True, True)),
        ("0..0.5", spaces.Space(0, 0.5, False, False)),
        ("-3..-1", spaces.Space(-3, -1, False, True)),
    ],
)
def test_a_space_is_read(text: str, space: spaces.Space) -> None:
    assert spaces.read([f"a.b={text}"]) == {"a.b": space}
    assert spaces.read([f"a.b={space.text}"]) == {"a.b": space}, "its one spelling"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["a.b"], "should read KEY=LOW..HIGH"),
        (["a.b=1"], "should read KEY=LOW..HIGH"),
        (["a.b=1..2:sqrt"], "should read KEY=LOW..HIGH"),
        (["a.b=1..inf"], "should read KEY=LOW..HIGH"),
        (["a.b=2..1"], "2 should be less than 1"),
        (["a.b=1..1.0"], "1 should be less than 1.0"),
        (["a.b=0..1:log"], "both ends have to be above 0"),
        (["a.b=0..1", "a.b=0..2"], "a.b has a --search already"),
    ],
)
def test_a_space_that_cannot_be_read_is_a_line(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        spaces.read(options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--search: needs --trials"),
        (["--trials", "2", "--grid", "loss.form=byol"], "--grid and --search: give one of them"),
        (["--trials", "2", "--set", "optimizer.lr.peak=1"], "is given by --set as well"),
        (["--trials", "2", "--search", "seed=1..3"], "--search seed: the seeds"),
        (["--trials", "2", "--search", "optimizer.lr.pea=1..3"], "did you mean"),
        (["--trials", "2", "--search", "train.batch_size=1..3"], "train.batch_size"),
    ],
)
def test_a_mistake_is_told_before_anything_begins(
    faked: Callable[..., tuple[int, str]], arguments: list[str], said: str
) -> None:
    code, output = faked(*arguments)
    assert (code, said in output) == (2, True), output
    assert not Path("runs").exists()


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'sslkit\[optuna\]'"):
        spaces.check_installed()


# ---------------------------------------------------------------- what it finds


def test_it_finds_what_is_good_and_says_how_to_train_it(faked: Callable[..., tuple[int, str]]) -> None:
    code, output = faked("--trials", "20")
    assert code == 0, output
    found = trials()
    values = [trial["value"] for trial in found]
    best = found[values.index(max(values))]["values"]["optimizer.lr.peak"]
    assert abs(math.log10(float(best)) + 1) < 0.3
    assert all(0.001 <= float(trial["values"]["optimizer.lr.peak"]) <= 1 for trial in found)
    assert output.splitlines()[0].startswith("maximised: kNN accuracy among training images")
    assert output.splitlines()[-1] == (
        "the best, with a seed that chose nothing: sslkit train ./tiny.toml "
        f"--set optimizer.lr.peak={best} --set seed=1 --run-dir runs/tiny-sweep-best --device auto"
    )
    pasted = run(*shlex.split(output.splitlines()[-1].partition("sslkit ")[2]), "--steps", "1")
    assert pasted.exit_code == 0, pasted.output
    assert Path("runs/tiny-sweep-best/status.json").is_file()
    error = math.sqrt(max(values) * (1 - max(values)) / 36)
    assert f"\na run's figure is of 36 queries: its standard error is {error:.4f}, " in output
    later = [abs(math.log10(float(trial["values"]["optimizer.lr.peak"])) + 1) for trial in found[12:]]
    first = [abs(math.log10(float(trial["values"]["optimizer.lr.peak"])) + 1) for trial in found[:10]]
    assert sum(later) / len(later) < sum(first) / len(first), "it learns from what it was told"


def test_a_search_that_was_ended_comes_to_the_same(
    faked: Callable[..., tuple[int, str]],
) -> None:
    """In every call some trials more, and once more one that was begun and not measured."""
    assert faked("--trials", "14", "--dir", "whole")[0] == 0
    for number in (5, 11):
        assert faked("--trials", str(number), "--dir", "parts")[0] == 0
    note = json.loads(Path("parts/sweep.json").read_text())
    last = note["search"]["trials"][-1]
    last["figures"] = {}
    del last["value"]  # as if it had been killed while it measured
    Path("parts/sweep.json").write_text(json.dumps(note))
    assert faked("--trials", "14", "--dir", "parts")[0] == 0
    assert trials("parts") == trials("whole")
    assert len({trial["values"]["optimizer.lr.peak"] for trial in trials("whole")}) == 14


def test_a_trial_is_the_mean_of_its_seeds(faked: Callable[..., tuple[int, str]]) -> None:
    assert faked("--trials", "2", "--seeds", "2", "--jobs", "2", "--device", "cpu")[0] == 0
    for trial in trials():
        figures = trial["figures"]
        assert figures["seed-1"] == pytest.approx(figures["seed-0"] + 0.01)
        assert trial["value"] == pytest.approx((figures["seed-0"] + figures["seed-1"]) / 2)


def test_a_run_that_fails_is_told_and_the_search_goes_on(
    faked: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SOME", "1")
    code, output = faked("--trials", "3")
    assert code == 1
    assert "[2/3] trial-0001/seed-0: FAILED: " in output
    assert [trial["value"] is None for trial in trials()] == [False, True, False]
    assert "trial 1:" not in output.splitlines()[-2]


def test_a_figure_that_cannot_be_measured_is_told(
    faked: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MEASURE", "mistake")
    code, output = faked("--trials", "1")
    assert code == 1
    assert "FAILED: its figure could not be measured: labels: are missing" in output


@pytest.mark.parametrize("value", STRANGE)
def test_a_figure_that_is_not_finite_is_a_trial_that_failed(
    faked: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("FAKE_MEASURE", value)
    code, output = faked("--trials", "2")
    assert (code, output.count("FAILED: its figure could not be measured")) == (1, 2), output
    assert [trial["value"] for trial in trials()] == [None, None]
    monkeypatch.delenv("FAKE_MEASURE")
    assert faked("--trials", "3")[0] == 1
    assert [trial["value"] is None for trial in trials()] == [True, True, False], "the search goes on"


@pytest.mark.parametrize("variable", ["FAKE_SOME", "FAKE_MEASURE"])
def test_what_was_killed_is_gone_on_with_by_the_same_command(
    faked: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A run, or a measurement: want of memory says nothing of the values."""
    assert faked("--trials", "3", "--dir", "whole")[0] == 0
    monkeypatch.setenv(variable, {"FAKE_SOME": "-9", "FAKE_MEASURE": "killed"}[variable])
    code, output = faked("--trials", "3", "--dir", "parts")
    assert code == 1
    assert "FAILED: killed by SIGKILL" in output
    assert "the same command goes on with it" in output
    assert not any("problem" in trial or trial.get("value", 0) is None for trial in trials("parts"))
    monkeypatch.delenv(variable)
    code, output = faked("--trials", "3", "--dir", "parts")
    assert code == 0, output
    assert all(trial["value"] is not None for trial in trials("parts"))
    assert trials("parts")[0] == trials("whole")[0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_trial_that_failed_is_trained_with_no_other_seed(
    faked: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setenv("FAKE_SOME", "1")
    code, output = faked("--trials", "3", "--seeds", "3", "--jobs", str(jobs), "--device", "cpu")
    assert code == 1
    assert [trial["value"] is None for trial in trials()] == [False, True, False]
    assert (begun := Path("calls.txt").read_text().count("trial-0001")) in range(1, jobs + 1), "one may be on its way"
    assert "trial 1: has no figure now, so" in output
    assert "[9/9] " in output
    assert faked("--trials", "3", "--seeds", "3", "--device", "cpu")[0] == 1
    assert Path("calls.txt").read_text().count("trial-0001") == begun


def test_what_another_search_noted_meanwhile_is_kept(
    faked: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a search's first look at the folder and its lock another one comes and goes."""
    assert faked("--trials", "2", "--dir", "other")[0] == 0
    note = json.loads(Path("other/sweep.json").read_text())
    note["search"]["trials"][0]["value"] = 0.123
    Path("other/sweep.json").write_text(json.dumps(note))
    plain = sweeping.held

    @contextmanager
    def after_another(folder: Path) -> Iterator[None]:
        shutil.copytree("other", folder)
        with plain(folder):
            yield

    monkeypatch.setattr(sweeping, "held", after_another)
    assert faked("--trials", "3", "--dir", "mine")[0] == 0
    assert trials("mine")[:2] == trials("other")
    assert len(trials("mine")) == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"values": {}}, "the values of trial 0"),
        ({"values": {"optimizer.lr.peak": "x"}}, "the values of trial 0"),
        ({"values": {"optimizer.lr.peak": "5"}}, "the values of trial 0"),
        ({"values": {"optimizer.lr.peak": "0.1 --x"}}, "the values of trial 0"),
        ({"value": math.nan}, "search.trials.0.value"),
        ({"figures": {"seed-0": 10**400}}, "search.trials.0.figures.seed-0"),
        ({"figures": 1}, "search.trials.0.figures"),
    ],
)
def test_trials_of_a_stranger_are_held_to_their_form(
    faked: Callable[..., tuple[int, str]], changed: dict[str, Any], said: str
) -> None:
    faked("--trials", "1")
    path = Path("runs/tiny-sweep/sweep.json")
    note = json.loads(path.read_text())
    note["search"]["trials"][0] |= changed
    path.write_text(json.dumps(note))
    code, output = faked("--trials", "2")
    assert code == 2
    assert output.startswith(f"{path}: cannot be read ({said}")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [(["--seeds", "2"], "seeds"), (["--steps", "5"], "steps"), (["--by", "lidar"], "by")],
)
def test_another_search_in_the_folder_is_refused(
    faked: Callable[..., tuple[int, str]], changed: list[str], named: str
) -> None:
    faked("--trials", "1")
    code, output = faked("--trials", "2", *changed)
    assert code == 2
    assert f"holds a search with other {named} (" in output
    assert len(trials()) == 1


def test_a_grid_and_a_search_do_not_share_a_folder(faked: Callable[..., tuple[int, str]]) -> None:
    faked("--trials", "1")
    result = run("sweep", "./tiny.toml", "--grid", "optimizer.lr.peak=0.1")
    assert (result.exit_code, "holds a search; choose another --dir" in result.output) == (2, True)


# ---------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(TINY.replace("epochs = 2", "epochs = 1"), encoding="utf-8")
    sslkit.train(folder / "tiny.toml", run_dir=folder / "run", quiet=True)
    return folder / "run"


def test_the_held_out_accuracy_is_of_training_images_alone(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out in float64: features of the encoder, cosines, votes."""
    encoder = sslkit.load_encoder(trained)
    data = open_data(sslkit.load_recipe(trained / "recipe.lock.toml"), print)
    labels = data.train.labels
    assert labels is not None
    bank, queries = held_out.held_out(labels)
    assert len(queries) == round(0.1 * len(labels))
    assert sorted([*bank.tolist(), *queries.tolist()]) == list(range(len(labels)))
    rows = torch.nn.functional.normalize(encoder.features(data.train.read(torch.arange(len(labels)))).double(), dim=1)
    right = 0
    for query in queries.tolist():
        similarity = rows[bank] @ rows[query]
        votes = torch.zeros(10, dtype=torch.float64)
        for near in similarity.topk(20).indices.tolist():
            votes[labels[bank[near]]] += math.exp(float(similarity[near]) / 0.1)
        right += int(votes.argmax()) == int(labels[query])

    def unseen(*_: Any) -> None:
        raise AssertionError("the test images were looked at")

    monkeypatch.setattr(type(data.test), "read", _only(type(data.test).read, len(data.train), unseen))
    found = held_out.measure(trained, "auto", "cpu", allow_local_code=False)
    assert found == {
        "by": "knn_held_out", "step": 10, "value": pytest.approx(right / len(queries)), "knn_k": 20,
        "knn_temperature": 0.1, "knn_bank": len(bank), "knn_queries": len(queries),
    }  # fmt: skip


def _only(read: Callable[..., Any], length: int, otherwise: Callable[..., None]) -> Callable[..., Any]:
    return lambda images, indices: read(images, indices) if len(images) == length else otherwise()


def test_images_without_a_label_are_neither_bank_nor_query() -> None:
    labels = torch.tensor([-1, 0, 1] * 20)
    bank, queries = held_out.held_out(labels)
    assert len(bank) + len(queries) == 40
    assert (labels[torch.cat([bank, queries])] >= 0).all()
    again = held_out.held_out(labels)
    assert torch.equal(bank, again[0])
    assert torch.equal(queries, again[1])


def test_lidar_is_what_the_run_recorded_at_its_end(trained: Path) -> None:
    [recorded] = [record["lidar"] for record in read_metrics(trained) if "lidar" in record]
    found = held_out.measure(trained, "lidar", "cpu", allow_local_code=False)
    assert found["value"] == pytest.approx(recorded, rel=1e-4)


def test_without_labels_lidar_is_taken_and_knn_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = held_out.open_data

    def unlabelled(*arguments: Any) -> Any:
        data = plain(*arguments)
        data.train.labels = None
        return data

    monkeypatch.setattr(held_out, "open_data", unlabelled)
    assert held_out.measure(trained, "auto", "cpu", allow_local_code=False)["by"] == "lidar"
    with pytest.raises(UserError, match="have no labels; search --by lidar"):
        held_out.measure(trained, "knn_held_out", "cpu", allow_local_code=False)


def test_a_mistake_while_measuring_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert held_out.main(str(tmp_path), "auto", "cpu") == 2
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("by", "weight"),
    [("knn_held_out", math.nan), ("knn_held_out", math.inf), ("knn_held_out", 1e30), ("lidar", math.nan)],
)
def test_a_network_whose_outputs_are_not_finite_has_no_figure(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str, weight: float
) -> None:
    """Its neighbours would be chance. 1e30 is finite, but has no length in float32 that a cosine could be made of."""
    plain = held_out._placed

    def spoilt(*arguments: Any) -> torch.nn.Module:
        module = plain(*arguments)
        module.register_forward_hook(lambda _, __, out: torch.where(torch.arange(len(out))[:, None] == 0, weight, out))
        return module

    monkeypatch.setattr(held_out, "_placed", spoilt)
    with pytest.raises(RunFailed, match=f"at step 10 the network's outputs are not finite, so it has no {by}"):
        held_out.measure(trained, by, "cpu", allow_local_code=False)
    assert held_out.main(str(trained), by, "cpu") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(str(trained))


def test_the_figure_is_left_in_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert held_out.main(str(trained), "lidar", "cpu") == 0
    found = read_json(trained / search.FIGURE)
    assert capsys.readouterr().out == f"lidar: {found['value']:.4f}\n"
