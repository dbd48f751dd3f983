"""What a run says of itself in a terminal: what it is when it begins, what came of it when it ends."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path

import torch
from rich.console import Console

from sslkit import doctor
from sslkit.progress import say
from sslkit.rules import first_network
from sslkit.run_directory import read_json, read_metrics
from sslkit.trainer import Trainer

WAITED = 0.1
"""Share of the time from which on it is told that the loop waited for data."""


def device_name(device: torch.device) -> str:
    """What a device is called, with the threads of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def announce(trainer: Trainer, console: Console) -> None:
    """The recipe, where it trains, and on what."""
    run, recipe = trainer.info, trainer.recipe
    left_out = run.train_images - run.steps_per_epoch * run.batch_size
    where = device_name(trainer.device)
    say(
        console,
        f"{recipe.name} ({recipe.hash()}) on {where}: {run.train_images} images{_labels(trainer)}, "
        f"{recipe.train.epochs} epochs of {run.steps_per_epoch} steps"
        + (f", each shared by {run.world_size} processes" if run.world_size > 1 else "")
        + (f" (each leaves out {left_out} images, an incomplete batch)" if left_out else ""),
    )
    if recipe.train.compile:
        say(console, "compiling views and networks: the first step takes a minute or two")


def _labels(trainer: Trainer) -> str:
    classes, test = trainer.info.class_names, trainer.data.test
    return (f" of {len(classes)} classes" if classes else "") + (f", {len(test)} test images" if test else "")


def summarise(run: Path, console: Console) -> None:
    """The floor and what training made of it, beside each other."""
    records = read_metrics(run)
    measured = [r for r in records if r.get("knn_top1") is not None]
    if measured:
        first, last = measured[0], measured[-1]
        protocol = (
            f"k {last['knn_k']:.0f}, T {last['knn_temperature']:g}, bank {last['knn_bank']:.0f}, "
            f"{last['knn_queries']:.0f} queries"
        )
        network = first_network(read_json(run / "facts.json"))
        what = f"{network} (step 0)" if first["step"] == 0 else f"at step {first['step']}"
        console.print(
            f"kNN top-1 ({protocol}): {first['knn_top1']:.4f} {what} -> {last['knn_top1']:.4f} after {last['step']} "
            "steps",
            highlight=False,
            soft_wrap=True,
        )
    probed = [r for r in records if r.get("probe_top1") is not None]
    if probed:
        untrained = " untrained, chance (step 0)" if probed[0]["step"] == 0 else ""
        say(
            console,
            f"linear probe top-1, trained beside the run: {probed[0]['probe_top1']:.4f}{untrained} -> "
            f"{probed[-1]['probe_top1']:.4f}",
        )
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    if losses:
        say(console, f"loss: {losses[0]:.4f} -> {losses[-1]:.4f} (it cannot rank runs; kNN can)")
    waits = [r["data_wait"] for r in records if r.get("data_wait") is not None]
    if waits and statistics.mean(waits) > WAITED:
        say(console, f"{statistics.mean(waits):.0%} of the time was spent waiting for images")
    found = doctor.examine_run(run)
    say(console, f"verdict: {found.verdict} (sslkit doctor {shlex.quote(str(run))})")
    for finding in found.findings:
        if finding.severity != "info":
            say(console, f"  {finding.severity}: {finding.what.rstrip('.')} [{finding.id}]")
    say(console, f"run directory: {run}")
