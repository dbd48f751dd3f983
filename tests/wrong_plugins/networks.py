"""Faults of backbones and heads."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from wrong_plugins import Case
from wrong_plugins.right import RightBackbone, RightHead
from wrong_plugins.right_parts import Linear, Moments


class Refusing(RightBackbone):
    def build(self, run):
        raise ValueError("images of 32 px are too small")


class NoModule(RightHead):
    def build(self, in_dim, run):
        return lambda x: x


class NoWidth(RightBackbone):
    def build(self, run):
        return nn.Flatten()


class TextWidth(RightHead):
    def build(self, in_dim, run):
        module = Linear(in_dim, 5)
        module.out_dim = "5"
        return module


class Unseeded(RightHead):
    def build(self, in_dim, run):
        module = Linear(in_dim, 5)
        nn.init.normal_(module.linear.weight, generator=torch.Generator().manual_seed(time.perf_counter_ns() % 2**31))
        return module


class Map(RightBackbone):
    """Returns a map, not a vector."""

    def build(self, run):
        module = nn.Conv2d(run.channels, 4, 3)
        module.feature_dim = 4
        return module


class FixedWidth(RightHead):
    """Ignores in_dim."""

    def build(self, in_dim, run):
        return Linear(12, 5)


class InPlace(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.mul_(2))

        return Module(in_dim, 5)


class LogOfNegative(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.log())

        return Module(in_dim, 5)


class Unused(RightBackbone):
    def build(self, run):
        module = Moments(run.channels, self.width)
        module.spare = nn.Linear(2, 2)
        return module


class Cut(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.detach())

        return Module(in_dim, 5)


class BatchInEval(RightBackbone):
    def build(self, run):
        class Module(Moments):
            def forward(self, x: Tensor) -> Tensor:
                out = super().forward(x)
                return out - out.mean(0)

        return Module(run.channels, self.width)


class NoiseInEval(RightBackbone):
    def build(self, run):
        class Module(Moments):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.dropout(super().forward(x), 0.5, training=True)

        return Module(run.channels, self.width)


class MovesInEval(RightBackbone):
    def build(self, run):
        class Module(Moments):
            def forward(self, x: Tensor) -> Tensor:
                self.norm.num_batches_tracked.add_(1)
                return super().forward(x)

        return Module(run.channels, self.width)


class NoAutocast(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                rows = torch.arange(len(x), device=x.device)
                out = torch.zeros(len(x), self.out_dim, device=x.device)
                return self.norm(out.index_add(0, rows, self.linear(x)))

        return Module(in_dim, 5)


class Reads(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x / max(1.0, x.abs().max().item()))

        return Module(in_dim, 5)


class OnTheHost(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x + torch.ones(x.shape[1]))

        return Module(in_dim, 5)


class AlwaysDrops(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(nn.functional.dropout(x, 0.5))

        return Module(in_dim, 5)


class Suspicious(RightHead):
    def build(self, in_dim, run):
        class Module(Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * (2 if torch.compiler.is_compiling() else 1)

        return Module(in_dim, 5)


CASES = [
    Case(Refusing(), "builds", r"build\(\) raised ValueError: images of 32 px.*networks.py.*--set.*--image-size"),
    Case(NoModule(), "builds", "returns function, not a torch.nn.Module; return the live object"),
    Case(NoWidth(), "builds", "Flatten has no 'feature_dim', which a backbone needs"),
    Case(TextWidth(), "builds", "out_dim is '5'; make it a positive int"),
    Case(Unseeded(), "build_seeded", "differ in 'linear.weight'; draw initial values from torch's default generator"),
    Case(Map(), "output_shape", r"\[16, 4, 30, 30\]; it should be \[16, 4\].*Flatten or pool"),
    Case(FixedWidth(), "output_shape", r"\[16, 5\] -> RuntimeError: .*take in_dim as build\(\) is given it"),
    Case(InPlace(), "output_shape", "forward changes the tensor it is given; do not begin with an in-place"),
    Case(LogOfNegative(), "output_shape", "holds NaN or infinity; guard divisions, logarithms"),
    Case(Unused(), "gradients", "no gradient reaches the parameter 'spare.weight'; use it in forward, or set"),
    Case(Cut(), "gradients", r"no gradient reaches the head's input.*remove detach\(\)"),
    Case(BatchInEval(), "evaluation", "depends on the other images of the batch; use running statistics"),
    Case(NoiseInEval(), "evaluation", "let dropout and all that is random ask self.training"),
    Case(AlwaysDrops(), "evaluation", "another output the second time; let dropout and all that is random ask"),
    Case(MovesInEval(), "evaluation", "changes 'norm.num_batches_tracked'; move buffers only if self.training"),
    Case(NoAutocast(), "autocast", "raised RuntimeError: .*networks.py"),
    Case(Reads(), "never_waits", r"networks.py:\d+, in forward.*Leave out .item\(\).*use torch.where"),
    Case(OnTheHost(), "any_device", "two devices would meet.*give device=x.device"),
    Case(Suspicious(), "compiles", "compiled, it gives other numbers; do not let"),
]
