"""Everything that affects the next loss, out of the parts of a run and back into them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslkit import checkpoint
from sslkit.build import Parts
from sslkit.errors import RunFailed, UserError
from sslkit.events import Bus


def taken(parts: Parts, bus: Bus) -> dict[str, Any]:
    """The state dicts that a checkpoint holds."""
    return {
        "model": parts.model.state_dict(),
        "loss": parts.loss.state_dict(),
        "target_updater": parts.updater.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "observers": bus.state_dict(),
    }


def put_back(parts: Parts, bus: Bus, found: checkpoint.Checkpoint) -> None:
    """Give the parts the state that a checkpoint holds.

    Raises:
        RunFailed: it does not fit the recipe's parts.
    """
    try:
        parts.model.load_state_dict(found.parts["model"])
        parts.loss.load_state_dict(found.parts["loss"])
        parts.updater.load_state_dict(found.parts["target_updater"])
        parts.optimizer.load_state_dict(_in_layout(parts.optimizer, found.parts["optimizer"]))
        bus.load_state_dict(found.parts["observers"])
    except Exception as error:  # whatever a stranger's load_state_dict raises
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise RunFailed(f"{found.path}: does not fit this recipe: {why}") from error


def digests(parts: Parts) -> tuple[float, float]:
    """Numbers that differ where weights and targets do, and where the loss's state does: processes compare theirs."""
    weights, moved = parts.model.state_dict().values(), parts.loss.state_dict().values()
    return _sum_of_squares(weights), _sum_of_squares(moved)


def _sum_of_squares(tensors: Iterable[Tensor]) -> float:
    squares = [t.detach().double().square().sum() for t in tensors]
    return float(torch.stack(squares).nan_to_num().sum()) if squares else 0.0


def shortage(parts: Parts, folder: Path) -> str | None:
    """What to warn of before the first step, where the disk that `folder` is on has no room for a run's checkpoints.

    Args:
        parts: whose networks and loss a checkpoint holds at least; most optimizers keep as much as is trained besides.
        folder: a folder that is there.

    Raises:
        UserError: there is no room for a single one.
    """
    tensors = [*parts.model.state_dict().values(), *parts.loss.state_dict().values()]
    tensors += [parameter for group in parts.groups for parameter in group.parameters]
    usual = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    keep = parts.recipe.train.keep_checkpoints  # one more is written before one is removed, and the best is kept
    disk = shutil.disk_usage(folder)
    if disk.total == 0 or disk.free >= (keep + 2) * usual:  # some network file systems do not tell
        return None
    told = f"{folder}: {_megabytes(disk.free)} are free on this disk, and a checkpoint takes"
    if disk.free < usual:
        raise UserError(f"{told} about {_megabytes(usual)}; make room, or choose another folder for the run")
    return f"{told} about {_megabytes(usual)}, of which up to {keep + 2} are there at a time; make room while it trains"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _in_layout(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state in the memory layout of its parameters, which files do not keep: sums then round alike."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = checkpoint.like(parameters[number], value)
    return state
