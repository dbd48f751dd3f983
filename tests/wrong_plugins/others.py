"""Faults of target updaters and data sources."""

from __future__ import annotations

import io
import os
import time
from types import SimpleNamespace
from typing import Any

import torch

from wrong_plugins import Case
from wrong_plugins.right import RightSource, RightTarget
from wrong_plugins.right_parts import Average, Noise, Opened

# ---------------------------------------------------------------- target updaters


class _Target(RightTarget):
    def build(self, run: Any) -> Any:
        return type(self).Module(self.keep)  # type: ignore[attr-defined]


class Learning(_Target):
    class Module(Average):
        def make(self, online):
            return super().make(online).requires_grad_(True)


class Same(_Target):
    class Module(Average):
        def make(self, online):
            return online


class Shares(_Target):
    class Module(Average):
        def make(self, online):
            made = super().make(online)
            made[0].weight.data = online[0].weight.data
            return made


class Fresh(_Target):
    class Module(Average):
        def make(self, online):
            made = super().make(online)
            made[0].weight.data.add_(1)
            return made


class Elsewhere(_Target):
    class Module(Average):
        source = "mirror"


class Percent(_Target):
    class Module(Average):
        def tau(self, step):
            return 99.6


class CountsTau(_Target):
    class Module(Average):
        calls = 0

        def tau(self, step):
            self.calls += 1
            return 1 / (1 + self.calls)


class Backwards(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            for p, q in zip(target.parameters(), online.parameters(), strict=True):
                p.sub_((q - p) * (1 - tau))


class SkipsFrozen(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            for p, q in zip(target.parameters(), online.parameters(), strict=True):
                if q.requires_grad:
                    p.add_((q - p) * (1 - tau))


class MovesOnline(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            super().update(target, online, tau)


class OwnTau(_Target):
    class Module(Average):
        def update(self, online, target, tau):
            super().update(online, target, 0.75)


class KeepsOnline(_Target):
    class Module(Average):
        def make(self, online):
            self.online = online
            return super().make(online)


class ByProcess(_Target):
    class Module(Average):
        @torch.no_grad()
        def update(self, online, target, tau):
            super().update(online, target, tau)
            for p in target.parameters():
                p.mul_(1 + (os.getpid() % 1000) * 1e-5)


# ---------------------------------------------------------------- data sources


def source(change: Any) -> type[RightSource]:
    class Source(RightSource):
        """Opened, and then changed for the worse."""

        def build(self, info: Any) -> Any:
            opened = Opened(self.number)
            change(opened)
            return opened

    return Source


def floats(opened: Any) -> None:
    opened.train = SimpleNamespace(read=lambda i: torch.rand(len(i), 3, 8, 8), labels=None, tensor=None)
    opened.train = _Floats(opened)


class _Floats(Noise):
    def __init__(self, opened: Any) -> None:
        super().__init__(torch.zeros(12, 3, 8, 8))


class _Unordered(Noise):
    def read(self, indices: Any) -> Any:
        return self.tensor[indices.sort().values]


class _Other(Noise):
    def __init__(self, tensor: Any) -> None:
        super().__init__(tensor)
        self.all = tensor
        self.tensor = 255 - tensor

    def read(self, indices: Any) -> Any:
        return self.all[indices]


def unordered(opened: Any) -> None:
    opened.train = _Unordered(opened.train.tensor)


def other(opened: Any) -> None:
    opened.train = _Other(opened.train.tensor)


def float_labels(opened: Any) -> None:
    opened.train.labels = opened.train.labels.float()


def many_labels(opened: Any) -> None:
    opened.train.labels = opened.train.labels + 5


def clock(opened: Any) -> None:
    opened.fingerprint = str(time.perf_counter_ns())


def unsorted(opened: Any) -> None:
    opened.train = Noise(opened.train.tensor[torch.randperm(12)])


class _OneHandle(Noise):
    """Reads from a file that all threads share."""

    def __init__(self, tensor: Any) -> None:
        super().__init__(tensor)
        self.file = io.BytesIO(tensor.numpy().tobytes())
        self.shape, self.tensor = tensor.shape[1:], None

    def __len__(self) -> int:
        return 12

    def read(self, indices: Any) -> Any:
        size, found = self.shape.numel(), []
        for index in indices.tolist():
            self.file.seek(index * size)
            found.append(torch.frombuffer(bytearray(self.file.read(size)), dtype=torch.uint8).view(self.shape))
        return torch.stack(found)


def one_handle(opened: Any) -> None:
    opened.train = _OneHandle(opened.train.tensor)


def bare_names(opened: Any) -> None:
    opened.bad = ["broken.png"]


def number_left_out(opened: Any) -> None:
    opened.bad = 3


CASES = [
    Case(Learning(), "target_branch", r"parameter '0.weight' takes gradients; add .requires_grad_\(False\)"),
    Case(Same(), "target_branch", r"(takes gradients|changes the online network|shares)"),
    Case(Shares(), "target_branch", r"shares its parameters with the online network.*use copy.deepcopy"),
    Case(Fresh(), "target_branch", "does not start as the online network: '0.weight' differs; return a deep copy"),
    Case(Elsewhere(), "target_branch", "source is 'mirror'; set it to 'copy'"),
    Case(KeepsOnline(), "target_branch", "holds the online network's '0.weight' as its own.*Keep no reference to"),
    Case(Percent(), "tau", r"tau\(0\) is 99.6 .*; return a float from 0"),
    Case(CountsTau(), "tau", "compute it from step alone"),
    Case(Backwards(), "update", r"nearer to the online one.*becomes tau \* target \+ \(1 - tau\) \* online"),
    Case(SkipsFrozen(), "update", "'3.bias' nearer to the online one.*trained or not"),
    Case(MovesOnline(), "update", "changes the online network .*; only write to the target"),
    Case(OwnTau(), "update_masked", r"with tau = 1 changes the target's .*with the tau that is given"),
    Case(ByProcess(), "two_processes", "have different weights or state .*nothing that moves them may depend on the"),
    Case(source(floats)(), "images", r"torch.float32.*; it should be a uint8 tensor \[n, C, H, W\]"),
    Case(source(unordered)(), "images", "not the images in the order of indices; index each image"),
    Case(source(other)(), "images", r"train.tensor is .* not the images that read\(\) gives; make it uint8"),
    Case(source(float_labels)(), "labels", r"make it an int64 tensor \[12\]"),
    Case(source(many_labels)(), "labels", "holds 6, and class_names has 2 names; give one for each class"),
    Case(source(clock)(), "fingerprint", "another one when the source is opened again.*leave out times of day"),
    Case(source(unsorted)(), "fingerprint", "train holds other images, or in another order; sort what is listed"),
    Case(source(one_handle)(), "threads", r"train.read\(\) (gives other images|raised).*; open a file of each"),
    Case(source(bare_names)(), "bad_images", "give it the keys 'path' and 'problem'"),
    Case(source(number_left_out)(), "bad_images", "bad is int; make it a list"),
]
