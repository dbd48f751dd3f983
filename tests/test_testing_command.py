"""`sslkit check-plugin`: a line for each check, exit codes, and what a mistake is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sslkit.cli import main


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check-plugin", *arguments])


def test_a_line_for_each_check_and_a_summary() -> None:
    result = call("schedule.cosine", "--set", "start=1.0", "--set", "end=0.0")
    assert result.exit_code == 0, result.output
    first, *checks, last = result.output.splitlines()
    assert first.startswith("schedule.cosine from sslkit ")
    assert first.endswith("with start = 1.0, end = 0.0")
    assert all(line.startswith("ok  ") for line in checks)
    assert [line.split()[1] for line in checks][-2:] == ["schedule_values", "schedule_pure"]
    assert last.startswith(f"schedule.cosine: all {len(checks)} checks passed, in ")


def test_a_failed_check_says_what_to_change_and_exits_with_1() -> None:
    result = call("view_generator.identity", "--fast")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    failed = next(n for n, line in enumerate(lines) if line.startswith("FAILED  views_differ"))
    assert "get the same view 0; draw parameters of shape" in " ".join(lines[failed + 1 : failed + 3])
    assert lines[-1].endswith("checks failed: views_differ, health")
    assert "compiles" not in result.output


def test_what_does_not_apply_is_not_shown() -> None:
    text = call("loss.cosine", "--fast").output
    assert " pure " in text
    assert " commit " not in text


HEAD = '''
from torch import nn
from sslkit.api import Head


class Plain(Head):
    """A linear layer."""

    width: int = 8
    """Its width."""

    def build(self, in_dim, run):
        layer = nn.Linear(in_dim, self.width)
        layer.out_dim = self.width
        return layer
'''


def test_a_class_of_a_local_file_is_tried_out_with_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.py").write_text(HEAD)
    refused = call("head../plain.py:Plain", "--fast")
    assert refused.exit_code == 2
    assert "add --allow-local-code" in refused.output
    result = call("head../plain.py:Plain", "--fast", "--allow-local-code")
    assert result.exit_code == 0, result.output
    assert "import_without_torch" not in result.output


def test_json() -> None:
    result = call("view_generator.identity", "--fast", "--json", "--image-size", "16")
    rows = {row["check"]: row for row in json.loads(result.output)}
    assert result.exit_code == 1
    assert rows["views_differ"]["status"] == "failed"
    assert rows["draws"] == rows["draws"] | {"status": "ok", "message": ""}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["los.cosine"], "los.cosine: should read KIND.NAME, such as loss.cosine; did you mean 'loss'"),
        (["cosine"], "cosine: should read KIND.NAME"),
        (["loss.cosin"], "no loss is named 'cosin'; did you mean 'cosine'?"),
        (["head.mlp", "--set", "out_dmi=3"], "head.mlp: out_dmi: unknown option; did you mean 'out_dim'?"),
        (["head.mlp", "--set", "out_dim"], "--set out_dim: should read OPTION=VALUE"),
        (["head.mlp", "--set", "out_dim=wide"], "head.mlp: out_dim: Input should be a valid integer"),
        (["data_source.folder"], "data_source.folder: size: is required; give it: --set size=VALUE"),
    ],
)
def test_a_mistake_is_a_line_and_exits_with_2(arguments: list[str], says: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_its_help_brings_no_torch() -> None:
    code = (
        "import sys; from sslkit.cli import main; main(['check-plugin', '--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
