"""The folder that an export is: what it says, whose it is, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_BACKBONE, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_python_api import mine

import sslkit
from sslkit.exporting import Export, export
from sslkit.exporting.folder import replacing, tidy
from sslkit.exporting.prepared import _shortest
from sslkit.opened_run import open_run
from sslkit_watch import KNN

ALL = ["README.md", "model.safetensors", "sslkit.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a network that no library has, with checkpoints at steps 5 and 10."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train = sslkit.Train(epochs=1, batch_size=128, checkpoint_every=5, keep_checkpoints=9)
    sslkit.train(mine(observers=(KNN(bank=200, queries=100, k=20),), train=train), run_dir=path, quiet=True)
    return path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_network_that_only_sslkit_builds(copied: Path) -> None:
    done = run("export", str(copied))
    assert done.exit_code == 0, done.output
    folder = copied / "export"
    assert names(folder) == ALL, "no config.json, which timm would take for one of its own"
    first, check, note = done.output.splitlines()
    assert first == f"{folder}: 8 features of 3 x 16 x 16 images, step 10, online network"
    assert "read by the backbone 'convnet' of sslkit; features of 8 images differ by at most" in check
    assert note.startswith("backbone 'convnet' is no network of timm's, so that these weights need sslkit")
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt", "weights": open_run(copied).weights}
    own = sslkit.load_encoder(copied).backbone.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    text = (folder / "README.md").read_text()
    assert "sslkit's backbone `convnet`" in text
    assert "Without sslkit, export it as a graph: `--format torch` or `--format onnx`." in text
    assert '"widths": [8, 8]' in text
    assert "library_name" not in text


def test_as_graphs_it_needs_no_sslkit(copied: Path) -> None:
    pytest.importorskip("onnxruntime")
    formats = ("--format=onnx", "--format=torch", "--format=timm")
    done = run("export", str(copied), *formats, "--to", str(copied / "graphs"), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert [check["file"] for check in told["checks"]] == ["model.safetensors", "model.pt2", "model.onnx"]
    assert told["folder"] == str(copied / "graphs")
    assert told["graph_size"] == 16
    text = (copied / "graphs" / "README.md").read_text()
    assert "Without sslkit, take the graph below." in text
    assert "--format" not in text
    program = torch.export.load(copied / "graphs" / "model.pt2").module()
    given = torch.randint(0, 256, (7, 3, 16, 16)).to(torch.uint8)
    wanted = sslkit.load_encoder(copied).features(given)
    torch.testing.assert_close(program(given.float() / 255), wanted, rtol=1e-5, atol=1e-5)
    done = run("export", str(copied), "--to", str(copied / "graphs"))
    assert "took the place of an export that also had model.onnx, model.pt2; name all formats" in done.output
    assert names(copied / "graphs") == ALL


def test_a_network_of_a_file_goes_by_its_name_alone(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL_BACKBONE)
    table = tiny.read_text().partition("[backbone]")[2].partition("[projector]")[0]
    tiny.write_text(tiny.read_text().replace(table, '\nuse = "./small.py:Small"\n\n'))
    recipe = sslkit.load_recipe(tiny, allow_local_code=True)
    sslkit.train(recipe, run_dir=tmp_path / "run", steps=1, quiet=True)
    refused(tmp_path / "run", "add allow_local_code=True")
    done = export(tmp_path / "run", allow_local_code=True)
    assert "small.py:Small" in text_of(done)
    for path in done.folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_what_it_says_of_itself(copied: Path) -> None:
    done = export(copied, checkpoint=5, branch="target", name="Mine", licence="CC-BY-4.0")
    told, opened = json.loads((done.folder / "sslkit.json").read_text()), open_run(copied, "target", 5)
    assert told == json.loads(json.dumps(done.facts))
    assert (told["step"], told["branch"], told["weights"]) == (5, "target", opened.weights)
    assert (told["name"], told["licence"], told["run"]) == ("Mine", "cc-by-4.0", "run")
    mean, std = list(opened.info.mean), list(opened.info.std)
    assert told["images"] == {"channels": 3, "size": 16, "raw": 16, "mean": mean, "std": std}
    assert told["recipe_hash"] == opened.facts["recipe_hash"]
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert str(copied) not in (done.folder / "sslkit.json").read_text(), "where it was made is nobody's business"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in done.folder.iterdir()}
    assert told["files"] == {name: digests[name] for name in ALL if name != "sslkit.json"}


# ---------------------------------------------------------------- whose folder it is


def refused(copied: Path, text: str, error: type[Exception] = sslkit.UserError, **how: Any) -> None:
    with pytest.raises(error, match=text) as caught:
        export(copied, **how)
    assert "\n" not in str(caught.value)


def test_an_export_takes_the_place_of_an_earlier_one_alone(copied: Path, tmp_path: Path) -> None:
    folder = export(copied, checkpoint=5).folder
    before = (folder / "model.safetensors").read_bytes()
    export(copied)
    assert names(folder) == ALL
    assert (folder / "model.safetensors").read_bytes() != before
    assert not [path for path in copied.iterdir() if path.name.startswith(".export")]
    (empty := tmp_path / "empty").mkdir()
    assert names(export(copied, empty).folder) == ALL
    assert names(export(copied, tmp_path / "new" / "folder").folder) == ALL


def test_a_folder_of_somebody_else_is_left_alone(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    refused(copied, "other: is there, and sslkit export did not write it; give another folder", to=other)
    (other / "sslkit.json").write_text('{"written_by": "somebody"}')
    refused(copied, "sslkit export did not write it", to=other)
    (other / "sslkit.json").write_text('{"written_by": "sslkit export"}')
    refused(copied, "config.json: sslkit export did not write this", to=other)
    assert (other / "config.json").read_text() == "{}"
    (link := tmp_path / "link").symlink_to(other)
    refused(copied, "link: is a link", to=link)
    refused(copied, "config.json: is a file", to=other / "config.json")
    refused(copied, "x: cannot be made: .*; give another folder to write to", to=other / "config.json" / "x")


def test_what_was_added_or_changed_since_is_not_lost(copied: Path) -> None:
    folder = export(copied).folder
    card = folder / "README.md"
    text = card.read_text()
    card.write_text(text.replace("license: unknown", "license: mit"))
    refused(copied, r"README.md: was changed since it was written; give another folder")
    card.write_text(text)
    (folder / "notes.txt").write_text("mine")
    refused(copied, r"notes.txt: sslkit export did not write this")
    (folder / "notes.txt").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(card)
    refused(copied, r"model.safetensors: sslkit export did not write this")


def test_a_failure_leaves_the_earlier_export_as_it_was(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(copied).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sslkit.exporting.Card.text", full)
    refused(copied, "export: cannot be written: .*No space left", sslkit.RunFailed, checkpoint=5)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not [path for path in copied.iterdir() if path.name.startswith(".export")]


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_as_it_takes_its_place_the_earlier_export_comes_back(copied: Path, tmp_path: Path, at: int) -> None:
    """Before either rename, and before what it replaced is removed."""
    folder = export(copied, checkpoint=5).folder
    before = (folder / "model.safetensors").read_bytes()
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, script, str(copied), str(at)], check=False)
    assert done.returncode == 9
    left = sorted(path.name.rpartition(".")[2] for path in copied.iterdir() if path.name.startswith(".export."))
    assert left == {1: ["tmp"], 2: ["old", "tmp"], 3: ["old"]}[at]
    live = copied / f".export.{os.getppid()}-0123abcd@{socket.gethostname()}.tmp"
    others = [live, copied / ".export.mine.tmp", copied / ".export.1@another machine.old", copied / ".export2.1.tmp"]
    for other in others:
        other.mkdir()
    refused(copied, "has no checkpoint 7", checkpoint=7)
    assert sorted(path for path in copied.iterdir() if path.name.startswith(".export")) == sorted(others)
    assert ((folder / "model.safetensors").read_bytes() == before) is (at < 3)
    live.rmdir()
    export(copied)
    assert names(folder) == ALL


@pytest.mark.parametrize("part", ["", "-0123abcd"])
def test_what_a_killed_process_with_the_same_number_left_is_not_in_the_way(copied: Path, part: str) -> None:
    """A container that is started again gives the same numbers to its processes."""
    folder = export(copied, checkpoint=5).folder
    before = (folder / "model.safetensors").read_bytes()
    left = copied / f".export.{os.getpid()}{part}@{socket.gethostname()}"
    folder.rename(f"{left}.old")
    Path(f"{left}.tmp").mkdir()
    refused(copied, "has no checkpoint 7", checkpoint=7)
    assert (folder / "model.safetensors").read_bytes() == before, "it came back"
    assert not list(copied.glob(".export*"))
    Path(f"{left}.tmp").mkdir()
    export(copied)
    assert names(folder) == ALL
    assert not list(copied.glob(".export*"))


def test_an_export_leaves_alone_what_another_of_the_same_process_uses(copied: Path) -> None:
    with replacing(copied / "export") as first:
        (first / "a").write_text("a")
        tidy(copied / "export")
        assert first.is_dir()
        with contextlib.suppress(KeyboardInterrupt), replacing(copied / "export") as second:
            assert second != first
            raise KeyboardInterrupt
    assert (names(copied / "export"), list(copied.glob(".export*"))) == (["a"], [])


KILLED = """
import os, shutil, sys
from pathlib import Path

from sslkit.exporting import export

calls = [0]


def counted(real):
    def call(*given, **options):
        calls[0] += 1
        if calls[0] == int(sys.argv[2]):
            os._exit(9)
        return real(*given, **options)

    return call


Path.rename, shutil.rmtree = counted(Path.rename), counted(shutil.rmtree)
export(sys.argv[1])
"""


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "clean",
    [
        lambda self, images: self._normalize(images.float() / 255).square(),
        lambda self, images: self._normalize(images.flip(3).float() / 255),
        lambda self, images: self._normalize(images.float() / 255)[:, :, 2:-2],
    ],
    ids=["not a straight line", "not each pixel by itself", "not square"],
)
def test_a_preparation_that_no_file_can_say(copied: Path, clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslkit_affine.maker.AffineMaker.clean", clean)
    for name in ("timm", "torch"):
        refused(
            copied, r"run: its view generator 'affine' prepares images by more than a mean and a spread", formats=name
        )
    assert not (copied / "export").exists()


def test_options_that_do_not_fit(copied: Path, tmp_path: Path) -> None:
    refused(copied, "formats: there is no 'onx'; did you mean 'onnx'", formats=("onx",))
    refused(copied, "size: timm's weights are tied to no size", size=64)
    refused(copied, "size: should be 1 or more", size=0, formats="torch")
    refused(copied, "opset: is for onnx", opset=18)
    for wrong in (16.0, "16", True):
        refused(copied, f"size: should be a whole number, not {wrong!r}", size=wrong, formats=("torch",))
        refused(copied, f"opset: should be a whole number, not {wrong!r}", opset=wrong, formats=("onnx",))
    refused(copied, "licence: should be text, not 5", licence=5)
    refused(copied, "formats: should be a list, not None; choose of timm, torch, onnx", formats=None)
    refused(copied, r"formats: should be names, not \['onnx'\]; choose of", formats=(["onnx"],))
    assert not (copied / "export").exists()
    refused(copied, r"licence: should be an SPDX identifier such as apache-2.0 .*, not 'my own\\nlicence'",
            licence="my own\nlicence")  # fmt: skip
    refused(tmp_path / "nothing", "is not there")
    assert run("export", str(copied), "--size", "64").exit_code == 2


@settings(deadline=None)
@given(st.floats(-10, 10, allow_subnormal=False))
def test_a_mean_is_told_in_few_digits_and_exactly(value: float) -> None:
    told = _shortest(value)
    assert abs(told - value) <= 1e-7 * abs(value)
    assert str(told) != "-0.0"
    meant = round(value, 4)
    assert abs(meant) < 1e-3 or _shortest(float(torch.tensor(meant))) == meant


def test_features_that_are_not_finite(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_run(copied)
    next(opened.backbone.parameters()).data.fill_(float("nan"))
    monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, **__: opened)
    refused(copied, "the features at step 10 are not finite; there is nothing to export", sslkit.RunFailed)


# ---------------------------------------------------------------- the card


def text_of(done: Export) -> str:
    return (done.folder / "README.md").read_text()


def test_the_card_has_the_figures_of_these_weights_alone(copied: Path) -> None:
    records = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    first, last = ([r for r in records if "knn_top1" in r][n] for n in (0, -1))
    text = text_of(export(copied))
    assert (
        f"kNN top-1 in the training itself (k 20, T 0.1, training images 200, test images 100, features in fp32): "
        f"{last['knn_top1']:.4f}; the network that the run began with has {first['knn_top1']:.4f}." in text
    )
    assert "None was measured on these weights." in text_of(export(copied, checkpoint=5))
    assert "None was measured on these weights." in text_of(export(copied, branch="target"))
    fingerprint = open_run(copied).facts["data_fingerprint"]
    record: dict[str, Any] = {
        "protocol": "linear", "options": {"C": "swept", "folds": None}, "branch": "online", "top1": 0.5312,
        "checkpoint": {"step": 10, "which": "last", "weights": open_run(copied).weights}, "spread": 0.002,
        "data": {"fingerprint": fingerprint, "train": 5000, "test": 1000, "classes": 10},
        "random": 0.41, "pixels": None, "overrides": ["data_source.root=moved"],
    }  # fmt: skip
    others = [
        {**record, "top1": 0.99, "checkpoint": {"weights": "0"}},
        {**record, "top1": 0.99, "data": {**record["data"], "fingerprint": "0"}},
    ]
    (copied / "evaluation.json").write_text(json.dumps({"schema": 1, "records": [record, *others]}))
    row = "| linear (C = swept, folds = None) | 0.5312 ± 0.0020 | 0.4100 | not measured | 5,000 training, 1,000 test |"
    assert row in (text := text_of(export(copied)))
    assert "0.99" not in text
    (copied / "evaluation.json").write_text(json.dumps({"schema": 2, "records": [record]}))
    text = text_of(export(copied))
    assert row not in text
    assert "evaluation.json cannot be read by this version of sslkit." in text
    (copied / "evaluation.json").write_text(json.dumps({"schema": 1, "records": [record, *others]}))
    assert "has figures of other weights or other data alone." in text_of(export(copied, checkpoint=5))


@pytest.mark.parametrize(
    ("options", "is_a_try"),
    [
        ({"queries": 100, "of": 1000}, True),
        ({"queries": 1000, "of": 1000, "k": 20, "bank": 200}, False),
        ({"queries": 1000, "of": 1000, "k": 200, "bank": 200}, True),
        ({"queries": 1000}, False),
        ({"queries": "1", "of": None, "k": [], "bank": True}, False),
    ],
)
def test_the_card_leaves_tries_out(copied: Path, options: dict[str, Any], is_a_try: bool) -> None:
    record = {
        "protocol": "knn", "options": options, "top1": 0.5312, "random": 0.25, "pixels": 0.125, "initialised": 0.375,
        "checkpoint": {"weights": open_run(copied).weights},
        "data": {"train": 5000, "test": 1000, "fingerprint": open_run(copied).facts["data_fingerprint"]},
    }  # fmt: skip
    (copied / "evaluation.json").write_text(json.dumps({"schema": 1, "records": [record]}))
    text = text_of(export(copied))
    assert ("0.5312" in text) is not is_a_try
    assert ("all images vote, are left out." in text) is is_a_try
    if not is_a_try:
        assert "| Protocol | Top-1 | Random network | Weights it began with | Raw pixels | Data |" in text
        assert "| 0.5312 | 0.2500 | 0.3750 | 0.1250 | 5,000 training, 1,000 test |" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"run": "/data/ada/runs/first", "checkpoint": 840}, "with the weights of `first, step 840` (`init_from`)"),
        ({"file": "/data/ada/secret/encoder.safetensors"}, "with the weights of `encoder.safetensors` (`init_from`)"),
        ({"timm": "resnet18.a1_in1k"}, "with the weights of `timm's resnet18.a1_in1k` (`init_from`)"),
        ({"timm": "local-dir:/data/ada/own"}, "with the weights of `timm's local-dir:own` (`init_from`)"),
        ({"nonsense": 3}, "with the weights of another training (`init_from`)"),
        (3, "with the weights of another training (`init_from`)"),
    ],
)
def test_the_card_says_whose_weights_it_began_with_and_not_where_they_lie(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: object, words: str
) -> None:
    opened = open_run(trained)
    opened = replace(opened, tables={**opened.tables, "init_from": given})
    monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, **__: opened)
    text = text_of(export(trained, tmp_path / "out"))
    assert f"| Began | {words} |" in text
    assert "ada" not in text


def test_the_card_says_what_is_not_known_and_what_the_doctor_found(copied: Path) -> None:
    text = text_of(export(copied))
    assert "license: unknown" in text
    assert "None was given: ask whoever trained it before you use or share it." in text
    verdict = sslkit.examine(copied).verdict
    assert f"`sslkit doctor` on the run: **{verdict}**." in text
    assert "| Began | at random, seed 0 |" in text
    given = text_of(export(copied, licence="Apache-2.0"))
    assert "license: apache-2.0" in given
    (copied / "facts.json").unlink()
    (copied / "metrics.jsonl").unlink()
    assert "The run could not be examined: " in text_of(export(copied))


def test_figures_on_the_best_checkpoint_are_said_to_be_chosen(copied: Path) -> None:
    assert "The checkpoint was chosen by its kNN accuracy on test images" in text_of(export(copied, checkpoint="best"))


@pytest.mark.parametrize("name", ["<script>", "a\n## b", "`x` | [y](z)"])
def test_a_strangers_texts_are_only_texts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened = open_run(trained)
    opened = replace(opened, tables={**opened.tables, "name": name, "loss": {"use": name}})
    monkeypatch.setattr("sslkit.exporting.open_run", lambda *_, **__: opened)
    text = text_of(export(trained, tmp_path / "out"))
    assert "\n## b" not in text
    assert "# \\<script\\>" in text or name != "<script>"
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("| "))


def test_the_same_in_python_and_on_the_command_line(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("sslkit.exporting.open_run", lambda *a, **how: seen.update(given=a) or refuse())

    def refuse() -> None:
        raise sslkit.UserError("enough")

    done = run("export", str(copied), "--checkpoint", "5", "--branch", "target")
    assert (done.exit_code, done.output) == (2, "enough\n")
    assert seen["given"] == (str(copied), "target", 5)


def test_random_numbers_of_the_caller_stay_as_they_are(copied: Path, check_state: Callable[[], None]) -> None:
    export(copied)
    check_state()


@pytest.fixture
def check_state() -> Callable[[], None]:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()

    def check() -> None:
        assert torch.equal(torch.random.get_rng_state(), before)

    return check
