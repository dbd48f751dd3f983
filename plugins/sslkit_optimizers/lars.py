"""LARS (You et al. 2017): layer-wise adaptive rate scaling, in front of torch's fused SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from sslkit_optimizers.sgd import momentum_buffer


class LARSOptimizer(torch.optim.Optimizer):
    """LARS over parameter groups; a group with `excluded = True` takes plain SGD.

    The host never waits for the device. `found_inf` (0-dim float tensor) is read as torch's fused optimizers read it:
    where it is 1, parameters and momentum keep every bit, whatever the gradients are. A group's `lr` and `weight_decay`
    are floats.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        clip_lr: bool = False,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "eta": eta,
            "clip_lr": clip_lr,
            "eps": eps,
            "excluded": False,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step over every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, grad_scale))
        weight_decay = group["weight_decay"]
        if not group["excluded"]:
            ratios = trust_ratios(parameters, gradients, group)
            gradients = list(torch._foreach_add(gradients, parameters, alpha=weight_decay))
            torch._foreach_mul_(gradients, ratios)
            weight_decay = 0.0  # it is in the scaled gradient
        momentum = group["momentum"]
        sgd(
            parameters,
            gradients,
            [momentum_buffer(self, p) if momentum else None for p in parameters],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            weight_decay=weight_decay,
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def trust_ratios(parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """What each tensor's decayed gradient is multiplied by, as 0-dim tensors on the device.

    1 where the weights are zero, so that they can leave zero; 0 where the gradient is zero, so that weight decay
    without a gradient moves nothing.
    """
    weight = torch.stack(list(torch._foreach_norm(parameters)))
    gradient = torch.stack(list(torch._foreach_norm(gradients)))
    ratio = group["eta"] * weight / (gradient + group["weight_decay"] * weight + group["eps"])
    if group["clip_lr"]:
        ratio = (ratio / group["lr"]).clamp(max=1)
    ratio = ratio.where(weight != 0, 1).where(gradient != 0, 0)
    return list(ratio.unbind())
