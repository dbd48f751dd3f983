"""Processes, a few at a time: started, watched, and asked to end when the sweep is."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from sslkit.environment import cores_here
from sslkit.errors import RunFailed
from sslkit.stopping import ASKING

POLL = 0.1
"""Seconds between looks at the processes."""


@dataclass(frozen=True)
class Task:
    """A process to run."""

    name: str
    module: str
    """What `python -m` is given."""
    arguments: Sequence[str]
    log: Path
    """Where what it says is added."""


class Work(Protocol):
    """What there is to do."""

    def take(self) -> Task | None:
        """The next process to start, if one can be started now."""

    def left(self) -> bool:
        """Whether there will be more, though nothing may be running."""

    def ended(self, task: Task, code: int) -> None:
        """A process ended; a code below 0 is the signal that killed it."""


@dataclass
class Signals:
    """Notes what asks the sweep to end; the loop passes it on. What was asked of this process to be ignored, is."""

    received: list[int] = field(default_factory=list)
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        for name in ASKING:
            number = getattr(signal, name, None)  # Windows has neither SIGUSR1 nor SIGHUP
            if number is None or (handler := signal.getsignal(number)) in (None, signal.SIG_IGN):
                continue
            try:
                signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there stops us in their own way
                break
            self._before[number] = handler
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


def run(work: Work, places: Sequence[Mapping[str, str]]) -> int | None:
    """Do the work, one process in each place at a time, with its variables in the environment.

    A signal that asks this process to end is passed on to those that run, which are waited for; nothing is started
    after it. They are in sessions of their own, so that Ctrl-C reaches them once. Should this process be killed, the
    system asks them to end.

    Returns:
        The first signal that came, or None if the work is done.

    Raises:
        RunFailed: a process cannot be started.
    """
    running: dict[int, tuple[Task, subprocess.Popen[bytes]]] = {}
    told = 0
    with Signals() as signals:
        try:
            while True:
                for number in signals.received[told:]:
                    told += 1
                    _tell([process for _, process in running.values()], number)
                for place, (task, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[place]
                        work.ended(task, code)
                if not signals.received:
                    for place in [place for place in range(len(places)) if place not in running]:
                        if begun := work.take():
                            running[place] = begun, start(begun, places[place])
                if not running and (signals.received or not work.left()):
                    return signals.received[0] if signals.received else None
                time.sleep(POLL)
        finally:  # whatever went wrong here, nobody is left behind
            _tell([process for _, process in running.values()], signal.SIGTERM)
            for _, process in running.values():
                process.wait()


def _tell(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if os.name != "nt":
            process.send_signal(number)
        elif number != signal.SIGINT:  # Ctrl-C has reached it by itself
            process.terminate()


def start(task: Task, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process whose words go to its log.

    Raises:
        RunFailed: it cannot be started, or the log cannot be written.
    """
    # Only Linux can tie a process to its parent, and only Unix can become another program in place.
    follow = ["sslkit.stopping", str(os.getpid())] if sys.platform.startswith("linux") else []
    command = [sys.executable, "-m", *follow, task.module, *task.arguments]
    try:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            log.write(f"$ {shlex.join(['python', '-m', task.module, *task.arguments])}\n".encode())
            log.flush()
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **variables}, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise RunFailed(f"{task.name}: cannot be started: {error}") from error


def places(jobs: int, device: str) -> list[dict[str, str]]:
    """The environment of each of so many processes at a time: their share of the cores, and of the GPUs one each.

    What the environment says of threads already stays.
    """
    if jobs == 1:
        return [{}]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores_here() // jobs)))
    devices = _devices() if device != "cpu" else []
    return [
        {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if devices else {})
        for place in range(jobs)
    ]


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
