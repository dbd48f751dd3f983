from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sslkit.errors import UserError
from sslkit.run_directory import RunDirectory, environment, read_metrics


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
    assert files.read_status() | {"status": "running", "step": 3} == files.read_status()
    (tmp_path / "status.json").write_text("{")
    assert files.read_status() == {}
    files.close()


def test_the_environment_is_plain_data() -> None:
    found = environment(["sslkit", "train"], [{"component": "loss.x"}], "cpu", 2, "abc")
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"]
    assert found["data_fingerprint"] == "abc"
