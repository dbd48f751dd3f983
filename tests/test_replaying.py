"""`sslkit replay`: the update that the run made, to the last bit, and no trace left in its directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import TINY
from PIL import Image

import sslkit
from sslkit.cli import main
from sslkit.errors import UserError

BASE = TINY + "".join(
    f'[[observers]]\nuse = "{name}"\nenabled = false\n' for name in ("health", "probe", "tensorboard", "report")
)
HEAD = '''
import torch
from torch import nn
from sslkit.api import Head


class Layer(nn.Linear):
    def before_step(self, step):
        self.step = step

    def forward(self, x):
        out = super().forward(x)
        return out * 1e30 * 1e30 if self.training and getattr(self, "step", -1) == 12 else out


class Overflowing(Head):
    """A linear layer that overflows in update 13."""

    def build(self, in_dim, run):
        layer = Layer(in_dim, 8)
        layer.out_dim = 8
        return layer
'''
STEPS = 12


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound run of 12 updates, checkpoints of 8, 10 and 12, and a run that failed at update 13."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("tiny.toml").write_text(BASE)
        every = ("--set", "train.log_every=3", "--set", "train.keep_checkpoints=3")
        assert run("train", "tiny.toml", "--run-dir", "sound", "--steps", str(STEPS), *every).exit_code == 0
        Path("head.py").write_text(HEAD)
        bad = BASE.replace(
            '[predictor]\nuse = "mlp"\nhidden_dim = 16\nout_dim = 8', '[predictor]\nuse = "./head.py:Overflowing"'
        )
        Path("bad.toml").write_text(bad)
        failed = run("train", "bad.toml", "--run-dir", "bad", "--allow-local-code")
        assert failed.exit_code == 1, failed.output
        Path("stderr.txt").write_text(failed.stderr)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of both runs."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Each file and folder below a directory: when it changed, its size, what it holds."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size, b"" if p.is_dir() else p.read_bytes())
        for p in [folder, *folder.rglob("*")]
    }


# ---------------------------------------------------------------- what the run computed


@pytest.mark.parametrize(("step", "start"), [(1, 0), (3, 0), (9, 8), (12, 10)])
def test_the_replayed_loss_is_the_recorded_one(step: int, start: int, here: Path) -> None:
    before = everything(here / "sound")
    found = sslkit.replay("sound", step)
    assert (found.start, found.identical, found.exit_code, found.of) == (start, True, 0, 20)
    assert found.recorded == found.figures
    assert {"loss", "cosine", "grad_norm", "grad_norm_backbone"} <= set(found.figures)
    assert everything(here / "sound") == before, "the run's directory is only read"


def test_an_update_without_a_record_and_the_one_after_the_last(here: Path) -> None:
    found = sslkit.replay(here / "sound", 13)
    assert (found.start, found.recorded, found.identical) == (12, None, None)
    assert found.figures["loss"] > 0
    assert "was not recorded" in found.text()
    whole = run("train", "tiny.toml", "--run-dir", "sound", "--set", "train.log_every=1")
    assert whole.exit_code == 0, whole.output
    records = [json.loads(line) for line in Path("sound/metrics.jsonl").read_text().splitlines()]
    (told,) = [r["loss"] for r in records if r["step"] == 13 and "loss" in r]
    assert told == found.figures["loss"]


def test_a_difference_is_seen(here: Path) -> None:
    path = Path("sound/metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["step"] == 9 and "loss" in record:
            record["loss"] *= 1 + 1e-6
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = sslkit.replay("sound", 9)
    assert found.identical is False
    assert "differs by" in found.text()
    assert "differs by 1e-06 of it" in found.text()


def test_the_command_shows_the_batch_and_every_module(here: Path) -> None:
    done = run("replay", "sound", "--step", "9", "--modules")
    assert done.exit_code == 0, done.output
    assert "sound, update 9 of 20, from the checkpoint of step 8, on cpu" in done.stdout
    assert ": identical" in done.stdout
    assert "batch: 128 images: " in done.stdout
    assert "every output and gradient is finite, in 68 calls of 35 modules" in done.stdout
    assert "online.backbone.blocks.0  Conv2d" in done.stdout
    done = run("replay", "sound", "--step", "10", "--json")
    told = json.loads(done.stdout)
    assert "making update 9 again, from sound/checkpoints/step-000000008" in done.stderr
    assert (told["step"], told["start"], told["identical"]) == (10, 8, None)
    assert len(told["indices"]) == len(told["labels"]) == 128
    assert told["files"] is None
    assert told["modules"][1]["module"] == "online"
    assert told["gradients"]["online.backbone.blocks.0.weight"] > 0


def test_the_batchs_views_are_drawn(here: Path) -> None:
    done = run("replay", "sound", "--step", "9", "--save-views", "views.png")
    assert done.exit_code == 0, done.output
    with Image.open("views.png") as image:
        assert image.height > 32 * 30
    wrong = run("replay", "sound", "--step", "9", "--save-views", "views.txt")
    assert (wrong.exit_code, wrong.stderr) == (
        2, "views.txt: should end in .png or .jpg, which says what kind of picture to write\n",
    )  # fmt: skip


# ---------------------------------------------------------------- what went wrong


def test_a_failed_run_says_where_and_its_replay_finds_the_same(here: Path) -> None:
    said = Path("stderr.txt").read_text()
    assert "not finite at step 13 (seed 0): the first output that is not finite is that of predictor (Layer" in said
    assert "sslkit replay bad --step 13 (docs/how-to/find-a-nan.md)" in said
    status = json.loads(Path("bad/status.json").read_text())
    assert (status["status"], status["reason"], status["step"], status["module"]) == (
        "failed", "not_finite", 13, "predictor",
    )  # fmt: skip
    assert sorted(path.name for path in Path("bad/checkpoints").iterdir())[-1] == "step-000000012"

    before = everything(here / "bad")
    done = run("replay", "bad", "--step", "13", "--allow-local-code", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert (told["finding"]["where"], told["finding"]["module"]) == ("forward", "predictor")
    assert told["figures"]["loss"] is None
    assert told["indices"] == json.loads(Path("bad/bad_batch.json").read_text())["indices"]
    assert everything(here / "bad") == before
    words = run("replay", "bad", "--step", "13", "--allow-local-code").stdout
    assert "NOT FINITE (forward): the first output that is not finite is that of predictor (Layer, float32)" in words


def test_what_follows_an_update_that_is_not_finite_is_not_made(here: Path) -> None:
    for path in Path("bad/checkpoints").iterdir():
        shutil.rmtree(path)
    Path("bad/status.json").unlink()  # as of a run that was killed
    done = run("replay", "bad", "--step", "15", "--allow-local-code")
    assert done.exit_code == 2
    assert "bad: update 13 is not finite already" in done.stderr


# ---------------------------------------------------------------- errors


def refused(run_dir: str, step: int, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        sslkit.replay(run_dir, step, **options)  # type: ignore[arg-type]
    (line,) = caught.value.lines
    return line


def test_what_is_not_there(here: Path) -> None:
    assert refused("nowhere", 1) == "nowhere: is not there; give one such as runs/NAME"
    assert refused(".", 1).startswith(".: is no run directory")
    assert refused("tiny.toml", 1).startswith("tiny.toml: is no run directory")
    assert refused("sound", 21) == "sound: has 20 updates, so there is no update 21"
    late = refused("sound", 15)
    assert late.startswith("sound: ended at step 12, so there is no update 15 to repeat")
    assert late.endswith("are of steps: 8, 10, 12")
    assert refused("sound", 0).startswith("step: should be a whole number of 1 or more")
    assert "device: should be" in refused("sound", 1, device="tpu")
    assert run("replay", "sound", "--step", "0").exit_code == 2
    assert run("replay", "sound").exit_code == 2


def test_local_code_needs_leave_and_is_what_it_was(here: Path) -> None:
    assert "add allow_local_code=True" in refused("bad", 13)
    head = Path("bad/local/head.py")
    head.write_text(head.read_text().replace("1e30", "1e31"))
    assert "is not what the checkpoint of step 12 was trained with" in refused("bad", 13, allow_local_code=True)


def test_a_lock_file_or_data_that_changed(here: Path) -> None:
    lock = Path("sound/recipe.lock.toml")
    text = lock.read_text()
    lock.write_text(text.replace("seed = 0", "seed = 1"))
    assert "recipe.lock.toml, or the code in local/, is not what" in refused("sound", 9)
    lock.write_text(text)
    env = json.loads(Path("sound/env.json").read_text())
    Path("sound/env.json").write_text(json.dumps({**env, "data_fingerprint": "other"}))
    assert "the data changed since this run was trained" in refused("sound", 3)
    Path("sound/env.json").write_text(json.dumps({**env, "device": "cpu (64 threads)"}))
    found = sslkit.replay("sound", 1)
    assert found.notes == ("note: the run was trained on cpu (64 threads), whose last bits may be others",)


def test_a_damaged_checkpoint_is_left_where_it_is(here: Path) -> None:
    path = Path("sound/checkpoints/step-000000008/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    before = everything(here / "sound")
    found = sslkit.replay("sound", 9)
    assert (found.start, found.identical) == (0, True)
    assert "model.safetensors is not what the manifest says" in found.notes[0]
    assert everything(here / "sound") == before


def test_it_reads_beside_a_process_that_trains(here: Path) -> None:
    from sslkit.run_directory import RunDirectory

    files = RunDirectory(here / "sound")
    try:
        assert sslkit.replay("sound", 9).identical
    finally:
        files.close()


def test_a_directory_that_cannot_be_written(here: Path) -> None:
    for path in [here / "sound", *(here / "sound").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert sslkit.replay("sound", 9).identical
    finally:
        for path in [here / "sound", *(here / "sound").rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what a compiler warns of is its own
def test_a_compiled_run_is_repeated_compiled_and_watched_without(here: Path) -> None:
    done = run("train", "tiny.toml", "--run-dir", "compiled", "--steps", "5", "--set", "train.compile=true")
    assert done.exit_code == 0, done.output
    found = sslkit.replay("compiled", 5)
    assert found.identical
    assert "online.backbone.blocks.0" in {call.module for call in found.modules}
