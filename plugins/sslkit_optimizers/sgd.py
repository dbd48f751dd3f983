"""torch's fused SGD, with momentum that exists before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sslkit.api import ParamGroup

if TYPE_CHECKING:
    from sslkit_optimizers import SGD


def fused_sgd(groups: list[ParamGroup], options: SGD) -> torch.optim.SGD:
    """torch.optim.SGD over the groups; `lr` and `weight_decay` are set before each step."""
    optimizer = torch.optim.SGD(
        [group.as_torch() for group in groups],
        lr=0.0,
        momentum=options.momentum,
        nesterov=options.nesterov,
        fused=True,
    )
    if options.momentum:
        optimizer.register_step_pre_hook(_make_momentum)
    return optimizer


def momentum_buffer(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """A parameter's momentum, zero before its first gradient.

    Left to itself the fused kernel allocates it without filling it, and leaves it so where `found_inf` skips the first
    step: the second step would then add whatever lay in that memory.
    """
    state = optimizer.state[parameter]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def _make_momentum(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                momentum_buffer(optimizer, parameter)
