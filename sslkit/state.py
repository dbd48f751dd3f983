"""Everything that affects the next loss, out of the parts of a run and back into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkit import checkpoint
from sslkit.build import Parts
from sslkit.errors import RunFailed
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


def digest(parts: Parts) -> float:
    """A number that differs where weights, targets or the loss's state do: processes compare theirs."""
    state = [*parts.model.state_dict().values(), *parts.loss.state_dict().values()]
    return float(torch.stack([t.detach().double().square().sum() for t in state]).nan_to_num().sum())


def _in_layout(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state in the memory layout of its parameters, which files do not keep: sums then round alike."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = checkpoint.like(parameters[number], value)
    return state
