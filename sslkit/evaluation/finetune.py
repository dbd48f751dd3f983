"""Fine-tuning: a copy of the backbone and a linear classifier, trained together on some of the labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import features, randomness, registry
from sslkit.api import ViewMaker
from sslkit.errors import UserError
from sslkit.evaluation.linear import stratified
from sslkit.evaluation.material import Material, Network, Part, Split
from sslkit.progress import counted

RATES = (0.01, 0.03, 0.1)
BATCH = 128
HELD_OUT = 0.2
"""Share of the labelled images of each class that the learning rate is chosen by."""
CROPS: dict[str, Any] = {
    "scale": (0.2, 1.0), "flip": 0.5, "jitter": 0.0, "grayscale": 0.0, "saturation": 0.0, "hue": 0.0, "blur": 0.0,
    "solarize": 0.0, "views": ({"count": 1},),
}  # fmt: skip


def finetuned(
    material: Material, network: Network, labels: float, epochs: int, seed: int
) -> tuple[Callable[[], Tensor], dict[str, float]]:
    """Choose a rate, train with it, and give what then predicts the test images' classes, and the choice."""
    labelled = some_labels(material.train, labels, seed)
    crops = Crops(material)
    held, rest = stratified(labelled.labels, HELD_OUT, randomness.generator(seed, "finetune/held_out"))
    chosen = {"lr": RATES[1]}
    if len(held):  # else one labelled image of each class: the rate in the middle
        judged, tried = labelled.part(held), []
        for rate in RATES:
            model = _trained(material, network, crops, labelled.part(rest), rate, max(1, epochs // 3), seed)
            right = float((_predicted(material, model, judged) == judged.labels).float().mean())
            tried.append((right, rate))
        best, rate = max(tried, key=lambda pair: pair[0])
        chosen = {"lr": rate, "held_out": best}
    model = _trained(material, network, crops, labelled, chosen["lr"], epochs, seed)
    return lambda: _predicted(material, model, material.test), chosen


def some_labels(train: Split, labels: float, seed: int) -> Split:
    """A percentage of the labelled images of each class, the same for every run with these data."""
    if labels >= 100:
        return train
    return train.part(
        stratified(train.labels, labels / 100, randomness.generator(seed, f"finetune/{labels:g}"), least=0)[0]
    )


class Crops:
    """Random crops and mirroring of raw images, normalised and as large as the run prepares images."""

    def __init__(self, material: Material) -> None:
        opened, images = material.opened, material.train.images
        raw = images.read(material.train.where[:1])
        straight = features.normalisation(opened.views, raw.shape[1:])
        if straight is None:
            raise UserError(
                f"{opened.run}: its view generator prepares images by more than a mean and a standard deviation for "
                "each channel, so fine-tuning cannot make crops that are prepared alike; leave finetune out"
            )
        self.black, self.span = (part.float().to(material.device) for part in straight)
        spec = registry.load("view_generator", "multi_crop")
        size = opened.views.clean(raw).shape[-1]
        info = replace(opened.info, image_size=raw.shape[-1], device=material.device.type)
        self.views = cast(ViewMaker, spec(size=size, **CROPS).build(info))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        drawn = self.views.draw(len(images), generator)
        parameters = {name: values.to(images.device) for name, values in drawn.items()}
        return self.views.crop(images, parameters)[0] * self.span + self.black


def _trained(
    material: Material, network: Network, crops: Crops, split: Split, rate: float, epochs: int, seed: int
) -> nn.Module:
    assert network.backbone is not None
    backbone = copy.deepcopy(network.backbone).requires_grad_()
    head = nn.Linear(cast(int, backbone.feature_dim), material.classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(backbone, head).to(material.device).train()
    if material.opened.channels_last:
        model.to(memory_format=torch.channels_last)
    solver = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
    batch = min(BATCH, len(split.where))
    per_epoch = len(split.where) // batch
    what = f"{network.name} network: {epochs} epoch{'s' * (epochs > 1)} on {len(split.where):,} images, lr {rate:g}"
    material.say(f"finetune: {what}")
    with counted(what, epochs * per_epoch) as advance, randomness.seeded(seed, "finetune"):
        for step in range(epochs * per_epoch):
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                order = torch.randperm(len(split.where), generator=randomness.generator(seed, "finetune/order", epoch))
            rows = order[position * batch : (position + 1) * batch]
            for group in solver.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / (epochs * per_epoch))) / 2
            pictures = split.images.read(split.where[rows]).to(material.device)
            pictures = crops(pictures, randomness.generator(seed, "finetune/crops", step))
            if material.opened.channels_last:
                pictures = pictures.contiguous(memory_format=torch.channels_last)
            with torch.autocast(material.device.type, torch.bfloat16, enabled=material.bf16):
                logits = model(pictures)
            loss = F.cross_entropy(logits.float(), split.labels[rows].to(material.device))
            solver.zero_grad()
            loss.backward()
            solver.step()
            advance(1)
    return model


def _predicted(material: Material, model: nn.Module, split: Part) -> Tensor:
    return features.features(
        model, split.images, split.where, material.opened.views.clean, material.device, bf16=material.bf16,
        channels_last=material.opened.channels_last,
    ).argmax(dim=1).cpu()  # fmt: skip
