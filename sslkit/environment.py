"""What a run depended on, as `env.json` holds it (versions, machine, plugins, data, the commit), and its cores."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment(
    command: Sequence[str], provenance: list[dict[str, str]], device: str, processes: int, fingerprint: str
) -> dict[str, Any]:
    """What `env.json` holds: versions, machine, plugins, data, the commit of the working directory."""
    packages = ("sslkit", "torch", "torchvision", "timm", "numpy", "pydantic", "safetensors")
    return {
        "command": list(command),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "device": device,
        "processes": processes,
        "packages": {name: found for name in packages if (found := _version(name))},
        "plugins": provenance,
        "data_fingerprint": fingerprint,
        "git": _git(),
    }


def cores() -> int:
    """CPU cores for this process: those that it may use, shared with the others of the run on this machine."""
    return max(1, cores_here() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cores_here() -> int:
    """CPU cores that this process may use, with whatever others there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


# The working directory may be a stranger's, and git runs what the configuration in it names.
_HARMLESS = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


def _git() -> dict[str, Any] | None:
    def ask(*arguments: str) -> str:
        command = ["git", *_HARMLESS, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5, stdin=subprocess.DEVNULL
        ).stdout.strip()

    try:
        commit, known = ask("rev-parse", "HEAD"), ask("config", "--local", "--includes", "--name-only", "--list")
        if any(key.startswith("filter.") for key in known.splitlines()):  # programs that looking for changes would run
            return {"commit": commit, "changed": None}
        changed = bool(ask("status", "--porcelain", "-uno", "--ignore-submodules=dirty"))
        return {"commit": commit, "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None
