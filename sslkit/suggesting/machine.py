"""What this machine has, and how fast it trains a recipe."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sslkit.environment import cores_here
from sslkit.plan import measure
from sslkit.preparation import prepare
from sslkit.recipe import read_recipe
from sslkit.suggesting.choices import Machine

FULL = 0.8
"""Share of a GPU's memory that a step may take."""
UNKNOWN_MEMORY = 8 * 10**9
"""Assumed where the system does not say."""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use."""


def machine_of(device: torch.device) -> Machine:
    """The machine, as far as choices depend on it."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return Machine(device.type, cores_here(), _memory(), fast)


def _memory() -> int:
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Windows
        return UNKNOWN_MEMORY
    for path in LIMITS:
        try:
            found.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return min(found)


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16; without it the networks are slower than in float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def speed(recipe: str, batch: int, machine: Machine) -> tuple[float, bool]:
    """Seconds of a step of this batch, uncompiled, and whether it leaves the device's memory some room."""
    device = torch.device(machine.device)
    overrides = [f"train.batch_size={batch}", "train.accept=[]"]
    parts, _ = prepare(read_recipe(recipe, overrides), None, (), device, lambda _: None)
    cost = measure(parts)
    if device.type == "cpu":
        return cost.seconds_per_step, True
    return cost.seconds_per_step, cost.peak_bytes <= FULL * torch.cuda.get_device_properties(device).total_memory
