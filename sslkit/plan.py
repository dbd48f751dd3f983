"""`sslkit train --dry-run`: what would be trained, with a few measured steps; nothing is written."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.table import Table
from torch import nn

from sslkit import forking
from sslkit.build import Parts, choose_device
from sslkit.compiling import resolve_compile
from sslkit.nn import ScheduledNumber
from sslkit.preparation import prepare, tell_findings, view_pixels
from sslkit.progress import PatientConsole, say
from sslkit.recipe import read_recipe
from sslkit.run_directory import RunDirectory
from sslkit.trainer import Trainer

MEASURED_STEPS = 3


@dataclass(frozen=True)
class Cost:
    """What a step costs here, measured without compiling."""

    seconds_per_step: float
    peak_bytes: int


def show_plan(source: str, overrides: Sequence[str], *, device: str, fork: str | None = None) -> None:
    """Print the resolved recipe, sizes, schedules and a measured estimate.

    Raises:
        UserError: whatever would stop `train`, too.
    """
    console = PatientConsole(highlight=False)
    recipe = read_recipe(source, overrides)
    if fork is not None:
        recipe, _ = forking.begin(recipe, forking.Asked(source, overrides, None, fork), resume="auto")
    tell = partial(say, console)
    parts, known = prepare(recipe, source, overrides, choose_device(device), tell, fork=fork is not None)
    tell_findings(known, source, overrides, console)
    run = parts.run
    parts.recipe = resolve_compile(parts.recipe, view_pixels(parts), run.device)
    console.print(parts.recipe.to_toml(), markup=False, soft_wrap=True)

    left_out = run.train_images - run.steps_per_epoch * run.batch_size
    console.print(
        f"{run.train_images} images of {run.image_size} px: {run.total_steps} steps, {run.steps_per_epoch} per epoch "
        f"of {run.batch_size} images; an epoch leaves out {left_out}",
        soft_wrap=True,
    )
    console.print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in parameter_counts(parts).items()))
    console.print(_schedules(parts))
    cost = measure(parts)
    total = _duration(cost.seconds_per_step * run.total_steps)
    console.print(
        f"estimate from {MEASURED_STEPS} uncompiled steps here: {cost.seconds_per_step:.3f} s per step, "
        f"{run.batch_size / cost.seconds_per_step:.0f} images/s, {total} in all without "
        f"measurements; peak memory {cost.peak_bytes / 2**30:.2f} GiB ({_where(run.device)})",
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 180 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def parameter_counts(parts: Parts) -> dict[str, int]:
    """Parameters of each part; the target's are not trained."""
    modules: dict[str, nn.Module | None] = {
        "backbone": parts.model.online.backbone,
        "projector": parts.model.online.projector,
        "predictor": parts.model.predictor,
        "loss": parts.loss,
        "target": parts.model.target,
    }
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items() if m is not None}
    return {name: count for name, count in counts.items() if count}


def measure(parts: Parts) -> Cost:
    """Train a few steps on these parts, which are thrown away afterwards, and time them after the first."""
    recipe = parts.recipe.model_copy(update={"train": parts.recipe.train.model_copy(update={"compile": False})})
    parts.recipe, parts.observers = recipe, {}
    with TemporaryDirectory() as scratch:
        files = RunDirectory(Path(scratch))
        trainer = Trainer(parts, files)
        draws = trainer.feed.steps(0, min(MEASURED_STEPS + 1, parts.run.total_steps))
        times = []
        for draw in draws:
            before = time.perf_counter()
            trainer.train_step(draw)
            trainer.check_finite()  # waits for the device
            times.append(time.perf_counter() - before)
        files.close()
    return Cost(min(times[1:] or times), _peak_memory(parts.device))


def _schedules(parts: Parts) -> Table:
    table = Table(box=None, pad_edge=False)
    total = parts.run.total_steps
    points = [round(total * quarter / 4) for quarter in range(5)]
    table.add_column("at step")
    for point in points:
        table.add_column(str(point), justify="right")
    if parts.target.tau(0) is not None:
        table.add_row("tau", *(f"{parts.target.tau(point):.6g}" for point in points))
    shown: set[tuple[str, ...]] = set()
    for group, values in zip(parts.groups, parts.values, strict=True):
        row = tuple(f"{values.lr(point):.4g}" for point in points)
        if row not in shown:
            shown.add(row)
            table.add_row("lr" if len(shown) == 1 else f"lr of the {group.part}", *row)
    for number in parts.loss.modules():
        if isinstance(number, ScheduledNumber) and number.constant is None:
            table.add_row(number.option, *(f"{number.curve(point):.4g}" for point in points))
    decay = [f"{parts.values[0].weight_decay(point):.4g}" for point in points]
    table.add_row("weight decay", *decay)
    return table


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def _where(device: str) -> str:
    return "of the device" if device == "cuda" else "of this process, data included"
