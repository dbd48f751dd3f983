"""A run that goes on is the run that nothing stopped: for every recipe, and from checkpoints of earlier versions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT, noisy_cifar10, noisy_photos
from test_faults import QUIET, assert_the_same
from test_recipes import NAMES, small

import sslkit
from sslkit import checkpoint
from sslkit.cli import main
from sslkit.run_directory import read_metrics

# ---------------------------------------------------------------- every recipe

STOP, END = 6, 11
SOONER = {  # the queue from the start, and a last layer that begins to move within the five steps
    "swav_cifar10": ["loss.queue_start_epochs=0.05", "loss.freeze_prototypes_epochs=0.2"],
    "dino_cifar10": ["projector.freeze_last_layer_epochs=0.2"],
    "dino_images224": ["projector.freeze_last_layer_epochs=0.2"],
}
FRESH = ("mocov2_cifar10", "swav_cifar10", "wmse_cifar10")
"""Recipes that go on in a process of their own, which shares nothing with the one before: a shuffle, prototypes and a
queue, draws in the loss."""


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 training and 100 test images of noise in CIFAR-10's layout, as a data folder, and as many photographs of
    noise in its folder `images`: 40 batches of 16."""
    folder = tmp_path_factory.mktemp("noise")
    noisy_cifar10(folder, train=640, test=100)
    noisy_photos(folder, train=640, test=100)
    return folder


def arguments(name: str, run: str) -> list[str]:
    changes = [word for setting in SOONER.get(name, []) for word in ("--set", setting)]
    if "cifar10" in name or "images" in name:
        changes = [*small(name), *changes]
    else:
        changes += ["--set", "train.log_every=1", "--set", "train.compile=false"]
    changes += ["--set", f"train.checkpoint_every={STOP}", "--set", "train.keep_checkpoints=9", *QUIET[:4]]
    return ["train", name, *changes, "--device", "cpu", "--steps", str(END), "--run-dir", run]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("forum_thread")])
def test_five_steps_after_a_checkpoint_are_the_same_and_so_is_the_state(
    name: str, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKIT_DATA", str(noise))
    monkeypatch.chdir(tmp_path)
    Path("images").symlink_to(noise / "images")
    whole = CliRunner().invoke(main, arguments(name, "whole"))
    assert whole.exit_code == 0, whole.output
    shutil.copytree("whole", "parts", ignore=shutil.ignore_patterns(f"step-{END:09d}"))
    Path("parts/status.json").write_text('{"status": "running"}')  # as after a kill
    if name in FRESH:
        done = subprocess.run([sys.executable, "-m", "sslkit", *arguments(name, "parts")],
                              capture_output=True, text=True, check=False)  # fmt: skip
        code, said = done.returncode, done.stdout + done.stderr
    else:
        result = CliRunner().invoke(main, arguments(name, "parts"))
        code, said = result.exit_code, result.output
    assert code == 0, said
    assert f"going on from step {STOP}" in said
    losses = [r["loss"] for r in read_metrics(Path("parts")) if "loss" in r]
    assert len(losses) == END
    assert None not in losses
    assert len(set(losses)) > END - 3, "it moves"
    assert_the_same(Path("whole"), Path("parts"))
    for run in ("whole", "parts"):  # pytest keeps its folders, and these are hundreds of megabytes for each recipe
        shutil.rmtree(run)


# ---------------------------------------------------------------- earlier versions

GOLDEN = sorted(p for p in (ROOT / "tests" / "golden").iterdir() if p.is_dir() and (p / "expected.json").is_file())


@pytest.mark.parametrize("kept", GOLDEN, ids=lambda p: p.name)
def test_the_run_of_an_earlier_version_goes_on(kept: Path, tmp_path: Path) -> None:
    """The losses are compared within 1e-3, not to the bit: another processor or torch sums in another order."""
    run = tmp_path / "run"
    shutil.copytree(kept / "run", run)
    expected = {int(step): loss for step, loss in json.loads((kept / "expected.json").read_text())["losses"].items()}
    before = (run / "metrics.jsonl").read_bytes()
    recipe, last = str(run / "recipe.lock.toml"), max(expected)
    result = CliRunner().invoke(main, ["train", recipe, "--run-dir", str(run), "--device", "cpu", "--steps", str(last)])
    assert result.exit_code == 0, result.output
    assert f"going on from step {min(expected) - 1}" in result.output
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    losses = {r["step"]: r["loss"] for r in read_metrics(run) if "loss" in r and r["step"] >= min(expected)}
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kept", GOLDEN, ids=lambda p: p.name)
def test_the_encoder_of_an_earlier_version_loads(kept: Path) -> None:
    step = checkpoint.listed(kept / "run" / "checkpoints")[-1].name[5:]
    assert sslkit.load_encoder(kept / "run").step == int(step)


def test_this_version_has_a_run_that_is_kept() -> None:
    assert sslkit.__version__ in [p.name for p in GOLDEN], "python tests/golden/make.py"


# ---------------------------------------------------------------- kills


@pytest.mark.slow
def test_runs_that_are_killed_come_to_the_same() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--runs", "2", "--kills", "8"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert (figures["bit_exact"], figures["kills"]) == (2, 8)


def test_the_figures_are_of_all_runs_and_kills() -> None:
    figures = json.loads((ROOT / "benchmarks" / "crash.json").read_text())["figures"]
    assert (figures["runs"], figures["bit_exact"], figures["kills"]) == (50, 50, 250)
    assert figures["kills_while"]["writing a checkpoint"] >= 20


# ---------------------------------------------------------------- what the tests see


MUTATIONS = ROOT / "benchmarks" / "mutations.py"
GRAVEST = [
    "nothing is flushed to disk", "written in place, not renamed", "hashes are not compared", "the target begins anew",
    "random numbers are not keyed by the step",
]  # fmt: skip
"""Those that are tried here; the script by itself tries all, which takes minutes."""


@pytest.mark.slow
def test_for_each_safeguard_that_is_taken_away_a_test_fails() -> None:
    done = subprocess.run([sys.executable, str(MUTATIONS), *GRAVEST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("5 of 5 noticed\n")


def test_every_safeguard_that_is_taken_away_is_there() -> None:
    listed = subprocess.run([sys.executable, str(MUTATIONS), "--list"], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == sorted(set(listed.stdout.splitlines()), key=listed.stdout.index)
    assert set(GRAVEST) < set(listed.stdout.splitlines())
