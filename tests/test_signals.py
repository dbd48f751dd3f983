"""Signals at every moment of a run: what is saved, what is said, and that nothing is lost or made twice."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import TINY

import sslkit
from sslkit import checkpoint, doctor, features, launch, preparation, report
from sslkit.cli import main
from sslkit.data import Feed
from sslkit.errors import RunFailed
from sslkit.run_directory import RunDirectory, read_json, read_metrics
from sslkit.trainer import Trainer

MEASURED = TINY.replace("epochs = 2", "epochs = 3").replace("checkpoint_every = 4", "checkpoint_every = 1000")
"""The only checkpoints are those of a stop, of the best kNN and of the end."""
Raise = Callable[[], object]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # CI may run everything under nohup
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(MEASURED)
    sslkit.train(folder / "tiny.toml", run_dir=folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(MEASURED)
    return tmp_path / "tiny.toml"


def train(tiny: Path, **options: Any) -> sslkit.Result:
    return sslkit.train(tiny, run_dir="run", quiet=True, **options)


def status() -> dict[str, Any]:
    return read_json(Path("run/status.json"))


def records(run: Path) -> list[dict[str, Any]]:
    timings = ("images_per_second", "data_wait")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(run)]


def assert_same(run: Path, other: Path) -> None:
    """The same records and the same last checkpoint, to the last bit; and the best one is the best one of both."""
    assert records(run) == records(other)
    ours, theirs = (checkpoint.newest(folder / "checkpoints")[0] for folder in (run, other))
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step
    same(ours.parts, theirs.parts)
    best = [checkpoint.best(folder / "checkpoints") for folder in (run, other)]
    assert best[0] is not None
    assert best[1] is not None
    assert best[0].name == best[1].name


def same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, list):
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert ours == theirs


def during(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *numbers: signal.Signals) -> list[int]:
    """Raise signals as a function is called for the n-th time, before it does anything. The list counts its calls."""
    plain, calls = getattr(owner, name), [0]

    def asked(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            for number in numbers:
                signal.raise_signal(number)
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, asked)
    return calls


# ---------------------------------------------------------------- while it trains


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGINT", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGUSR1", "SIGHUP"))]
)
def test_amid_a_step(name: str, tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = signal.Signals[name]
    with monkeypatch.context() as patched:
        during(patched, Trainer, "_optimize", 7, number)
        ended = train(tiny)
    expected = "interrupted" if name == "SIGINT" else "preempted"
    assert (ended.status, ended.step) == (expected, 7)
    assert {k: status()[k] for k in ("status", "step", "of", "reason")} == {
        "status": expected, "step": 7, "of": 30, "reason": name
    }  # fmt: skip
    assert train(tiny).status == "done"
    assert (status()["attempt"], status()["resumed_at"]) == (2, [7])
    assert "reason" not in status()
    assert_same(Path("run"), whole)


def amid_measuring(
    patched: pytest.MonkeyPatch, step: int, then: Raise = lambda: signal.raise_signal(signal.SIGTERM)
) -> None:
    """Do something in the measurement after a step, when the features of the bank are there."""
    plain = Trainer.features

    def features(trainer: Trainer, split: str, *arguments: Any) -> torch.Tensor:
        if trainer.step == step and split == "test":
            then()
        return plain(trainer, split, *arguments)

    patched.setattr(Trainer, "features", features)


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_amid_a_measurement(epoch: int, tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not finished is made by the next process, and nothing twice; also if that one is stopped there, too."""
    for _ in range(2):
        with monkeypatch.context() as patched:
            amid_measuring(patched, 10 * epoch)
            ended = train(tiny)
        assert (ended.status, ended.step) == ("preempted", 10 * epoch)
        assert not [r for r in records(Path("run")) if r["step"] == 10 * epoch and "loss" not in r]
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)
    assert not list(Path("run/checkpoints").glob(".*"))


def test_should_stop_leaves_a_measurement_too(tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    with monkeypatch.context() as patched:
        amid_measuring(patched, 10, lambda: asked.append(True))
        ended = train(tiny, should_stop=lambda: bool(asked))
    assert (ended.status, ended.step, status()["reason"]) == ("interrupted", 10, "should_stop")
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)


def test_a_stop_at_a_step_whose_measurement_is_owed_makes_it(
    tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        amid_measuring(patched, 10)
        assert train(tiny, steps=10).status == "preempted"
    assert train(tiny, steps=10).status == "stopped"
    assert records(Path("run")) == [r for r in records(whole) if r["step"] <= 10]
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)


def test_an_observer_that_broke_while_measuring_measures_once_it_is_mended(
    tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        amid_measuring(patched, 10, lambda: 1 // 0)
        with pytest.raises(RunFailed, match="ZeroDivisionError"):
            train(tiny)
    assert (status()["status"], status()["reason"], status()["step"]) == ("failed", "error", 10)
    assert status()["message"].startswith("observer 'knn' from sslkit")
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)


@pytest.mark.parametrize(
    "call", ["_sync", *(pytest.param(n, marks=pytest.mark.slow) for n in ("_split", "_write_json", "_digest", "prune"))]
)
def test_amid_a_checkpoint(call: str, tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it comes: SLURM signals every process of a step, and torchrun its workers once more."""
    with monkeypatch.context() as patched:
        during(patched, checkpoint, call, 1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
        ended = train(tiny)
    assert ended.status == "preempted"
    newest, problems = checkpoint.newest(Path("run/checkpoints"))
    assert newest is not None
    assert (newest.step, problems) == (ended.step, [])
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)


def test_a_second_interrupt_amid_a_checkpoint_leaves_the_earlier_one(
    tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tiny, steps=5).status == "stopped"
    with monkeypatch.context() as patched:
        during(patched, checkpoint, "_sync", 3, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(tiny)
    assert (status()["status"], status()["reason"]) == ("interrupted", "SIGINT")
    assert [p.name[-2:] for p in Path("run/checkpoints").iterdir()] == ["05"], "and nothing half-written"
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)


def test_while_data_does_not_come(tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that hangs, as a network file system does: the run ends with what it has."""
    plain, hangs, released = Feed._begin, threading.Event(), threading.Event()

    def begin(feed: Feed, step: int, hands: Any) -> Any:
        finish = plain(feed, step, hands)

        def hanging() -> Any:
            hangs.set()
            released.wait(60)
            return finish()

        return hanging if step == 6 else finish

    def terminate() -> None:
        hangs.wait(60)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Feed, "_resident", lambda *_: None)
    with monkeypatch.context() as patched:
        patched.setattr(Feed, "_begin", begin)
        other = threading.Thread(target=terminate)
        other.start()
        ended = train(tiny)
        other.join()
    released.set()
    assert (ended.status, ended.step) == ("preempted", 6)
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)


# ---------------------------------------------------------------- before it trains, and after


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (preparation, "build", 1),
        pytest.param(launch, "newest_checkpoint", 1, marks=pytest.mark.slow),
        pytest.param(launch, "announce", 1, marks=pytest.mark.slow),
        (features, "features", 1),
        (Trainer, "_optimize", 1),
    ],
)
@pytest.mark.parametrize("earlier", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_before_there_is_anything_to_save(
    owner: Any, name: str, call: int, earlier: bool, tiny: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier and name == "features":
        pytest.skip("only at step 0")
    if earlier:
        train(tiny, steps=3)
    with monkeypatch.context() as patched:
        calls = during(patched, owner, name, call, signal.SIGTERM)
        ended = train(tiny)
    assert calls == [1], "at once"
    assert (ended.status, ended.step) == ("preempted", 3 if earlier else 0)
    assert (status()["status"], status()["reason"]) == ("preempted", "SIGTERM")
    assert len(checkpoint.listed(Path("run/checkpoints"))) == earlier
    assert train(tiny).status == "done"
    assert_same(Path("run"), whole)


def test_an_interrupt_before_anything_leaves_no_trace(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during(monkeypatch, preparation, "build", 1, signal.SIGINT)
    done = CliRunner().invoke(main, ["train", str(tiny), "--run-dir", "run"])
    assert (done.exit_code, Path("run").exists()) == (130, False)


def test_a_signal_before_it_trains_is_told_and_ends_well(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during(monkeypatch, preparation, "build", 1, signal.SIGTERM)
    done = CliRunner().invoke(main, ["train", str(tiny), "--run-dir", "run"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert "run: preempted before it trained; the same command takes it up" in done.output
    assert [p.name for p in Path("run").iterdir()] == ["status.json"]


def test_what_is_done_stays_done(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        during(patched, report, "write", 1, signal.SIGTERM)
        assert train(tiny).status == "done"
    during(monkeypatch, launch, "summarise", 1, signal.SIGTERM)
    sslkit.train(tiny, run_dir="run")
    assert status()["status"] == "done"


# ---------------------------------------------------------------- what status.json says of failures


def test_a_failure_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("shapes do not fit\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_optimize", fail)
        with pytest.raises(RunFailed):
            train(tiny)
    told = status()
    assert (told["status"], told["reason"], told["step"]) == ("failed", "unexpected", 0)
    assert told["message"].startswith("the run failed: ValueError: shapes do not fit (the traceback is in run")
    assert "shapes do not fit" in doctor.examine_run(Path("run")).text()

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    train(tiny, steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "build", exhausted)
        with pytest.raises(RunFailed):
            train(tiny)
    told = status()
    assert (told["status"], told["reason"], told["step"], told["of"]) == ("failed", "out_of_memory", 2, 30)
    assert "train.batch_size = 128" in told["message"]


def test_a_mistake_before_it_trains_leaves_the_status_as_it_was(tiny: Path) -> None:
    train(tiny, steps=2)
    before = Path("run/status.json").read_bytes()
    tiny.write_text(MEASURED.replace("weight_decay = 1e-4", "weight_decay = 1e-3"))
    with pytest.raises(sslkit.UserError, match="another recipe"):
        train(tiny)
    assert Path("run/status.json").read_bytes() == before


def test_who_was_ousted_ends_with_one_line_and_touches_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an orphan whose lock does not hold: another process takes the run over while it trains."""
    from filelock import FileLock

    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: None)
    plain, untouched = Trainer._optimize, {}

    def ousted(trainer: Trainer, finite: torch.Tensor) -> None:
        plain(trainer, finite)
        if trainer.step == 6:
            other = RunDirectory(Path("run"))
            other.status("running", step=5)
            other.close()
            untouched.update({p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()})

    train(tiny, steps=5)
    monkeypatch.setattr(Trainer, "_optimize", ousted)
    with pytest.raises(RunFailed, match=r"attempt 3 of this run .* has taken over; this is attempt 2") as told:
        train(tiny)
    assert len(told.value.lines) == 1
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == untouched


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(tiny: Path) -> None:
    train(tiny, steps=2)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid, dead in ((gone.pid, True), (os.getpid(), False)):
        Path("run/status.json").write_text(json.dumps(status() | {"status": "running", "pid": pid}))
        assert (f"process {pid} is gone: it died without a word" in doctor.examine_run(Path("run")).text()) == dead
        assert ("died without a word" in report.text(Path("run"))) == dead


# ---------------------------------------------------------------- whole processes

LONG = ("--set", "train.epochs=3000", "--set", "observers.knn.every_epochs=5000")


def started(tiny: Path, *options: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sslkit", "train", str(tiny), "--run-dir", "run", *options]
    return subprocess.Popen(command, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how)


def wait_for_step(step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if Path("run/metrics.jsonl").is_file() and any(r["step"] >= step for r in read_metrics(Path("run"))):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run never came to the step")


@pytest.mark.slow
def test_two_processes_at_once(tiny: Path) -> None:
    first = started(tiny, *LONG)
    wait_for_step(5, first)
    first.send_signal(signal.SIGTSTP), time.sleep(0.1), first.send_signal(signal.SIGCONT)  # Ctrl-Z and fg
    second = started(tiny, *LONG)
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (2, "")
    assert f"another process is training in this directory (process {first.pid} on " in err
    assert len(err.splitlines()) == 1
    first.terminate()
    out, err = first.communicate(timeout=60)
    assert (first.returncode, err) == (0, "")
    assert (status()["status"], status()["attempt"]) == ("preempted", 1)


@pytest.mark.slow
def test_a_closed_terminal_saves_and_nohup_does_not_care(tiny: Path) -> None:
    """What a closed ssh session does: the terminal is gone, and everybody gets SIGHUP."""
    ours, theirs = pty.openpty()
    process = started(tiny, *LONG, stdout=theirs, stderr=theirs, stdin=theirs, start_new_session=True)
    os.close(theirs)
    wait_for_step(5, process)
    os.close(ours)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert (status()["status"], status()["reason"]) == ("preempted", "SIGHUP")

    at = status()["step"] + 50
    nohup = started(tiny, *LONG, "--steps", str(at), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(at - 40, nohup)
    nohup.send_signal(signal.SIGHUP)
    assert nohup.wait(timeout=60) == 0
    assert status()["status"] == "stopped"
    nohup.communicate()


@pytest.mark.slow
def test_readers_of_both_streams_may_go_away(tiny: Path) -> None:
    process = started(tiny)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close(), process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert status()["status"] == "done"
