from __future__ import annotations

import signal
import threading

import pytest

from sslkit.stopping import StopSignals


def test_a_signal_is_noted_the_next_one_takes_its_usual_course_and_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopSignals() as signals:
        assert not signals.asked()
        signal.raise_signal(signal.SIGINT)
        assert (signals.asked(), signals.received) == (True, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def test_it_can_be_asked_in_another_way() -> None:
    asked: list[bool] = []
    with StopSignals(lambda: bool(asked)) as signals:
        assert not signals.asked()
        asked.append(True)
        assert signals.asked()
        assert signals.received is None


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
