from __future__ import annotations

import json
from pathlib import Path

import pytest

from sslkit.result import Metrics, Result


def test_curves_leave_out_what_was_not_measured_or_not_finite() -> None:
    metrics = Metrics(
        [{"step": 0, "epoch": 0.0, "knn_top1": 0.1}, {"step": 5, "epoch": 0.5, "loss": 2.0},
         {"step": 6, "epoch": 0.6, "loss": None}, {"step": 10, "epoch": 1.0, "loss": 1.0, "knn_top1": 0.2}]
    )  # fmt: skip
    assert metrics.curve("knn_top1") == ([0, 10], [0.1, 0.2])
    assert metrics.curve("loss") == ([5, 10], [2.0, 1.0])
    assert metrics.last("loss") == 1.0
    with pytest.raises(KeyError, match=r"'knn' was not measured; there are: knn_top1, loss"):
        metrics.curve("knn")


def test_a_result_is_what_the_directory_says(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"status": "stopped", "step": 5, "of": 20}))
    records = [{"step": 0, "epoch": 0.0, "loss": 2.0}, {"step": 5, "epoch": 0.5, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    result = Result.of(tmp_path, "stopped")
    assert (result.status, result.step, result.total_steps) == ("stopped", 5, 20)
    assert list(result.metrics) == records
    assert result.verdict == result.examination.verdict
