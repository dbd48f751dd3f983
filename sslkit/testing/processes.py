"""Processes that train the small recipe together, by the engine itself: `python -m sslkit.testing.processes FOLDER`."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslkit import distributed
from sslkit.api import Component, RunInfo
from sslkit.testing.bench import Bench

STEPS = 2
WAIT = 120
"""Seconds after which processes are taken to hang."""


def train_together(
    components: Sequence[Component], run: RunInfo, processes: int, folder: Path, *, alike: bool = False
) -> list[tuple[str, int]]:
    """Let processes take two steps of the small recipe around each component; `state_of` reads what came of them.

    Args:
        components: which the others have to be able to import.
        run: the facts that they are built for.
        processes: how many.
        folder: an empty one.
        alike: with networks that treat each image alone, in float64: what comes of it is then the same however the
            batch is divided.

    Returns:
        What each process said on stderr, and its exit code; 3 where the component does not fit the small recipe.

    Raises:
        subprocess.TimeoutExpired: they do not end.
    """
    (folder / "task").write_bytes(pickle.dumps((sys.path, list(components), run, alike)))
    return run_together([sys.executable, "-m", "sslkit.testing.processes", str(folder)], processes)


def run_together(command: Sequence[str], processes: int) -> list[tuple[str, int]]:
    """Run a command in several processes that `sslkit.distributed.joined` connects.

    Returns:
        What each said on stderr, and its exit code.

    Raises:
        subprocess.TimeoutExpired: they do not end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
    }  # fmt: skip
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        return [(process.communicate(timeout=WAIT)[1].decode(), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def state_of(folder: Path, number: int, rank: int) -> dict[str, Tensor]:
    """What process `rank` had after the steps with component `number`: all state, the loss and the last gradients."""
    return load_file(folder / f"{number}-{rank}.safetensors")


def trained(component: Component, run: RunInfo, world: distributed.World, *, alike: bool) -> dict[str, Tensor]:
    """The same, of this process."""
    from sslkit.testing.engine import folder, state, steps, trainer

    with folder() as path, trainer(Bench(component, run), path, observed=False, world=world, alike=alike) as trains:
        steps(trains, STEPS)
        found = {**state(trains), "total": trains.terms.total}
        found |= {f"term.{name}": value for name, value in trains.terms.terms.items()}
        for name, parameter in [*trains.model.named_parameters(), *trains.loss.named_parameters()]:
            if parameter.grad is not None:
                found[f"gradient.{name}"] = parameter.grad
        return {name: value.detach().clone().contiguous() for name, value in found.items()}


def main(folder: Path) -> None:
    """Train as one of the processes, and write what came of it."""
    path, components, run, alike = pickle.loads((folder / "task").read_bytes())
    sys.path[:] = path
    with distributed.joined(torch.device("cpu")) as (world, _):
        for number, component in enumerate(components):
            save_file(trained(component, run, world, alike=alike), folder / f"{number}-{world.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
