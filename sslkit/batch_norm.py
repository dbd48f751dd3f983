"""BatchNorm over parts of a batch, as if each lay on a device of its own: `train.batch_norm = "split:N"`."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.errors import UserError


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises its input: torch's layers, and any that says it uses `batch_statistics`."""
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return isinstance(module, known) or getattr(module, "batch_statistics", False)


def split_batch_norm(network: nn.Module, groups: int, where: str) -> None:
    """Make every BatchNorm of a network, in place, normalise `groups` equal parts of a batch apart.

    Raises:
        UserError: a layer with statistics of the batch that cannot be split, named after `where`: a subclass of
            BatchNorm, one without moving averages, or a module of another kind that says `batch_statistics = True`.
    """
    for name, module in network.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if type(module) in _SPLIT and norm and module.track_running_stats and module.momentum:
            module.__class__ = _SPLIT[type(module)]
            cast(_Split, module).groups = groups
        elif norm or getattr(module, "batch_statistics", False):
            raise UserError(
                f"train.batch_norm = 'split:{groups}': {where} has a {type(module).__name__} ({name}), which cannot be "
                "split; use train.batch_norm = 'local' or another model"
            )


def synchronise_batch_norm(network: nn.Module, where: str) -> None:
    """Make every BatchNorm of a network, in place, take its statistics from the images of all processes.

    Raises:
        UserError: a layer with statistics of the batch that cannot be, named after `where`: a subclass of BatchNorm,
            which torch's conversion would lose, or a module of another kind that says `batch_statistics = True`.
    """
    for name, module in network.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        if (norm and not plain) or getattr(module, "batch_statistics", False):
            raise UserError(
                f"train.batch_norm = 'sync': {where} has a {type(module).__name__} ({name}), which cannot be "
                "synchronised over processes; use train.batch_norm = 'local' or another model"
            )
    nn.SyncBatchNorm.convert_sync_batchnorm(network)


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The moving averages of every layer that takes statistics of its own process's share.

    Being averages, their mean over W processes is what one process has with `split:W`. Those of layers in evaluation
    mode, as frozen ones are, stay as they are: the sum of W equal numbers, divided by W, need not be that number.
    """
    return [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) or getattr(module, "batch_statistics", False)
        if module.training and not isinstance(module, nn.SyncBatchNorm)
        for buffer in module.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


class _Split(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with statistics of parts of a batch, as if each lay on a device of its own.

    The running statistics take the mean over the parts, once per batch. State is that of the plain module.
    """

    groups: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(input) % self.groups:
            raise UserError(f"BatchNorm: {len(input)} images cannot be split into {self.groups} equal groups")
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        means, variances = mean.repeat(self.groups, 1), variance.repeat(self.groups, 1)
        momentum = cast(float, self.momentum)
        parts = [
            F.batch_norm(part, m, v, self.weight, self.bias, True, momentum, self.eps)
            for part, m, v in zip(input.chunk(self.groups), means, variances, strict=True)
        ]
        mean.copy_(means.mean(0))
        variance.copy_(variances.mean(0))
        cast(Tensor, self.num_batches_tracked).add_(1)
        return torch.cat(parts)


class _Split1d(_Split, nn.BatchNorm1d):
    pass


class _Split2d(_Split, nn.BatchNorm2d):
    pass


_SPLIT: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm1d: _Split1d, nn.BatchNorm2d: _Split2d}
