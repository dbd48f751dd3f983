"""Train the run that later versions go on with: `python tests/golden/make.py` writes `tests/golden/VERSION/`.

Once for each release, and never again over one that is there. `run/` is the run's directory without what is drawn from
it; `expected.json` says what the steps after its checkpoint came to, on the machine and with the torch it names.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path

import torch

import sslkit
from sslkit import checkpoint
from sslkit.cli import main
from sslkit.run_directory import read_metrics

STOP, MORE = 12, 5
KEPT = ("recipe.lock.toml", "status.json", "metrics.jsonl", "checkpoints")
RECIPE = """
name = "golden"

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
use = "nnbyol"
queue = 128

[target_updater]
use = "ema"
tau = { use = "cosine", start = 0.9, end = 1.0 }

[optimizer]
use = "adamw"
lr = { use = "warmup_cosine", peak = 0.001, warmup_steps = 5 }

[train]
epochs = 2
batch_size = 128
log_every = 1
checkpoint_every = 12
keep_checkpoints = 1
compile = false

[[observers]]
use = "knn"
bank = 200
queries = 100
k = 20
"""


def without(*names: str) -> list[str]:
    return [word for name in names for word in ("--set", f"observers.{name}.enabled=false")]


def train(recipe: Path, run: Path, steps: int) -> None:
    """The command, in this process."""
    arguments = ["train", str(recipe), "--device", "cpu", "--run-dir", str(run), "--steps", str(steps)]
    main([*arguments, *without("health", "tensorboard", "report")], standalone_mode=False)


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run) if "loss" in r}


def make(folder: Path) -> None:
    folder.mkdir()
    recipe, whole, run = folder / "recipe.toml", folder / "whole", folder / "run"
    recipe.write_text(RECIPE, encoding="utf-8")
    train(recipe, run, STOP)
    shutil.copytree(run, whole)
    train(recipe, whole, STOP + MORE)
    expected = {str(step): loss for step, loss in losses(whole).items() if step > STOP}
    told = {"torch": torch.__version__, "processor": platform.machine(), "losses": expected}
    (folder / "expected.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(whole)
    recipe.unlink()
    for path in checkpoint.listed(run / "checkpoints")[:-1]:
        shutil.rmtree(path)
    for path in run.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    made = Path(__file__).parent / sslkit.__version__
    if made.exists():
        sys.exit(f"{made} is there already, and later versions have to read what it is")
    make(made)
