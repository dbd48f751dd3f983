"""The modules behind the target updaters; their contract is `sslkit.api.TargetModule`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """A second network that follows the online network: target = tau * target + (1 - tau) * online."""

    source: Literal["copy"] = "copy"

    def __init__(
        self, tau: Callable[[int], float], *, copy_buffers: bool, evaluated: Literal["online", "target"]
    ) -> None:
        super().__init__()
        self._tau = tau
        self.copy_buffers = copy_buffers
        self.evaluated = evaluated

    def make(self, online: nn.Module) -> nn.Module:
        """A copy of the online network in training mode, whose parameters take no gradient."""
        return copy.deepcopy(online).train().requires_grad_(False)

    def tau(self, step: int) -> float:
        """How much of the target remains at the update after step `step`."""
        return self._tau(step)

    @torch.no_grad()
    def update(self, online: nn.Module, target: nn.Module, tau: float | Tensor) -> None:
        """Move every parameter of the target, frozen ones too.

        A 0-dim tensor on the parameters' device is never read by the host. Parameters that are equal stay equal to
        the last bit, and with tau = 1 nothing changes.
        """
        _move(list(target.parameters()), list(online.parameters()), tau)
        buffers = list(target.buffers())
        if self.copy_buffers and buffers:
            torch._foreach_copy_(buffers, list(online.buffers()))


def _move(targets: list[Tensor], sources: list[Tensor], tau: float | Tensor) -> None:
    if not targets:  # foreach functions refuse empty lists
        return
    if isinstance(tau, Tensor):
        # _foreach_lerp_ takes its weight from the host, or falls back to one kernel for each parameter.
        gaps = torch._foreach_sub(sources, targets)
        torch._foreach_mul_(gaps, 1 - tau)
        torch._foreach_add_(targets, gaps)
    else:
        torch._foreach_lerp_(targets, sources, 1 - tau)


class Online(nn.Module):
    """The online projections under stop-gradient."""

    source: Literal["online"] = "online"
    evaluated: Literal["online"] = "online"

    def make(self, online: nn.Module) -> None:
        """No second network."""

    def tau(self, step: int) -> None:
        """No such number."""

    def update(self, online: nn.Module, target: nn.Module, tau: float | Tensor) -> None:
        """Nothing to move."""


class Absent(nn.Module):
    """No target branch."""

    source: Literal["none"] = "none"
    evaluated: Literal["online"] = "online"

    def make(self, online: nn.Module) -> None:
        """No second network."""

    def tau(self, step: int) -> None:
        """No such number."""

    def update(self, online: nn.Module, target: nn.Module, tau: float | Tensor) -> None:
        """Nothing to move."""
