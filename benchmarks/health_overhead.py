"""What the observers that are on by default cost: the training loop with them against the same loop without.

    SSLKIT_DATA=... python benchmarks/health_overhead.py [--rounds 5] [--device auto] [--clock wall] [--json out.json]

byol_cifar10_cpu's networks on CIFAR-10, in one process and turn by turn: a round is a few steps of each. Then every
call of an observer is timed by itself. A step of training costs its own share, the record that is written every
`train.log_every` steps (50 by default) a 50th, and the measurements after an epoch, of 195 steps, a 195th. Step 0 and
the end of the run are left out: a run has one of each, however long.

Writing to TensorBoard or a report is not measurement, so those observers are off in both loops.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sslkit.api import Observer
from sslkit.build import build, choose_device
from sslkit.data import Draw
from sslkit.events import Hooks
from sslkit.recipe import Train, read_recipe
from sslkit.registry import load
from sslkit.run_directory import RunDirectory
from sslkit.trainer import Trainer

WATCHING = ("health", "knn", "probe")
LOG_EVERY = Train.model_fields["log_every"].default
EVENTS = [name for name in vars(Hooks) if not name.startswith("_")]


class Clock:
    """Milliseconds of every call that was timed, by observer and event."""

    def __init__(self, device: torch.device, cpu: bool) -> None:
        self.device, self.on = device, False
        self.read = time.process_time if cpu else time.perf_counter
        self.spent: dict[tuple[str, str], list[float]] = defaultdict(list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * self.read()

    def time_calls_of(self, name: str, observer: Any) -> None:
        """Put a timed method in the place of each of an observer's hooks."""
        for event in EVENTS:
            if hasattr(observer, event):
                setattr(observer, event, self._timed((name, event), getattr(observer, event)))

    def _timed(self, key: tuple[str, str], method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def timed(*arguments: Any, **named: Any) -> None:
            if not self.on:
                return method(*arguments, **named)
            before = self.now()
            method(*arguments, **named)
            self.spent[key].append(self.now() - before)
            return None

        return timed

    def drain(self) -> dict[str, float]:
        """Milliseconds by observer since the last call."""
        found: dict[str, float] = dict.fromkeys(WATCHING, 0.0)
        for (name, _), times in self.spent.items():
            found[name] += sum(times)
        self.spent.clear()
        return found


def trainer(device: torch.device, folder: Path, observers: tuple[str, ...], clock: Clock) -> Trainer:
    files = RunDirectory(folder)
    files.open_metrics(0)
    parts = build(read_recipe("byol_cifar10_cpu"), device, lambda text: None)
    # With their default options, whatever the recipe sets for its published figures.
    specs: dict[str, Observer] = {name: load("observer", name)() for name in observers}  # type: ignore[misc]
    parts.observers = {name: spec.build(parts.run) for name, spec in specs.items()}
    for name, observer in parts.observers.items():
        clock.time_calls_of(name, observer)
    made = Trainer(parts, files, say=lambda text: None)
    made.recipe = made.recipe.model_copy(
        update={"train": made.recipe.train.model_copy(update={"log_every": LOG_EVERY})}
    )
    return made


def steps_of(run: Trainer) -> Iterator[Draw]:
    yield from run.feed.steps(0, run.info.total_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of each a round")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: processor time of this process, which other programs disturb less; only for --device cpu",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = choose_device(options.device)
    clock = Clock(device, options.clock == "cpu")

    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "with": trainer(device, Path(folder, "a"), WATCHING, clock),
            "without": trainer(device, Path(folder, "b"), (), clock),
        }
        feeds = {name: steps_of(run) for name, run in loops.items()}
        watched = loops["with"]
        watched.bus.emit("run_started", run=watched)
        for name, run in loops.items():
            for _ in range(3):
                run.train_step(next(feeds[name]))

        whole: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(options.rounds):
            for name, run in loops.items():
                before = clock.now()
                for _ in range(options.steps):
                    run.train_step(next(feeds[name]))
                whole[name].append((clock.now() - before) / options.steps)

        clock.on = True
        kinds: dict[str, list[dict[str, float]]] = {"step": [], "record": [], "epoch": []}
        for _ in range(options.rounds):
            watched.train_step(next(feeds["with"]))
            kinds["step"].append(clock.drain())
        ordinary = {name: statistics.median(cost[name] for cost in kinds["step"]) for name in WATCHING}
        for _ in range(options.rounds):  # around a record: the step before it, its own, and the record
            watched.step += -(watched.step + 2) % LOG_EVERY
            for _ in range(2):
                watched.train_step(next(feeds["with"]))
            assert watched.will_record(watched.step)
            watched._log()
            found = clock.drain()
            kinds["record"].append({name: found[name] - 2 * ordinary[name] for name in WATCHING})
        for _ in range(options.rounds):
            watched._measure("epoch_ended")
            kinds["epoch"].append(clock.drain())
        rings = len(watched.parts.observers["health"].panel.embeddings.rows)  # type: ignore[attr-defined]

    step = statistics.median(whole["without"])
    per_epoch = watched.info.steps_per_epoch
    shares = {"step": 1.0, "record": LOG_EVERY, "epoch": per_epoch}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}, {options.rounds} rounds, "
          f"{options.clock} clock")  # fmt: skip
    print(f"a step without observers: {step:.1f} ms (min {min(whole['without']):.1f}, max {max(whole['without']):.1f})")
    print(
        f"a step with them, turn by turn: {statistics.median(whole['with']):.1f} ms (min {min(whole['with']):.1f}, "
        f"max {max(whole['with']):.1f})"
    )
    print(
        f"{'':10}{'each step':>14}{'each record':>16}{'each epoch':>16}{'of the training':>18}   (ring: {rings} rows)"
    )
    total, table = 0.0, {}
    for name in WATCHING:
        cost = {kind: statistics.median(c[name] for c in costs) for kind, costs in kinds.items()}
        share = sum(cost[kind] / shares[kind] for kind in kinds) / step
        total, table[name] = total + share, {**cost, "share": share}
        print(f"{name:10}{cost['step']:11.2f} ms{cost['record']:13.1f} ms{cost['epoch']:13.0f} ms{100 * share:17.2f}%")
    print(f"together {100 * total:.2f}% of the time of a step, with a record every {LOG_EVERY} steps and an epoch of "
          f"{per_epoch}")  # fmt: skip
    if options.json:
        found = {"where": where, "torch": torch.__version__, "step_ms": whole, "cost_ms": table, "share": total}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
