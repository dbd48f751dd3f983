"""Modules of a backbone that keep what they begin with."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from sslkit.errors import UserError, did_you_mean


def freeze(backbone: nn.Module, target: nn.Module | None, patterns: Sequence[str]) -> None:
    """Switch gradients off and evaluation mode on, for good, in the modules of a backbone that are named.

    In evaluation mode BatchNorm's statistics stay, too, and are what it normalises with. The modules of the target's
    backbone do the same, so that both branches see an image alike. Nothing in a run switches the mode of a module but
    to put it back.

    Args:
        backbone: The online network's.
        target: The second network, if there is one; its part `backbone` is a copy of the other.
        patterns: Names of modules or parameters, `layer1` or `blocks.0.*`.

    Raises:
        UserError: a pattern names nothing, or nothing would be left to train.
    """
    if not patterns:
        return
    modules = {name: module for name, module in backbone.named_modules() if name}
    parameters = dict(backbone.named_parameters())
    for pattern in patterns:
        found = [name for name in (*modules, *parameters) if fnmatchcase(name, pattern)]
        if not found:
            first = [name for name, _ in backbone.named_children()]
            near = did_you_mean(pattern, [*modules, *parameters])
            raise UserError(f"train.freeze: the backbone has no module {pattern!r}{near}; it has {', '.join(first)}")
    for network in (backbone, getattr(target, "backbone", None)):
        if isinstance(network, nn.Module):
            _freeze(network, patterns)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError("train.freeze: names the whole backbone, so that no part of it would be trained; name less")


def _freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    for name, module in network.named_modules():
        if name and any(fnmatchcase(name, pattern) for pattern in patterns):
            module.eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
