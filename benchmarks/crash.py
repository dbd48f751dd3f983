"""Kill training runs at random moments, over and over, and compare what comes out with a run that nothing disturbed.

    python benchmarks/crash.py [--runs 50] [--kills 250] [--seed 0] [--jobs 1] [--write]

A tiny network under BYOL with the health figures, kNN and a probe beside it, on the CPU, with a checkpoint every other
step. Each attempt is the command `sslkit train`, in a process of its own that is forked from one that has imported what
takes long to import. It is killed with SIGKILL after a random time, or, one time in five, as soon as a checkpoint is
being written or removed; the next attempt goes on, until the run's kills are used up and it may end.

Compared with the undisturbed run: every tensor and value of the last checkpoint, all of `metrics.jsonl` (timings
aside), and the indices of the images of each step, which a local observer notes. All to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import sslkit
from sslkit import checkpoint
from sslkit.cli import main as command
from sslkit.environment import environment
from sslkit.run_directory import read_metrics

STEPS = 30
RECIPE = f"""
name = "crash"

[data_source]
use = "digits"
prints = 1
test_prints = 1

[view_generator]
use = "affine"

[backbone]
use = "convnet"
widths = [8, 8]
strides = [2, 2]
pool = 1

[projector]
use = "mlp"
hidden_dim = 16
out_dim = 8

[predictor]
use = "mlp"
hidden_dim = 16
out_dim = 8

[loss]
use = "cosine"

[target_updater]
use = "ema"
tau = {{ use = "cosine", start = 0.9, end = 1.0 }}

[optimizer]
use = "adamw"
lr = {{ use = "warmup_cosine", peak = 0.01, warmup_steps = 5 }}

[train]
epochs = {STEPS // 10}
batch_size = 128
log_every = 1
checkpoint_every = 2
keep_checkpoints = 2
compile = false
accept = ["batch_norm_small", "target_not_following"]

[[observers]]
use = "knn"
bank = 200
queries = 100
k = 20

[[observers]]
use = "report"
enabled = false

[[observers]]
use = "tensorboard"
enabled = false

[[observers]]
use = "./order.py:Order"
"""
ORDER = '''
"""Notes the indices of the images of each step."""
import json

from sslkit.api import Observer
from sslkit.events import observes


class Notes:
    @observes
    def step_ended(self, run, branches):
        with open(run.directory / "order.jsonl", "a") as file:
            file.write(json.dumps([run.step, branches.indices.tolist()]) + "\\n")


class Order(Observer):
    """Notes the order of the images."""

    def build(self, run):
        return Notes()
'''
ARGUMENTS = ["train", "crash.toml", "--allow-local-code", "--device", "cpu", "--run-dir"]
TIMINGS = ("images_per_second", "data_wait")


def started(run: Path, note_imports: bool = False) -> int:
    """A process that trains, or goes on training; it may list what it imported, in a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        quiet = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        command([*ARGUMENTS, str(run)])
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        if note_imports:
            run.with_suffix(".modules").write_text(json.dumps(list(sys.modules)))
        os._exit(code)


def hidden(run: Path, prefix: str) -> bool:
    folder = run / "checkpoints"
    with contextlib.suppress(OSError):
        return any(p.name.startswith(prefix) for p in folder.iterdir())
    return False


def killed(run: Path, chance: random.Random, longest: float) -> str | None:
    """Where a process was when it was killed; None if it had ended by itself.

    Args:
        run: the run's directory.
        chance: when to kill.
        longest: seconds that a run takes.
    """
    process = started(run)
    aim = chance.choices(("", ".tmp-step-", ".old-step-"), (80, 15, 5))[0]
    begun = time.monotonic()
    wait = begun + chance.uniform(0, longest)
    code = None
    while code is None:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
        elif (hidden(run, aim) and chance.random() < 0.3) if aim else time.monotonic() > wait:
            os.kill(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        elif not aim:
            time.sleep(0.001)
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        raise SystemExit(f"{run}: ended with {code}\n{run.with_suffix('.log').read_text()[-2000:]}")
    if hidden(run, ".tmp-step-"):
        return "writing a checkpoint"
    if hidden(run, ".old-step-"):
        return "removing a checkpoint"
    if not checkpoint.listed(run / "checkpoints"):
        return "before the first checkpoint"
    return "elsewhere"


def plain(state: Any) -> Any:
    """A state in a form that is equal only if every bit is."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), state.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(state, dict):
        return [(key, plain(value)) for key, value in state.items()]
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return repr(state)


def outcome(run: Path) -> dict[str, Any]:
    """What a run came to: the last checkpoint, the records, the order of the data."""
    found, problems = checkpoint.newest(run / "checkpoints")
    assert found is not None
    assert not problems
    assert found.step == STEPS
    order: dict[int, list[int]] = {}
    repeated = True
    for line in (run / "order.jsonl").read_text().splitlines():
        step, indices = json.loads(line)
        repeated &= order.setdefault(step, indices) == indices  # a step that is done again sees the same images
    facts = {k: v for k, v in found.facts.items() if k != "metrics_offset"}
    return {
        "tensors": plain(found.parts),
        "facts": plain(facts),
        "metrics": [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_metrics(run)],
        "order": repeated and sorted(order.items()),
        "checkpoints": [p.name for p in checkpoint.listed(run / "checkpoints")],
        "status": json.loads((run / "status.json").read_text())["status"],
    }


def disturb(number: int, due: int, seed: int, longest: float, expected: dict[str, Any]) -> None:
    """Kill a run as often as is due, let it end, and note how that went in `runNUMBER.json`."""
    chance = random.Random(f"{seed}/{number}")
    run = Path(f"run{number}")
    places: list[str] = []
    tries, wrong = 1, set()
    while len(places) < due:
        tries += 1
        if place := killed(run, chance, longest):
            places.append(place)
        else:  # it ended before it was killed: compared like the others, and the kills that are left go to another
            wrong |= {key for key, value in outcome(run).items() if expected[key] != value}
            run = Path(f"run{number}-{tries}")
    if os.waitpid(started(run), 0)[1]:
        raise SystemExit(f"{run}: did not end\n{run.with_suffix('.log').read_text()[-2000:]}")
    wrong |= {key for key, value in outcome(run).items() if expected[key] != value}
    Path(f"run{number}.json").write_text(json.dumps({"places": places, "tries": tries, "wrong": sorted(wrong)}))
    print(f"run {number}: {due} kills, {sorted(wrong) or 'the same'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=250, help="in all runs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/crash.json")
    options = parser.parse_args()
    where = environment(sys.argv, [], "cpu", 1, "")  # the commit of the code, before the folder changes
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        Path("crash.toml").write_text(RECIPE)
        Path("order.py").write_text(ORDER)
        begun = time.monotonic()
        whole = Path("whole")
        if os.waitpid(started(whole, note_imports=True), 0)[1]:
            raise SystemExit(whole.with_suffix(".log").read_text()[-2000:])
        for module in json.loads(whole.with_suffix(".modules").read_text()):
            if module.startswith(("sslkit", "sklearn", "scipy", "PIL")):  # so that no attempt has to import it
                with contextlib.suppress(Exception):
                    importlib.import_module(module)
        expected = outcome(whole)
        begun = time.monotonic()
        if os.waitpid(started(Path("again")), 0)[1] or outcome(Path("again")) != expected:
            raise SystemExit("two undisturbed runs differ")
        longest = time.monotonic() - begun
        assert expected["metrics"]
        assert len(expected["order"]) == STEPS

        print(f"an undisturbed run: {longest:.1f} s", flush=True)
        workers = []
        for job in range(options.jobs):
            sys.stdout.flush()
            if worker := os.fork():
                workers.append(worker)
                continue
            try:
                for number in range(job, options.runs, options.jobs):
                    due = options.kills * (number + 1) // options.runs - options.kills * number // options.runs
                    disturb(number, due, options.seed, longest, expected)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ended = [os.waitpid(worker, 0)[1] for worker in workers]  # of all, before their folder goes
        if any(ended):
            raise SystemExit("a worker failed")
        results = [json.loads(Path(f"run{number}.json").read_text()) for number in range(options.runs)]
        seconds = time.monotonic() - begun

    places = Counter(place for result in results for place in result["places"])
    differing = {f"run {number}": result["wrong"] for number, result in enumerate(results) if result["wrong"]}
    figures = {
        "runs": options.runs,
        "bit_exact": options.runs - len(differing),
        "differing": differing,
        "kills": places.total(),
        "kills_while": dict(places.most_common()),
        "attempts": sum(result["tries"] for result in results),
        "seconds": round(seconds),
    }
    print(json.dumps(figures, indent=1))
    if options.write:
        told = {
            "command": f"python benchmarks/crash.py --runs {options.runs} --kills {options.kills} "
            f"--seed {options.seed} --jobs {options.jobs} --write",
            "commit": where["git"] and where["git"]["commit"],
            "changed": where["git"] and where["git"]["changed"],
            "hardware": f"{where['cpus']} cores {where['processor']}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sslkit": sslkit.__version__,
            "steps_of_a_run": STEPS,
            "figures": figures,
        }
        Path(__file__).with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
