from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from sslkit.progress import Display, counted

RUN = SimpleNamespace(info=SimpleNamespace(total_steps=20))


def test_without_a_terminal_it_prints_lines_and_every_knn() -> None:
    out = io.StringIO()
    with Display(Console(file=out), 20, 10) as display:
        display.advance(0)
        display.recorded(RUN, {"step": 0, "epoch": 0.0, "knn_top1": 0.1234})  # type: ignore[arg-type]
        for step in range(1, 6):
            record = {
                "step": step,
                "epoch": step / 10,
                "loss": 3.5,
                "tau": 0.99,
                "images_per_second": 512.4,
                "data_wait": 0.02,
            }
            display.recorded(RUN, record)  # type: ignore[arg-type]
        display.recorded(RUN, {"step": 10, "epoch": 1.0, "knn_top1": 0.5})  # type: ignore[arg-type]
    lines = out.getvalue().splitlines()
    assert lines[0] == "kNN top-1 of the random network: 0.1234"
    expected = "epoch 0.10 step 1/20 loss 3.5000 tau 0.99000 images/s 512 waiting for data 2%"
    assert " ".join(lines[1].split()) == expected
    assert len(lines) == 3, "records come no more often than every few seconds"
    assert lines[2].endswith("kNN 0.5000")


def test_records_without_a_figure_worth_a_glance_are_not_printed() -> None:
    out = io.StringIO()
    with Display(Console(file=out), 20, 10) as display:
        display.recorded(RUN, {"step": 0, "epoch": 0.0, "effective_rank": 7.0})  # type: ignore[arg-type]
    assert out.getvalue() == ""


def test_on_a_terminal_one_line_is_drawn_over() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, color_system=None)
    with Display(console, 20, 10) as display:
        display.recorded(RUN, {"step": 5, "epoch": 0.5, "loss": 3.5, "knn_top1": 0.25})  # type: ignore[arg-type]
        display.advance(5)
        display.say("going on from [step] 5")
    text = out.getvalue()
    for expected in ("5/20", "epoch 0.5", "loss 3.5000", "kNN 0.2500", "going on from [step] 5"):
        assert expected in text


@pytest.mark.parametrize(("in_bytes", "count"), [(False, "64/100"), (True, "64/100 bytes")])
def test_images_are_counted_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, in_bytes: bool, count: str) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with counted("test images", 100) as advance:
        advance(100)
    assert out.getvalue() == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with counted("test images", 100) as advance:
        advance(64)
    assert out.getvalue() == "", "colours were asked for, and no bar in a file"
    monkeypatch.setattr(out, "isatty", lambda: True)
    with counted("of unknown number", None) as advance:
        advance(64)
    assert out.getvalue() == ""
    with counted("\x1b[31m[bold]test images", 100, size_in_bytes=in_bytes) as advance:
        advance(64)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue())
    assert "\\x1b[31m[bold]test images" in text
    assert count in text
