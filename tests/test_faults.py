"""Disks that are full, folders that vanish, processes that die: nothing is lost, and one line says what to do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import write_points
from click.testing import CliRunner, Result
from conftest import ROOT, TINY
from test_checkpoint import saved

from sslkit import checkpoint
from sslkit.cli import main
from sslkit.errors import RunFailed
from sslkit.run_directory import read_metrics
from sslkit.trainer import Trainer

# ---------------------------------------------------------------- at each point of writing


def test_a_kill_at_each_point_leaves_a_sound_newest_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "write_points.py"), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    newest = [kill["newest"] for kill in kills]
    assert newest == sorted(newest), "the old one up to the rename, the new one from then on"
    assert {"save_file", "half of save_file", "half of write_bytes", "fsync", "rename"} <= {
        kill["name"] for kill in kills if kill["newest"] == 3
    }
    after = [kill for kill in kills if kill["newest"] == 4]
    assert {"fsync", "rename", "rmtree", "half of rmtree"} <= {kill["name"] for kill in after}
    assert sum(bool(kill["left"]) for kill in kills) > 15


def raised(act: Callable[[], object]) -> Exception | None:
    try:
        act()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=os.strerror)
def test_an_error_at_each_point_is_one_line_and_nothing_is_lost(number: int, tmp_path: Path) -> None:
    points = 0
    failed = set()
    for point in range(1000):
        for half in (False, True):
            folder = tmp_path / f"{point}-{half}"
            folder.mkdir()
            for step in write_points.STEPS:
                checkpoint.save(folder, step, write_points.parts(step), {"knn_top1": 1 / step})
            met: list[str] = []

            def act(at: int, name: str, met: list[str] = met, point: int = point, half: bool = half) -> None:
                if at == point and name.startswith("half") == half:
                    met.append(name)
                    raise OSError(number, os.strerror(number))

            def halves(at: int, _: str, point: int = point, half: bool = half) -> bool:
                return half and at == point

            with pytest.MonkeyPatch.context() as patch:
                write_points.cut(patch, act, halves)
                error = raised(lambda folder=folder: write_points.write(folder, write_points.NEXT))  # type: ignore[misc]
            if isinstance(error, RunFailed):
                assert len(error.lines) == 1
                assert os.strerror(number) in str(error)
                failed |= set(met)
                assert write_points.is_sound(folder, (1, 2, 3)) in (3, 4)
            elif error is not None:
                assert "rmtree" in met[0], "the true one is told to ignore errors"
            points += bool(met)
            write_points.write(folder, write_points.NEXT)
            assert write_points.is_sound(folder, (1, 3, 4)) == write_points.NEXT
            assert [p.name[-1] for p in checkpoint.listed(folder)] == ["1", "3", "4"]
        if not met and point > 15:
            break
    assert points > 15
    assert {"save_file", "half of save_file", "write_bytes", "half of write_bytes", "fsync", "rename"} <= failed


def test_all_is_flushed_before_the_rename_and_the_folders_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def syncing(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").resolve().name)
        fsync(handle)

    def renaming(path: Path, to: Path) -> Path:
        done.append("rename")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    path = saved(tmp_path / "checkpoints")
    at = done.index("rename")
    staging = f".tmp-{path.name}-{os.getpid()}"
    assert sorted(done[: at - 1]) == sorted(p.name for p in path.iterdir())
    assert done[at - 1] == staging
    assert done[at + 1 :] == ["checkpoints", tmp_path.name], "the first time its own name, too"
    done.clear()
    saved(tmp_path / "checkpoints", 6)
    assert done[-2:] == ["rename", "checkpoints"]


def flipping(save_file: Callable[..., None]) -> Callable[..., None]:
    """Writes another bit than was given, as a broken disk or memory does."""

    def write(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if path.name == "model.safetensors":
            content = bytearray(path.read_bytes())
            content[-3] ^= 4
            path.write_bytes(bytes(content))

    return write


def test_what_was_written_wrongly_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", flipping(checkpoint.save_file))
    with pytest.raises(RunFailed, match=r"model\.safetensors does not hold what was written to it"):
        saved(tmp_path, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]


def test_what_changes_between_writing_and_pruning_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    rename = Path.rename

    def damaging(path: Path, to: Path) -> Path:
        if path.name.startswith(".tmp"):
            (path / "model.safetensors").write_bytes(b"")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", damaging)
    with pytest.raises(RunFailed, match="right after it was written: the disk may be failing; set aside as damaged-"):
        saved(tmp_path, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-000000006", "step-000000005"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.ENOMEM], ids=os.strerror)
def test_what_may_pass_by_itself_sets_no_checkpoint_aside(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(checkpoint.UserError, match=f"cannot be read: {os.strerror(number)}"):
        checkpoint.newest(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005"]


# ---------------------------------------------------------------- while a run trains


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY, encoding="utf-8")

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["train", "tiny.toml", *QUIET, *arguments])

    return call


QUIET = [word for name in ("report", "tensorboard", "health", "probe") for word in (
    "--set", f"observers.{name}.enabled=false")]  # fmt: skip


def at_step(step: int, act: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something to the run's directory right after a step."""
    usual = Trainer.train_step

    def then(self: Trainer, draw: Any) -> Any:
        branches = usual(self, draw)
        if self.step == step:
            monkeypatch.setattr(Trainer, "train_step", usual)
            act(self.directory)
        return branches

    monkeypatch.setattr(Trainer, "train_step", then)


def one_line(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    return str(line)


def bits(tensor: torch.Tensor) -> list[str]:
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype), str(tensor.shape), hashlib.sha256(content).hexdigest()]


def assert_the_same(one: Path, other: Path) -> None:
    """The same records, timings aside, and the same last checkpoint, to the bit."""
    timed = ("images_per_second", "data_wait")
    records = [[{k: v for k, v in r.items() if k not in timed} for r in read_metrics(run)] for run in (one, other)]
    assert records[0] == records[1]
    last = [checkpoint.load(checkpoint.listed(run / "checkpoints")[-1]) for run in (one, other)]
    assert last[0].step == last[1].step
    states = [json.dumps(found.parts, default=bits) for found in last]
    assert states[0] == states[1]


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(
    train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert train("--run-dir", "whole").exit_code == 0
    at_step(6, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard)), monkeypatch)
    try:
        failed = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = one_line(failed, 1)
    assert "step-000000008: the checkpoint could not be written:" in line
    assert "File too large" in line
    assert "the same command goes on from the newest" in line
    assert [p.name for p in Path("runs/tiny/checkpoints").iterdir()] == ["step-000000004"]
    assert "going on from step 4" in train().output
    assert_the_same(Path("whole"), Path("runs/tiny"))


def test_a_record_of_which_the_end_finds_no_room_is_an_error(
    train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def nearly_full(run: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "metrics.jsonl").stat().st_size + 20, hard))

    at_step(5, nearly_full, monkeypatch)
    try:
        failed = train("--set", "train.log_every=6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "metrics.jsonl: cannot be written: No space left on device" in one_line(failed, 1)
    assert train("--set", "train.log_every=6").exit_code == 0
    assert [r["step"] for r in read_metrics(Path("runs/tiny")) if "loss" in r] == [1, 6, 12, 18, 20]


def test_a_run_directory_that_is_moved_does_not_come_back_empty(
    train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--run-dir", "whole").exit_code == 0
    at_step(6, lambda run: shutil.move(run, "elsewhere"), monkeypatch)
    assert one_line(train(), 1) == (
        "runs/tiny: was removed or moved while the run goes on; put it back, and the same command goes on from the "
        "newest checkpoint"
    )
    assert not Path("runs/tiny").exists()
    shutil.move("elsewhere", "runs/tiny")
    assert "going on from step 4" in train().output
    assert_the_same(Path("whole"), Path("runs/tiny"))


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda run: shutil.rmtree(run), "was removed while the run goes on"),
        (lambda run: (run / "metrics.jsonl").unlink(), "was removed while the run goes on, so its records are lost"),
        (lambda run: (run / "checkpoints").rename(run / "c") and (run / "checkpoints").touch(), "File exists"),
    ],
    ids=["directory", "metrics", "file in the way"],
)
def test_what_is_removed_while_the_run_goes_on_is_one_line(
    act: Callable[[Path], object], says: str, train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(6, act, monkeypatch)
    assert says in one_line(train(), 1)


def test_records_that_are_gone_are_told_on_going_on(train: Callable[..., Result]) -> None:
    train("--steps", "8")
    metrics = Path("runs/tiny/metrics.jsonl")
    metrics.write_bytes(metrics.read_bytes()[:-10])
    lost = len(metrics.read_bytes().splitlines()[-1]) + 10
    assert f"{lost} bytes of records are gone" in train().output
    records = read_metrics(Path("runs/tiny"))
    assert [r["step"] for r in records if "loss" in r] == [1, 10, 15, 20], "the next one is not spoilt by half of one"


def test_a_checkpoint_of_another_run_is_refused(train: Callable[..., Result]) -> None:
    train("--steps", "4")
    train("--steps", "8", "--run-dir", "other", "--set", "loss.form=simsiam")
    shutil.copytree("other/checkpoints/step-000000008", "runs/tiny/checkpoints/step-000000008")
    refused = train()
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        "runs/tiny/checkpoints/step-000000008: is the checkpoint of another recipe than that of "
        "runs/tiny/recipe.lock.toml; move it away, or choose another --run-dir",
        '  loss.form: "simsiam" -> "byol"',
    ]
    shutil.rmtree("runs/tiny/checkpoints/step-000000008")
    assert "going on from step 4" in train("--steps", "5").output


def test_too_little_room_is_told_before_the_first_step(
    train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"free": 30_000, "total": 2**40}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(**free))
    assert "are there at a time; make room while it trains" in train("--steps", "1").output
    free["free"] = 10_000
    assert "and a checkpoint takes about 0.0 MiB; make room" in one_line(train("--run-dir", "other"), 2)
    assert not Path("other/checkpoints").exists()


NOBODY = """
import json, os, sys
from click.testing import CliRunner
from sslkit.cli import main
run = sys.argv[1]
def train(*more):
    result = CliRunner().invoke(main, ["train", "tiny.toml", "--run-dir", run, *sys.argv[2:], *more])
    print(json.dumps([result.exit_code, result.stderr, isinstance(result.exception, (SystemExit, type(None)))]))
train("--steps", "1", "--run-dir", "imports")  # of what nobody may not read
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
train("--steps", "4")
for name, mode in (("checkpoints", 0o500), (".", 0o500), ("checkpoints/step-000000004/model.safetensors", 0)):
    path = os.path.join(run, name)
    before = os.stat(path).st_mode
    os.chmod(path, mode)
    train("--steps", "8")
    os.chmod(path, before)
train("--steps", "8")
print(json.dumps(sorted(os.listdir(os.path.join(run, "checkpoints")))))
train("--run-dir", "of_another")
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs leave to become nobody")
def test_folders_and_files_that_may_not_be_written_or_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
        (folder / "of_another").mkdir()
        here = {"HOME": name, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", NOBODY, "run", *QUIET],
            cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **here},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, first, folder_closed, run_closed, unreadable, again, kept, foreign = map(json.loads, done.stdout.splitlines())
    assert first == [0, "", True]
    assert folder_closed[0] == 1
    assert "step-000000008: the checkpoint could not be written: Permission denied; earlier" in folder_closed[1]
    assert run_closed == [2, "run: cannot be written: Permission denied; choose another --run-dir\n", True]
    assert unreadable[0] == 2
    assert "step-000000004: cannot be read: Permission denied" in unreadable[1]
    assert again == [0, "", True]
    assert kept == ["step-000000004", "step-000000008"], "nothing was set aside"
    assert foreign == [2, "of_another: cannot be written: Permission denied; choose another --run-dir\n", True]
    assert all(len(lines.splitlines()) == 1 for _, lines, _ in (folder_closed, run_closed, unreadable, foreign))


def test_files_of_a_checkpoint_are_for_whom_other_files_are(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = saved(tmp_path)
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in path.iterdir()} == {"0o640"}


def test_the_state_is_not_what_training_goes_on_with(tmp_path: Path) -> None:
    """What was loaded stays when its file goes: pruning must not pull it away."""
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(1000)}}, {})
    found = checkpoint.load(path)
    shutil.rmtree(path)
    assert found.parts["model"]["w"].sum() == 1000


DRAWING = """
import torch

from sslkit.api import Head


class Noisy(torch.nn.Module):
    out_dim = 8

    def __init__(self, dim):
        super().__init__()
        self.layer = torch.nn.Linear(dim, 8)

    def forward(self, features):
        return self.layer(torch.nn.functional.dropout(features, 0.5, self.training))


class Dropping(Head):
    \"\"\"Draws from torch's default generator.\"\"\"

    def build(self, dim, run):
        return Noisy(dim)
"""


def test_stray_draws_are_the_same_after_going_on(train: Callable[..., Result]) -> None:
    Path("drawing.py").write_text(DRAWING, encoding="utf-8")
    text = Path("tiny.toml").read_text()
    projector = '[projector]\nuse = "mlp"\nhidden_dim = 16\nout_dim = 8\n'
    assert projector in text
    Path("tiny.toml").write_text(text.replace(projector, '[projector]\nuse = "./drawing.py:Dropping"\n'))
    local = ("--allow-local-code", "--steps")
    for run, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        done = train("--run-dir", run, *local, str(steps))
        assert done.exit_code == 0, done.output
    assert_the_same(Path("whole"), Path("parts"))
