"""Files in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslkit.files import in_one_piece


def test_the_old_text_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    with in_one_piece(path) as staging:
        staging.write_text("half")
        assert path.read_text() == "old"
        staging.write_text("whole")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("status.json", "whole")]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_text_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")

    def fail() -> None:
        with in_one_piece(path) as staging:
            staging.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("status.json", "old")]


def test_a_name_with_dots_and_spaces_is_one_file(tmp_path: Path) -> None:
    with in_one_piece(tmp_path / "a b.tar.gz") as staging:
        staging.write_bytes(b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["a b.tar.gz"]
