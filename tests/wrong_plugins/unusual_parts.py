"""The live objects of `unusual.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkit.api import Branches, LossTerms, Needs
from sslkit.errors import UserError
from wrong_plugins.right_parts import Mirrored


class Triplet(nn.Module):
    additive = True  # and nothing is said of collapse

    def needs(self, specs: Any) -> Needs:
        if len(specs) != 3:
            raise UserError(f"this loss compares 3 views, and there are {len(specs)}")
        return Needs(projections=(0, 1, 2))

    def forward(self, branches: Branches) -> LossTerms:
        anchor, near, far = branches.projections
        assert anchor is not None
        assert near is not None
        assert far is not None
        margin = (anchor - near).square().sum(1) - (anchor - far).square().sum(1) + 1
        return LossTerms(margin.relu().mean())


class NearTheMean(nn.Module):
    additive = True
    prevents_collapse = False

    def needs(self, specs: Any) -> Needs:
        if sum(spec.kind == "local" for spec in specs) < 4:
            raise UserError("this loss wants 4 local views")
        return Needs(projections=tuple(range(len(specs))))

    def forward(self, branches: Branches) -> LossTerms:
        views = torch.stack([p for p in branches.projections if p is not None])
        return LossTerms((views - views.mean(0)).square().mean())


class BelowTheProjector(nn.Module):
    additive = True
    prevents_collapse = False

    def needs(self, specs: Any) -> Needs:
        if len(specs) < 2:
            raise UserError(f"this loss compares 2 views, and there are {len(specs)}")
        return Needs(projections=(0, 1))

    def forward(self, branches: Branches) -> LossTerms:
        a, b = branches.embeddings[:2]
        assert a is not None
        assert b is not None
        return LossTerms((a - b).square().mean())


class SlowWeights(torch.optim.Optimizer):
    def __init__(self, groups: Any, every: int) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.every = every

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["slow"], state["steps"] = p.detach().clone(), 0
                p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))
                state["steps"] += 1
                if state["steps"] % self.every == 0:
                    p.copy_(state["slow"].lerp_(p, 0.5))


class CutMirrored(Mirrored):
    def draw_sized(self, sizes: Tensor, generator: torch.Generator) -> Any:
        return self.draw(len(sizes), generator)

    def cut(self, original: Tensor, row: Any) -> Any:
        crops = [
            torch.nn.functional.interpolate(original[None], (spec.size,) * 2, mode="bilinear", antialias=True)[0]
            for spec in self.specs
        ]
        return [crop.flip(2) if flip else crop for crop, flip in zip(crops, row["flip"].tolist(), strict=True)]


class ManySizes:
    tensor = None

    def __init__(self, number: int = 20) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.sizes = torch.randint(9, 40, (number, 2), generator=drawn, dtype=torch.int32)
        self.noise = [torch.randint(0, 256, (3, *s), generator=drawn, dtype=torch.uint8) for s in self.sizes.tolist()]
        self.labels: Any = torch.arange(number) % 2

    def __len__(self) -> int:
        return len(self.noise)

    def original(self, index: int) -> Any:
        return self.noise[index]

    def read(self, indices: Tensor) -> Any:
        return torch.stack([self.noise[i][:, :8, :8] for i in indices.tolist()])

    def order(self, generator: torch.Generator) -> Any:
        half = len(self) // 2
        return torch.cat([torch.randperm(half, generator=generator), half + torch.randperm(half, generator=generator)])

    def sample(self, n: int) -> Any:
        return torch.arange(min(n, len(self)))
