"""A reader that goes away, as `| head` does, ends no work: what a command was asked for is done all the same."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image

import sslkit
from sslkit import cli, telling

Unread = Callable[..., object]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 3 images beside it."""
    folder = tmp_path_factory.mktemp("unread")
    (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    sslkit.train(str(folder / "tiny.toml"), run_dir=folder / "run", steps=10, quiet=True)
    for number in range(3):
        (folder / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number, 80 * number, 0)).save(folder / "photos" / f"{number}.png")
    return folder


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Unread]:
    """Runs a command, nobody reading even its first line, and gives its exit code."""
    monkeypatch.chdir(tmp_path)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out, os.fdopen(os.dup(write), "w") as err:

        def command(*arguments: object) -> object:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", out)
                patch.setattr(sys, "stderr", err)
                with pytest.raises(SystemExit) as ended:
                    cli.main(list(map(str, arguments)))
            return ended.value.code

        yield command


def test_an_evaluation_is_kept(trained: Path, unread: Unread) -> None:
    told = ("--protocol", "linear", "--queries", 50, "--no-cache", "--no-floor")
    assert unread("evaluate", trained / "run", *told) == 0
    records = json.loads((trained / "run" / "evaluation.json").read_text())["records"]
    assert "linear" in {record["protocol"] for record in records}


def test_features_and_pages_and_exports_are_written(trained: Path, unread: Unread) -> None:
    photos = trained / "photos"
    (photos / "3.png").write_bytes(b"broken")
    assert unread("embed", trained / "run", photos, "-o", "out.parquet") == 0
    assert Path("out.parquet").exists()
    assert unread("search", trained / "run", photos / "0.png", photos, "-o", "near.html") == 0
    assert Path("near.html").exists()
    assert unread("export", trained / "run", "--to", "exported") == 0
    assert Path("exported/sslkit.json").exists()
    assert unread("views", trained / "tiny.toml", "-o", "views.png") == 0
    assert Path("views.png").exists()


def test_a_replay_ends_and_a_verdict_is_the_exit_code(trained: Path, unread: Unread) -> None:
    assert unread("replay", trained / "run", "--step", 3, "--save-views", "batch.png") == 0
    assert Path("batch.png").exists()
    Path("log.txt").write_text("0.1489\n0.0108\n0.0100\n0.0087\n0.0054\n0.0092\n0.0855\n0.2342\n0.0304\n0.0142\n")
    assert unread("doctor", "--csv", "log.txt") == 2
    assert unread("check", trained / "tiny.toml", "--set", "optimizer.lr=1e9", "--strict") == 2
    assert unread("check-plugin", "loss.cosine", "--fast") == 0


def test_what_only_prints_ends_well(unread: Unread, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unread("recipes") == 0
    assert unread("diff", "quickstart", "quickstart", "--json") == 0
    assert set(cli.main.commands) >= cli.ONLY_PRINT

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    # A pipe that breaks while there is something to do is no good end.
    monkeypatch.setattr("sslkit.embedding.command", broken)
    assert unread("embed", "run", "photos", "-o", "out.parquet") == 1
    monkeypatch.setattr("sslkit.run_list.show", broken)
    assert unread("runs") == 0


def test_an_error_has_its_code_and_lines_are_only_text(unread: Unread, capsys: pytest.CaptureFixture[str]) -> None:
    assert unread("train", "no-such-recipe") == 2
    telling.tell("a\x1b[31m\nb")
    telling.tell("c", error=True)
    assert capsys.readouterr() == ("a\\x1b[31m\nb\n", "c\n")


def test_no_module_of_a_command_that_works_prints_past_this() -> None:
    folder = Path(sslkit.__file__).parent
    for name in ("embedding", "searching", "replaying", "checkup", "view_grid", "sweeping/__init__"):
        assert not re.search(r"\bprint\(|click\.echo\(", (folder / f"{name}.py").read_text(encoding="utf-8")), name
