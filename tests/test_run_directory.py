from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from filelock import FileLock

from sslkit import checkpoint, run_directory
from sslkit.environment import environment
from sslkit.errors import RunFailed, UserError
from sslkit.run_directory import RunDirectory, died, read_metrics


def test_records_are_lines_and_are_cut_to_an_offset(tmp_path: Path) -> None:
    files = RunDirectory(tmp_path / "run")
    files.open_metrics(0)
    files.record({"step": 1})
    offset = files.metrics_offset
    files.record({"step": 2})
    files.close()
    again = RunDirectory(tmp_path / "run")
    again.open_metrics(offset)
    assert again.metrics_offset == offset
    again.record({"step": 3})
    again.close()
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 3]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_one_writer(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="another process is training"):
        RunDirectory(tmp_path)
    first.close()
    RunDirectory(tmp_path).close()


def test_the_one_that_writes_is_named(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.status("running", step=0)
    with pytest.raises(UserError, match=rf"training in this directory \(process {os.getpid()} on .+\); choose"):
        RunDirectory(tmp_path)
    first.close()


def without_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that does not reach the other process, as on a network file system with local locks."""
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: None)


def test_where_the_lock_does_not_hold_the_later_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_lock(monkeypatch)
    first = RunDirectory(tmp_path)
    first.open_metrics(0)
    first.record({"step": 1})
    first.status("running", step=1)
    looking = RunDirectory(tmp_path)
    looking.close()
    first.status("running", step=2)
    assert first.read_status()["attempt"] == 1, "who only looks takes nothing over"

    second = RunDirectory(tmp_path)
    second.open_metrics(0)
    second.record({"step": 1})
    second.status("running", step=1)
    written = (tmp_path / "metrics.jsonl").read_bytes()
    refused = rf"{tmp_path}: attempt 2 of this run \(process {os.getpid()} on .+\) has taken over; this is attempt 1"
    for write in (
        lambda: first.record({"step": 3}),
        lambda: first.status("done", step=3),
        lambda: first.write("facts.json", "{}"),
        lambda: first.forget(0),
        lambda: first.open_metrics(0),
        lambda: checkpoint.save(first.checkpoints, 3, {}, {}, allowed=first.claim),
    ):
        with pytest.raises(RunFailed, match=refused):
            write()
    assert (tmp_path / "metrics.jsonl").read_bytes() == written
    assert second.read_status()["attempt"] == 2
    assert list(second.checkpoints.iterdir()) == []
    second.status("done", step=2)
    first.close(), second.close()


def test_two_that_take_the_same_number_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_lock(monkeypatch)
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    read = run_directory.read_json
    first.claim()
    monkeypatch.setattr(run_directory, "read_json", lambda path: {})  # as if both had looked at the same moment
    second.claim()
    monkeypatch.setattr(run_directory, "read_json", read)
    with pytest.raises(RunFailed, match="has taken over"):
        first.claim()
    second.claim()
    first.close(), second.close()


def test_a_directory_that_was_removed_is_one_line(tmp_path: Path) -> None:
    files = RunDirectory(tmp_path / "run")
    files.status("running", step=0)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunFailed, match=r"run: was removed or emptied while this process trained in it"):
        files.status("running", step=1)
    files.close()
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_told_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    assert RunDirectory(tmp_path / "sound").unlocked == ""
    monkeypatch.setattr(fcntl, "flock", refuse)
    files = RunDirectory(tmp_path / "run")
    assert files.unlocked == "No locks available"
    files.status("running", step=0)
    files.close()


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock: cannot be locked: Is a directory"):
        RunDirectory(tmp_path)


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*another run_dir"):
        RunDirectory(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written"):
            RunDirectory(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_status_is_readable_at_any_moment(tmp_path: Path) -> None:
    files = RunDirectory(tmp_path)
    assert files.read_status() == {}
    files.status("running", step=3)
    told = files.read_status()
    assert list(told) == ["status", "time", "attempt", "host", "pid", "step"], "docs/reference/run-directory.md"
    assert (told["status"], told["attempt"], told["host"], told["pid"], told["step"]) == (
        "running", 1, socket.gethostname(), os.getpid(), 3
    )  # fmt: skip
    assert datetime.fromisoformat(told["time"]).tzinfo is not None
    (tmp_path / "status.json").write_text("{")
    assert files.read_status() == {}
    files.close()


def test_a_run_that_ends_before_it_trains_keeps_its_place(tmp_path: Path) -> None:
    files = RunDirectory(tmp_path)
    files.status("stopped", step=7, of=20, resumed_at=[3], reason="old")
    files.close()
    files = RunDirectory(tmp_path)
    files.ended_early("preempted", reason="SIGTERM")
    told = files.read_status()
    assert {key: told.get(key) for key in ("status", "step", "of", "resumed_at", "reason", "attempt")} == {
        "status": "preempted", "step": 7, "of": 20, "resumed_at": [3], "reason": "SIGTERM", "attempt": 2
    }  # fmt: skip
    files.ended_early("failed")
    assert files.read_status() == told, "it has ended already"
    files.status("done", step=20)
    files.close()
    files = RunDirectory(tmp_path)
    files.ended_early("preempted")
    assert files.read_status()["status"] == "done"
    files.close()


def test_a_process_that_died_is_told_from_one_that_lives() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = {"status": "running", "host": socket.gethostname(), "pid": gone.pid}
    assert died(here)
    assert not died(here | {"pid": os.getpid()})
    assert not died(here | {"host": "elsewhere"}), "nobody knows from here"
    assert not died(here | {"status": "preempted"})
    assert not died(here | {"pid": 1})
    assert not died({"status": "running", "pid": gone.pid}), "written by an older version"
    assert not died(here | {"pid": 10**30})


def test_the_environment_is_plain_data() -> None:
    found = environment(["sslkit", "train"], [{"component": "loss.x"}], "cpu", 2, "abc")
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"]
    assert found["data_fingerprint"] == "abc"
