"""What an evaluation works with: labelled images of a run's data, features of them, and test labels asked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import features, initialise, local, randomness
from sslkit.api import Images, ImageSet
from sslkit.build import choose_device, open_data
from sslkit.errors import SslkitError, UserError
from sslkit.evaluation.linear import stratified
from sslkit.opened_run import OpenedRun, digest_of
from sslkit.recipe import Recipe
from sslkit.run_directory import read_metrics

LABEL_FREE = ("effective_rank", "rankme", "alpha_req", "lidar", "std_sqrt_d")
"""Figures of a run that need no labels."""
TEST_SHARE = 0.2
"""Of the training images, where there are no labelled test images."""
PIXELS = 16
"""Largest side of the pictures whose pixels stand in for features. Larger ones are worse at it and slower: on CIFAR-10
kNN sorts .334 of them rightly at 16 px, .309 at 32 px."""


@dataclass(frozen=True)
class Part:
    """Images of one set."""

    name: str
    images: Images
    where: Tensor
    """Positions in the set, int64 `[n]`, ascending."""


@dataclass(frozen=True)
class Split(Part):
    """Images with their labels."""

    labels: Tensor
    """int64 `[n]`, on the CPU."""

    def part(self, rows: Tensor) -> Self:
        """Some of them, by their rows here."""
        return replace(self, where=self.where[rows], labels=self.labels[rows])


class Exam:
    """The test labels, which nothing else has.

    Whoever has made all choices asks once, so that none is made by the answer.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self.asked: list[str] = []
        """Who did, in their order."""

    def score(self, who: str, predicted: Tensor) -> float:
        """Share of the test images that were classified rightly.

        Raises:
            RuntimeError: the same one asks again.
        """
        if who in self.asked:
            raise RuntimeError(f"{who} was scored on the test images already")
        self.asked.append(who)
        return float((predicted.cpu() == self._labels).float().mean())


@dataclass
class Material:
    """A run, its data, and where and how features are computed."""

    opened: OpenedRun
    recipe: Recipe
    data: ImageSet
    train: Split
    test: Part
    """Without labels, which the exam has alone."""
    tests: int
    """Labelled test images that there are; `test` may be a part of them."""
    exam: Exam
    classes: int
    held_out: bool
    """Whether the test images were taken out of the training images."""
    device: torch.device
    keep: bool
    """Whether features are read from and written to the run's directory."""
    say: Callable[[str], None]
    known: dict[str, features.FeatureCache] = field(default_factory=dict)

    @property
    def bf16(self) -> bool:
        """Features are computed as the run's own figures are."""
        return self.recipe.train.precision == "bf16"


def open_material(
    opened: OpenedRun, overrides: Sequence[str], queries: int, device: str, keep: bool, say: Callable[[str], None]
) -> Material:
    """Open a run's data.

    Raises:
        UserError: it has no labels, or is not what the run was trained on.
    """
    recipe = opened.recipe(overrides)
    with local.allowed(opened.allow_local_code):
        data = open_data(recipe, say)
    was = opened.facts.get("data_fingerprint")
    if data.fingerprint != was and not overrides:
        raise UserError(
            f"{opened.run}: its data are not what it was trained on (fingerprint {data.fingerprint[:12]}, was "
            f"{str(was)[:12]}); give other data on purpose by setting an option, as data_source.seed=1"
        )
    shape = data.train.read(torch.zeros(1, dtype=torch.int64)).shape[1:]
    if shape[0] != opened.info.channels:
        raise UserError(f"{opened.run}: was trained on images of {opened.info.channels} channels, and these have "
                        f"{shape[0]}; convert them, or evaluate on others")  # fmt: skip
    if data.train.labels is None or not (data.train.labels >= 0).any():
        raise UserError(_unlabelled(opened.run))
    train = _labelled("train", data.train)
    held_out = data.test is None or data.test.labels is None or not (data.test.labels >= 0).any()
    if held_out:
        apart, rest = stratified(train.labels, TEST_SHARE, randomness.generator(0, "evaluation/test"))
        train, test = train.part(rest), train.part(apart)
        say("there are no labelled test images: a fifth of the training images is held out, which the encoder has seen")
    else:
        test = _labelled("test", cast(Images, data.test))
    tests, test = len(test.where), some(test, queries)
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    if len(train.labels.unique()) < 2:
        raise UserError(f"{opened.run}: all its labelled training images are of one class, so there is nothing to "
                        "classify; see that data_source finds the classes")  # fmt: skip
    return Material(
        opened=opened, recipe=recipe, data=data, train=train, test=Part(test.name, test.images, test.where),
        tests=tests, exam=Exam(test.labels), classes=classes, held_out=held_out, device=choose_device(device),
        keep=keep, say=say,
    )  # fmt: skip


def _labelled(name: str, images: Images) -> Split:
    labels = cast(Tensor, images.labels)
    where = (labels >= 0).nonzero()[:, 0]  # -1 is an image without a label
    return Split(name, images, where, labels[where])


def some(split: Split, number: int) -> Split:
    """So many of a split, the same every time; all for 0. Of a whole set they are those that the observer `knn` takes.

    Where some of the set are not in the split, more of the set are chosen, until so many are.
    """
    if number == 0 or number >= len(split.where):
        return split
    if len(split.where) == len(split.images):
        return split.part(features.chosen(split.images, number))
    asked, rows = number, torch.empty(0)
    while len(rows) < number:
        rows = torch.isin(split.where, features.chosen(split.images, asked)).nonzero()[:, 0]
        asked = min(2 * asked, len(split.images))
    order = torch.randperm(len(rows), generator=randomness.generator(0, "knn"))
    return split.part(rows[order[:number].sort().values])


def _unlabelled(run: Path) -> str:
    newest: dict[str, float] = {}
    try:
        for record in read_metrics(run):
            newest |= {key: value for key in LABEL_FREE if isinstance(value := record.get(key), int | float)}
    except OSError:
        pass
    told = ", ".join(f"{key} {newest[key]:.4g}" for key in LABEL_FREE if key in newest)
    return (
        f"{run}: its data have no labels, and every protocol needs them; label a few hundred images and set "
        f"data_source to them. What needs none was measured while it trained: {told or 'nothing'}. That finds broken "
        "runs, and does not rank sound ones"
    )


# ---------------------------------------------------------------- networks


@dataclass(frozen=True)
class Network:
    """Something that gives features: what the run trained, or what it is compared with."""

    name: Literal["trained", "random", "initialised", "pixels"]
    module: nn.Module
    backbone: nn.Module | None
    """Its backbone, which fine-tuning begins with; None of raw pixels."""
    weights: str
    """SHA-256 of its weights; of pixels, a word."""
    layer: str = "backbone"
    """Whose output the features are."""


class Pixels(nn.Module):
    """Normalised images, made small, as features."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > PIXELS:
            images = F.interpolate(images.float(), size=PIXELS, mode="bicubic", antialias=True)
        return images.flatten(1)


def networks(material: Material, layer: str, floor: bool) -> list[Network]:
    """The trained network, and with `floor` the random one, what training began with, and raw pixels.

    The random network is that of step 0: the same backbone, drawn from the run's seed. Where the run began with
    weights of a library or of another run, these are one more.
    """
    opened = material.opened
    found = [_network("trained", material, opened.backbone, layer, opened.projector)]
    if not floor:
        return found
    info, spec = opened.info, opened.spec
    with randomness.seeded(info.seed, "backbone"):
        drawn = spec.build(replace(info, weights_follow=True))  # pretrained weights are not fetched for it
    found.append(_network("random", material, drawn, layer, lambda: _drawn_projector(material, drawn)))
    try:
        began = _began(material)
    except SslkitError as error:
        material.say(f"what the run began with cannot be had, and is left out: {error.lines[0]}")
        began = None
    if began is not None and digest_of(began.state_dict()) != digest_of(drawn.state_dict()):
        found.append(_network("initialised", material, began, layer, lambda: _drawn_projector(material, began)))
    return [*found, Network("pixels", Pixels(), None, f"pixels {PIXELS}")]


def _network(
    name: Literal["trained", "random", "initialised"], material: Material, backbone: nn.Module, layer: str,
    projector: Callable[[], nn.Module],
) -> Network:  # fmt: skip
    module = nn.Sequential(backbone, projector()) if layer == "projection" else backbone
    module.to(material.device)
    if material.opened.channels_last:
        module.to(memory_format=torch.channels_last)
    return Network(name, module, backbone, digest_of(module.state_dict()), layer)


def _began(material: Material) -> nn.Module:
    backbone = material.opened.initial_backbone()
    start = initialise.find(material.recipe, material.say)
    if start is not None and (start.given.parts is None or "backbone" in start.given.parts):
        start.take({"backbone": backbone}, material.opened.spec, material.opened.info)
    return backbone


def _drawn_projector(material: Material, backbone: nn.Module) -> nn.Module:
    """The projector of step 0; one that began with another run's weights is as drawn here, too."""
    with randomness.seeded(material.opened.info.seed, "projector"):
        return material.recipe.projector.build(cast(int, backbone.feature_dim), material.opened.info)
