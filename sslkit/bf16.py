"""Where a CPU computes wrong in bfloat16."""

from __future__ import annotations

import torch
from torch import nn

from sslkit import features
from sslkit.api import RunInfo
from sslkit.errors import UserError


def refuse_broken_bf16(backbone: nn.Module, run: RunInfo) -> None:
    """Refuse convolutions whose weight gradient torch leaves partly unwritten on a CPU in bfloat16.

    Those are wider than one pixel, with a stride, on a map of a single pixel (torch 2.15 with oneDNN). What lies in
    that memory is at times NaN, at times a number, so the training would go wrong in silence.

    Raises:
        UserError: such a convolution meets such a map, for some size of the views.
    """
    found: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: _note_single_pixel(m, args, name, found))
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and max(module.kernel_size) > 1
    ]
    for size in sorted({view.size for view in run.views}):
        with features.in_eval_mode(backbone):
            backbone(torch.zeros(1, run.channels, size, size))
        if found:
            raise UserError(
                f"train.precision = 'bf16': on a CPU torch computes wrong gradients for the backbone's {found[0]}, "
                f"which views of {size} px reach as a single pixel; use 'fp32', larger views or a small-image stem"
            )
    for hook in hooks:
        hook.remove()


def _note_single_pixel(module: nn.Module, args: tuple[torch.Tensor, ...], name: str, found: list[str]) -> None:
    if args[0].shape[-2:] == (1, 1):
        found.append(name)
