"""Faults of view generators."""

from __future__ import annotations

from typing import Any

import torch

from sslkit.api import ViewSpec
from wrong_plugins import Case
from wrong_plugins.right import RightViews
from wrong_plugins.right_parts import Mirrored


class _Views(RightViews):
    def build(self, run: Any) -> Any:
        return type(self).Module(run, self.strength)  # type: ignore[attr-defined]


class ListOfSizes(_Views):
    class Module(Mirrored):
        def __init__(self, run, strength):
            super().__init__(run, strength)
            self.specs = [32, 32]


class TextSize(_Views):
    class Module(Mirrored):
        def __init__(self, run, strength):
            super().__init__(run, strength)
            self.specs = (ViewSpec("32"), ViewSpec(32))


class OtherSize(_Views):
    class Module(Mirrored):
        def __init__(self, run, strength):
            super().__init__(run, strength)
            self.specs = (ViewSpec(16), ViewSpec(32))


class OneView(_Views):
    class Module(Mirrored):
        def appear(self, crops, parameters):
            return super().appear(crops, parameters)[:1]


class Bytes(_Views):
    class Module(Mirrored):
        def crop(self, images, parameters):
            return [images, images]


class Unscaled(_Views):
    class Module(Mirrored):
        def crop(self, images, parameters):
            return [c * 255 for c in super().crop(images, parameters)]


class DrawsAList(_Views):
    class Module(Mirrored):
        def draw(self, n, generator):
            return list(super().draw(n, generator).values())


class OneForAll(_Views):
    class Module(Mirrored):
        def draw(self, n, generator):
            return super().draw(n, generator) | {"strength": torch.rand(1, generator=generator)}


class DefaultGenerator(_Views):
    class Module(Mirrored):
        def draw(self, n, generator):
            return super().draw(n, generator) | {"light": 1 + 0.1 * torch.rand(n, 2)}


class DrawsLate(_Views):
    class Module(Mirrored):
        def appear(self, crops, parameters):
            return [v + 0.1 * torch.randn_like(v) for v in super().appear(crops, parameters)]


class SameForTheBatch(_Views):
    class Module(Mirrored):
        def draw(self, n, generator):
            drawn = super().draw(n, generator)
            return {name: tensor[:1].expand(n, -1).clone() for name, tensor in drawn.items()}


class SameForBothViews(_Views):
    class Module(Mirrored):
        def draw(self, n, generator):
            drawn = super().draw(n, generator)
            return {name: tensor[:, :1].expand(-1, 2).clone() for name, tensor in drawn.items()}


class BatchMean(_Views):
    class Module(Mirrored):
        def appear(self, crops, parameters):
            return [v - v.mean() for v in super().appear(crops, parameters)]


class WritesImages(_Views):
    class Module(Mirrored):
        def crop(self, images, parameters):
            made = super().crop(images, parameters)
            images[parameters["flip"][:, 0]] = images[parameters["flip"][:, 0]].flip(3)
            return made


class WritesParameters(_Views):
    class Module(Mirrored):
        def appear(self, crops, parameters):
            made = super().appear(crops, parameters)
            parameters["light"].clamp_(max=1)
            return made


class RandomClean(_Views):
    class Module(Mirrored):
        def clean(self, images):
            return super().clean(images) + torch.rand(())


class CleanByBatch(_Views):
    class Module(Mirrored):
        def clean(self, images):
            x = images.float()
            return (x - x.mean()) / x.std()


class CleanBytes(_Views):
    class Module(Mirrored):
        def clean(self, images):
            return images.clone()


class CountsBatches(_Views):
    class Module(Mirrored):
        batches = 0

        def draw(self, n, generator):
            self.batches += 1
            drawn = super().draw(n, generator)
            return drawn | {"light": drawn["light"] * 0.9**self.batches}


class RawClean(_Views):
    class Module(Mirrored):
        def clean(self, images):
            return images.float() / 255


class OneLight(_Views):
    class Module(Mirrored):
        def draw(self, n, generator):
            drawn = super().draw(n, generator)
            return drawn | {"light": drawn["light"][:1].expand(n, -1).clone()}


CASES = [
    Case(ListOfSizes(), "view_specs", r"specs is \[32, 32\]; make it a tuple: \(ViewSpec"),
    Case(TextSize(), "view_specs", r"specs\[0\] is .*; size is a positive int"),
    Case(OtherSize(), "view_shapes", r"makes view 0 \[8, 3, 32, 32\]; it should be \[8, 3, 16, 16\]"),
    Case(OneView(), "view_shapes", "returns 1 tensors for 2 specs; return a list with one tensor for each"),
    Case(Bytes(), "view_shapes", "torch.uint8; divide the uint8 image by 255"),
    Case(Unscaled(), "view_shapes", "crops are on the scale 0..1"),
    Case(DrawsAList(), "draws", r"draw\(\) returns list; return a dict of tensors"),
    Case(OneForAll(), "draws", r"\['strength'\] should be a CPU tensor with 8 rows.*a leading dimension n"),
    Case(DefaultGenerator(), "draws", "another 'light' for the same generator; take every random number from"),
    Case(DrawsLate(), "views_keyed", r"draw whatever is random in draw\(\)"),
    Case(SameForTheBatch(), "views_differ", r"8 copies of one image get the same view 0; draw parameters of shape"),
    Case(SameForBothViews(), "views_differ", r"views 0 and 1 of an image are identical; draw parameters for each"),
    Case(BatchMean(), "view_subsets", "when other images are in the batch; let nothing depend on the batch"),
    Case(RawClean(), "health", "views_not_normalised: .*is measured on have mean .*normalise by the mean and standard"),
    Case(OneLight(), "health", "one_draw_per_batch: .*what is drawn as light is the same.*draw parameters for every"),
    Case(WritesImages(), "images_untouched", r"crop\(\) changes the stored images; make a copy first"),
    Case(WritesParameters(), "images_untouched", "changes the parameters; do not work on them in place"),
    Case(RandomClean(), "clean_images", r"clean\(\) gives other pictures the second time"),
    Case(CleanByBatch(), "clean_images", "normalise with the run's mean and std, not the batch's"),
    Case(CleanBytes(), "clean_images", "torch.uint8 .*; it should be float32"),
    Case(CountsBatches(), "resume", "stopped at step 1 and resumed"),
]
