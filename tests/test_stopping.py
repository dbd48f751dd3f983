from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sslkit.stopping import Stopped, StopSignals

AGAIN_AND_AGAIN = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
"""Those that come by themselves, perhaps more than once."""


@pytest.fixture(autouse=True)
def _hangups_as_in_a_terminal() -> Iterator[None]:
    """Under nohup, and in some CI, the tests themselves ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_an_interrupt_is_noted_the_next_one_takes_its_usual_course_and_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *AGAIN_AND_AGAIN)}
    with StopSignals(settled=True) as signals:
        assert not signals.asked()
        signal.raise_signal(signal.SIGINT)
        assert (signals.asked(), signals.received) == (True, signal.SIGINT)
        assert (signals.status, signals.reason) == ("interrupted", "SIGINT")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", AGAIN_AND_AGAIN)
def test_a_schedulers_signal_is_noted_however_often_it_comes(number: signal.Signals) -> None:
    with StopSignals(settled=True) as signals:
        for _ in range(3):
            signal.raise_signal(number)
            assert signals.asked()
        assert (signals.status, signals.reason) == ("preempted", number.name)
        signal.raise_signal(signal.SIGINT)
        assert signals.reason == number.name, "the first one counts"


@pytest.mark.parametrize("number", AGAIN_AND_AGAIN)
def test_before_there_is_anything_to_save_a_signal_ends_things_at_once(number: signal.Signals) -> None:
    with StopSignals() as signals:
        with pytest.raises(Stopped):
            signal.raise_signal(number)
        signal.raise_signal(number)  # while everything is being closed
        assert signals.asked(), "should the exception be lost, as in a destructor, the loop still hears of it"
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_once_all_is_saved_an_interrupt_ends_things_at_once() -> None:
    with StopSignals() as signals:
        signals.settle()
        signals.saved()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_nohup_and_background_shells_ignore_stays_ignored() -> None:
    for number in (signal.SIGHUP, signal.SIGINT):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with StopSignals() as signals:
                signal.raise_signal(number)
                assert not signals.asked()
            assert signal.getsignal(number) is signal.SIG_IGN
        finally:
            signal.signal(number, before)


def test_it_can_be_asked_in_another_way() -> None:
    asked: list[bool] = []
    with StopSignals(lambda: bool(asked)) as signals:
        assert not signals.asked()
        asked.append(True)
        assert signals.asked()
        asked.clear()
        assert signals.asked(), "who asked once has asked"
        assert (signals.received, signals.status, signals.reason) == (None, "interrupted", "should_stop")


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopSignals() as signals:
            seen.append(signals.asked())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("it could not be put back"))
    with StopSignals() as signals:
        assert not signals.asked()
    monkeypatch.undo()


# ---------------------------------------------------------------- the process that started this one

CHILD = """
from sslkit.stopping import die_with_parent; import os, time
die_with_parent({parent}); print(os.getpid(), flush=True); time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether a process ends within a few seconds; one that nobody waits for stays as a zombie."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has it")
@pytest.mark.parametrize("known", [True, False])
def test_a_process_ends_with_the_one_that_started_it(known: bool) -> None:
    child = CHILD.format(parent="int(os.environ['PARENT'])" if known else "")
    parent = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {child!r}], env=os.environ | {{'PARENT': str(os.getpid())}})"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    os.kill(pid, 0)
    started.kill()
    started.wait()
    started.stdout.close()
    assert gone(pid)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has it")
def test_a_process_whose_parent_died_before_it_could_ask_ends_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(parent=2**22)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
