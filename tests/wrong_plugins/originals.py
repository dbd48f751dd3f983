"""Faults of what images of many sizes ask for: view generators that cut, and sources of originals and of shards."""

from __future__ import annotations

from typing import Any

import torch

from wrong_plugins import Case
from wrong_plugins.unusual import Cutting, OfManySizes
from wrong_plugins.unusual_parts import CutMirrored, ManySizes


class _Cutting(Cutting):
    def build(self, run: Any) -> Any:
        return type(self).Module(run, self.strength)  # type: ignore[attr-defined]


class HalfOfIt(_Cutting):
    class Module(CutMirrored):
        draw_sized = property()  # type: ignore[assignment]


class DrawsOtherwise(_Cutting):
    class Module(CutMirrored):
        def draw_sized(self, sizes, generator):
            torch.rand(1, generator=generator)
            return super().draw_sized(sizes, generator)


class NeverFlips(_Cutting):
    class Module(CutMirrored):
        def cut(self, original, row):
            return super().cut(original, row | {"flip": torch.zeros(2, dtype=torch.bool)})


class OwnSize(_Cutting):
    class Module(CutMirrored):
        def cut(self, original, row):
            return [crop[:, :-1] for crop in super().cut(original, row)]


class CutsAtRandom(_Cutting):
    class Module(CutMirrored):
        def cut(self, original, row):
            return [c ^ torch.randint(0, 2, c.shape, dtype=torch.uint8) for c in super().cut(original, row)]


class WritesOriginal(_Cutting):
    class Module(CutMirrored):
        def cut(self, original, row):
            made = super().cut(original.clone(), row)
            original.zero_()
            return made


def source(change: Any) -> Any:
    class Source(OfManySizes):
        """Opened, and then changed for the worse."""

        def build(self, info: Any) -> Any:
            opened = super().build(info)
            opened.train = change()
            return opened

    return Source()


class Swapped(ManySizes):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = self.sizes.flip(1)


class Long(ManySizes):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = self.sizes.long()


class Strided(ManySizes):
    def original(self, index):
        return super().original(index).permute(1, 2, 0).contiguous().permute(2, 0, 1)


class Rolls(ManySizes):
    rolled = 0

    def original(self, index):
        self.rolled += 1
        return super().original(index).roll(self.rolled)


class NoSample(ManySizes):
    sample = property()  # type: ignore[assignment]


class Twice(ManySizes):
    def order(self, generator):
        return torch.zeros(len(self), dtype=torch.int64)


class Unkeyed(ManySizes):
    def order(self, generator):
        return torch.randperm(len(self))


class AlwaysAlike(ManySizes):
    def order(self, generator):
        return torch.arange(len(self))


class Falling(ManySizes):
    def sample(self, n):
        return super().sample(n).flip(0)


CASES = [
    Case(HalfOfIt(), "cuts", r"there is one of draw_sized\(\) and cut\(\)"),
    Case(DrawsOtherwise(), "cuts", r"draws something else than draw\(\); draw the same numbers"),
    Case(NeverFlips(), "cuts", r"from what crop\(\) makes of it.*flip where the row says so"),
    Case(OwnSize(), "cuts", r"of an image \[3, 32, 32\] gives .*one for each spec and of its size"),
    Case(CutsAtRandom(), "cuts", r"other crops for the same row; draw whatever is random in draw_sized"),
    Case(WritesOriginal(), "cuts", "changes the image that it is given"),
    Case(source(Swapped), "originals", r"it should be uint8 \[3, .*by its channels and `sizes`"),
    Case(source(Long), "originals", r"train.sizes is torch.int64 \[20, 2\] for 20 images; make it an int32"),
    Case(source(Strided), "originals", "not a tensor in one piece"),
    Case(source(Rolls), "originals", "gives another image the second time"),
    Case(source(NoSample), "shards", r"has one of order\(\) and sample\(\)"),
    Case(source(Twice), "shards", r"with every position once"),
    Case(source(Unkeyed), "shards", "another order for the same generator"),
    Case(source(AlwaysAlike), "shards", "all epochs would be alike"),
    Case(source(Falling), "shards", r"sample\(5\) should be int64, ascending"),
]
