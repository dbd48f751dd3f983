"""`sslkit train --nproc N`: the same command in N processes on this machine, started and watched by torchrun's agent.

No torch at import. The agent starts all processes again when one dies, and they go on from the newest checkpoint. An
error that would only come again is no reason to: the process that meets it leaves its exit code in a file, and whoever
is started after that ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from sslkit.environment import cores_here
from sslkit.errors import UserError

OUTCOME = "SSLKIT_OUTCOME"
"""Environment variable: the file that a process leaves its exit code in."""
RESTARTS = 3
"""How often the processes are started again."""
PATIENCE = 3600
"""Seconds that processes have to save in once a signal came; a scheduler gives less."""


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `sslkit ARGUMENTS` in several processes, and return the exit code of the first that said one.

    Raises:
        UserError: torch cannot start several processes here.
    """
    from torch import distributed

    if not distributed.is_available():
        raise UserError("--nproc: this build of torch has no torch.distributed; train with one process")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # processes tell their errors themselves
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores_here() // processes)))
    # Else processes that are started again may read the addresses of those that died, and wait for them (torch 2.15).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Of newer versions of torch: SIGUSR1, which schedulers send, is passed on, and a checkpoint may take its time.
    wished = {"signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "shutdown_timeout": PATIENCE}
    known: dict[str, Any] = {
        name: value for name, value in wished.items() if name in signature(LaunchConfig).parameters
    }
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=RESTARTS, **known,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sslkit-") as folder:
        outcome = Path(folder) / "exit-code"
        os.environ[OUTCOME] = str(outcome)
        code, handlers = 0, {number: signal.getsignal(number) for number in signal.valid_signals()}
        try:
            elastic_launch(config, sys.executable)("-m", "sslkit", *arguments)
        except SignalException as signalled:
            code = 128 + int(signalled.sigval)
        except ChildFailedError as failed:
            first = failed.get_first_failure()[1].exitcode
            code = 1
            if not outcome.exists():
                killed = f"was killed by signal {-first}" if first < 0 else f"ended with {first}"
                print(
                    f"a process {killed}, after {RESTARTS} restarts; what was saved is untouched, and the same command "
                    "goes on from it",
                    file=sys.stderr,
                )
        finally:
            del os.environ[OUTCOME]
            for number, handler in handlers.items():  # the agent leaves its own
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
        return int(outcome.read_text()) if outcome.exists() else code


def leave(code: int) -> int:
    """Note the exit code that a run ends with, in a process that `launch` started: the first one, which writes last.

    Returns:
        What this process itself should end with: for the agent, everything but an error is success.
    """
    path = os.environ.get(OUTCOME)
    if path is None:
        return code
    if os.environ.get("RANK", "0") == "0":
        Path(path).write_text(str(code))
    return 0


def leave_error(code: int) -> bool:
    """Note the exit code of an error that would only come again; whether nobody had noted one before."""
    path = os.environ.get(OUTCOME)
    if path is None:
        return True
    try:
        with Path(path).open("x") as file:
            file.write(str(code))
    except FileExistsError:
        return False
    return True


def note_directory(directory: str) -> None:
    """Note which run was begun, for processes that are started again."""
    if path := os.environ.get(OUTCOME):
        Path(path).with_name("directory").write_text(directory)


def noted_directory() -> str | None:
    """The directory of the run that processes before these had begun."""
    path = os.environ.get(OUTCOME)
    note = Path(path).with_name("directory") if path else None
    return note.read_text() if note and note.exists() else None


def left() -> int | None:
    """The exit code that a process of this run has left already."""
    path = os.environ.get(OUTCOME)
    return int(Path(path).read_text()) if path and Path(path).exists() else None


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """A command line without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == name:
            skip = True
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept
