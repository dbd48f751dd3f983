"""The live objects of `right.py`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.api import Branches, LossTerms, Needs, RunInfo, ViewSpec
from sslkit.errors import UserError
from sslkit.events import observes


class Moments(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.feature_dim = width
        self.linear = nn.Linear(2 * channels, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)))


class Linear(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.linear, self.norm = nn.Linear(in_dim, out_dim), nn.BatchNorm1d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Distance(nn.Module):
    additive = True
    prevents_collapse = False
    centre: Tensor

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(dim))

    def needs(self, specs: Any) -> Needs:
        if len(specs) < 2:
            raise UserError(f"this loss compares 2 views, and there are {len(specs)}")
        return Needs(projections=(0, 1))

    def forward(self, branches: Branches) -> LossTerms:
        a, b = branches.projections[:2]
        assert a is not None
        assert b is not None
        apart = (a - b).square().mean()
        off = (a - self.centre).square().mean()
        return LossTerms(apart + off, {"apart": apart.detach()})

    def commit(self, branches: Branches) -> None:
        assert branches.projections[0] is not None
        self.centre.lerp_(branches.projections[0].mean(0), 1 - self.momentum)


class Average(nn.Module):
    source, evaluated = "copy", "online"

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def make(self, online: nn.Module) -> Any:
        return copy.deepcopy(online).requires_grad_(False)

    def tau(self, step: int) -> Any:
        return self.keep

    @torch.no_grad()
    def update(self, online: nn.Module, target: nn.Module, tau: Any) -> None:
        for p, q in zip(target.parameters(), online.parameters(), strict=True):
            p.add_((q - p) * (1 - tau))


class Mirrored:
    def __init__(self, run: RunInfo, strength: float) -> None:
        self.specs: Any = (ViewSpec(run.image_size),) * 2
        self.mean, self.std, self.strength = run.mean, run.std, strength

    def draw(self, n: int, generator: torch.Generator) -> Any:
        drawn = torch.rand(2, n, 2, generator=generator)
        return {"flip": drawn[0] < 0.5, "light": 1 + self.strength * (2 * drawn[1] - 1)}

    def crop(self, images: Tensor, parameters: Any) -> Any:
        x = images.float() / 255
        flips = parameters["flip"].unbind(1)
        return [torch.where(flip[:, None, None, None], x.flip(3), x) for flip in flips]

    def appear(self, crops: Any, parameters: Any) -> Any:
        lights = parameters["light"].unbind(1)
        return [self.normal(c * light[:, None, None, None]) for c, light in zip(crops, lights, strict=True)]

    def normal(self, x: Tensor) -> Tensor:
        channels = zip(x.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(c - mean) / std for c, mean, std in channels], 1)

    def clean(self, images: Tensor) -> Any:
        return self.normal(images.float() / 255)


class Opened:
    class_names = ("a", "b")
    fingerprint: Any = "noise"
    bad: Any = ()

    def __init__(self, number: int) -> None:
        noise = torch.randint(0, 256, (number, 3, 8, 8), generator=torch.Generator().manual_seed(0))
        self.test = None
        self.train: Any = Noise(noise.to(torch.uint8))


class Noise:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Any = tensor
        self.labels: Any = torch.arange(len(tensor)) % 2

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, indices: Tensor) -> Any:
        return self.tensor[indices]


class Descent(torch.optim.Optimizer):
    _step_supports_amp_scaling = True

    def __init__(self, groups: Any, momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        keep = 1 - getattr(self, "found_inf", torch.zeros(()))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    slope = p.grad + group["weight_decay"] * p
                    state = self.state[p]
                    old = state.get("velocity", torch.zeros_like(p))
                    state["velocity"] = torch.lerp(old, self.momentum * old + slope, keep)
                    p.sub_(keep * group["lr"] * state["velocity"])


class Counter:
    def __init__(self) -> None:
        self.seen = 0

    @observes
    def step_ended(self, branches: Any) -> None:
        self.seen += 1

    def state_dict(self) -> Any:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]
