"""Trains every method's CIFAR-10 recipe for a short while and writes the kNN accuracies to benchmarks/methods.json.

    SSLKIT_DATA=... python benchmarks/methods.py [NAME ...] [--seed 0]

What it answers: does each method learn, by how much over the random network. What it does not: which method is best.
The setting is what two CPU cores can train in minutes: one epoch, timm's own stem, and one optimizer for all. The
recipes' own rates are meant for hundreds of epochs, with a warm-up of ten. Squeezed into one epoch they teach little:
LARS at its peak after a tenth of an epoch took kNN from .2205 to .2050 for BYOL, .2245 for Barlow Twins, .2305 for
VICReg and .3170 for SimCLR (commit 4d1b598, seed 0, `train.epochs=1 optimizer.lr.warmup_epochs=0.1`).

A recipe that was measured already at this hash and seed is left out, so that the command can be repeated. The page
docs/reference/methods.md is generated from the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sslkit.recipe import read_recipe
from sslkit.run_directory import read_metrics
from sslkit.sources import shipped

HERE = Path(__file__).parent
RESULTS = HERE / "methods.json"
SETTING = "one epoch, AdamW, CPU"
MEANING = (
    "The recipe's views, heads, loss and target for one epoch, with timm's own ResNet-18 stem and, for all methods, "
    "AdamW at 1e-3 after 50 steps of warm-up, weight decay 1e-4"
)
OVERRIDES = [
    "train.epochs=1", "backbone.stem=default", "train.compile=false", "observers.knn.bank=10000",
    "observers.knn.queries=2000", "optimizer.use=adamw", "optimizer.weight_decay=1e-4",
    'optimizer.lr={ use = "warmup_cosine", peak = 0.001, warmup_steps = 50 }',
]  # fmt: skip
"""The setting, as `--set` takes it."""
SHORTER = {
    "swav_cifar10": ["loss.queue_start_epochs=0.2", "loss.freeze_prototypes_epochs=0.05"],
    "dino_cifar10": ["projector.freeze_last_layer_epochs=0.05"],
}
"""What is counted in epochs from the start of a recipe, where one epoch would be over before it."""


def measure(name: str, seed: int) -> dict[str, Any]:
    """Train one recipe and read what it recorded."""
    changes = [f"seed={seed}", *OVERRIDES, *SHORTER.get(name, [])]
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        settings = [word for change in changes for word in ("--set", change)]
        command = [sys.executable, "-m", "sslkit", "train", name, *settings, "--run-dir", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        records = read_metrics(run)
        environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    knn = [r for r in records if r.get("knn_top1") is not None]
    last = {r["step"]: r for r in records if "loss" in r}
    packages = environment["packages"]
    return {
        "recipe": name, "setting": SETTING, "meaning": MEANING, "seed": seed, "overrides": changes,
        "hash": read_recipe(name, changes).hash(), "commit": environment["git"]["commit"],
        "knn_random": knn[0]["knn_top1"], "knn": knn[-1]["knn_top1"], "knn_k": int(knn[-1]["knn_k"]),
        "knn_temperature": knn[-1]["knn_temperature"], "knn_bank": int(knn[-1]["knn_bank"]),
        "knn_queries": int(knn[-1]["knn_queries"]), "steps": knn[-1]["step"],
        "losses": [round(r["loss"], 4) for r in last.values()],
        "hardware": f"{environment['cpus']} cores {environment['processor']}",
        "versions": ", ".join(f"{p} {packages[p]}" for p in ("torch", "timm")),
    }  # fmt: skip


def main() -> None:
    """Measure what was asked for and is not measured yet, writing after each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="recipes; all that end in _cifar10 unless given")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    names = asked.names or [name for name in shipped() if name.endswith("_cifar10")]
    for name in names:
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
        wanted = read_recipe(name, [f"seed={asked.seed}", *OVERRIDES, *SHORTER.get(name, [])]).hash()
        if any((r["recipe"], r["seed"], r["hash"]) == (name, asked.seed, wanted) for r in kept):
            continue
        try:
            found = measure(name, asked.seed)
        except RuntimeError as error:  # the others are measured all the same
            print(error, flush=True)
            continue
        kept = [r for r in kept if (r["recipe"], r["setting"], r["seed"]) != (name, SETTING, asked.seed)] + [found]
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(f"{name:20} {found['knn_random']:.4f} -> {found['knn']:.4f}  losses {found['losses']}", flush=True)


if __name__ == "__main__":
    main()
