"""Target updaters: a moving average, stop-gradient, or no target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sslkit.api import RunInfo, Scheduled, TargetUpdater, value_of

if TYPE_CHECKING:
    from torch import nn


class EMA(TargetUpdater):
    """The target is an exponential moving average of the online network (BYOL, MoCo, DINO).

    target = tau * target + (1 - tau) * online, for every parameter, once after each optimizer step (Grill et al. 2020,
    section 3.1). The target starts as a copy and stays in training mode: it normalises with the
    statistics of its own batch, as in the authors' code. BYOL raises tau to 1 over the run:
    `tau = { use = "cosine", start = 0.99, end = 1.0 }`; the paper's base value is 0.996 for 1000 epochs on ImageNet,
    the authors' presets for 40, 100 and 300 epochs have .97, .99 and .99.
    """

    tau: Scheduled = 0.99
    """How much of the target remains at each update, 0..1. 1 freezes the target, 0 makes it a copy."""
    batch_norm_buffers: Literal["own", "copy"] = "own"
    """`own`: the target gathers its own running statistics (the authors' code). `copy`: after each update its buffers
    are those of the online network. It matters only where the target is used in evaluation mode."""
    evaluate: Literal["online", "target"] = "online"
    """The branch whose features are measured and exported: BYOL evaluates the online network, DINO the target."""

    def build(self, run: RunInfo) -> nn.Module:
        from sslkit_ema.targets import MovingAverage

        return MovingAverage(
            value_of(self.tau, run), copy_buffers=self.batch_norm_buffers == "copy", evaluated=self.evaluate
        )


class StopGradient(TargetUpdater):
    """The target is the online network itself under stop-gradient (SimSiam; Chen & He 2021).

    Nothing is copied and nothing moves: the online projections serve as targets without a second forward pass, which
    would update BatchNorm twice.
    """

    def build(self, run: RunInfo) -> nn.Module:
        from sslkit_ema.targets import Online

        return Online()


class NoTarget(TargetUpdater):
    """No target branch: for losses that use the online projections alone (SimCLR, Barlow Twins, VICReg)."""

    def build(self, run: RunInfo) -> nn.Module:
        from sslkit_ema.targets import Absent

        return Absent()
