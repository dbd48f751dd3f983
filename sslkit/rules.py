"""The shapes of health rules: what a rule looks at, and what it says. No torch: rules are small pure functions.

A rule is an instance of `Rule` behind the entry point `rule.NAME` of any installed package; NAME is the id of its
findings. `before` looks at a recipe's parts, `during` at the records of a run that goes on or is over. Each returns
None, a sentence with the figures that it saw, or a `Seen`. What is not known is None, in `Facts` as in a record: a
rule that needs it then says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

Severity = Literal["error", "warning", "info"]
"""An error: the run is not to be trusted. A warning: it may be worse than it could be. Info: worth knowing."""


# ---------------------------------------------------------------- what rules look at


class _Known(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


LOOKED_AT = 1_000_000
"""Steps of a run at which a schedule is looked at, which takes about a second."""


class Trajectory(_Known):
    """A number that follows a schedule, looked at for every optimizer step of the run, of which little is kept."""

    steps: int
    """How many values there are: those of steps 0 to `steps` - 1."""
    start: float
    middle: float
    """The value halfway."""
    end: float
    """The last update's value."""
    least: float
    most: float
    most_at: int
    """The step with the largest value."""
    above_one: tuple[int, float] | None = None
    """The first step whose value is above 1, and the value."""
    below_zero: tuple[int, float] | None = None
    """The first step whose value is below 0, and the value."""
    falls: tuple[int, float, float] | None = None
    """The first step whose value is smaller than the one before it, with both values."""
    settled: int = 0
    """The step from which on the value stays what it is at the end."""
    growth: float = 1.0
    """The product of all values above 1: what they multiply the gap between target and online network by."""

    @classmethod
    def of(cls, value: Callable[[int], float], steps: int) -> Trajectory:
        """Look at `value(step)` for every step of the run; of more than LOOKED_AT, for as many spread evenly."""
        first, apart = value(0), -(-steps // LOOKED_AT)
        seen: dict[str, Any] = {"start": first, "least": first, "most": first, "most_at": 0}
        before, settled, growth = first, 0, 0.0
        for step in (*range(0, steps - 1, apart), steps - 1) if apart > 1 else range(steps):
            now = value(step)
            if now > 1:
                seen.setdefault("above_one", (step, now))
                growth += apart * math.log(now)
            if now < 0:
                seen.setdefault("below_zero", (step, now))
            if now < before:
                seen.setdefault("falls", (step, before, now))
            if now != before:
                settled = step
            if now < seen["least"]:
                seen["least"] = now
            if now > seen["most"]:
                seen["most"], seen["most_at"] = now, step
            before = now
        seen |= {"middle": value(steps // 2), "end": before, "settled": settled}
        # A factor beyond any float says the same as the largest one.
        return cls(steps=steps, growth=math.exp(min(growth, 700.0)), **seen)


class QueueFacts(_Known):
    """A queue of a loss."""

    rows: int
    pushed_per_step: int
    negatives: bool | None = None
    """Whether its rows are what an image is told apart from, not what it is made alike to."""


class Facts(_Known):
    """What is known of a run from its parts alone. None: not known, as for a run that another program made."""

    name: str = ""
    accepted: tuple[str, ...] = ()
    """Findings that the recipe means, by id."""
    recipe: Mapping[str, Any] | None = None
    """The options that compute something, as tables of a recipe (`recipe["loss"]["use"]`)."""

    # size
    total_steps: int | None = None
    """Optimizer steps of the whole run."""
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    """Images per optimizer step, over all processes."""
    train_images: int | None = None
    processes: int = 1
    precision: str | None = None
    """What networks compute in: `fp32`, `bf16` or `fp16`."""
    loss_precision: str | None = None
    """What the loss computes in."""

    initialised: str = ""
    """Where the weights at step 0 were taken from, as `runs/x, step 840`, for people; empty where they were drawn."""
    initialised_by: str = ""
    """The same as `init_from` has it: `run`, `timm` or `file`; empty where they were drawn, and of older runs."""

    # measurement
    labelled: bool | None = None
    """Whether training and test images have labels, so that accuracy can be measured."""
    quality: tuple[str, ...] | None = None
    """Metrics of quality that the run will record: `knn_top1`, `probe_top1`."""
    evaluated: str | None = None
    """The branch whose features are measured: `online` or `target`."""
    shared_images: float | None = None
    """Share of the test images looked at that are among the training images looked at, pixel for pixel."""
    commonest_image: float | None = None
    """Share of the training images looked at that are one and the same picture, pixel for pixel."""
    classes: int | None = None
    """How many classes the labels of the training images name."""
    test_classes: int | None = None
    """The same of the test images."""

    # views
    view_difference: tuple[float, float] | None = None
    """Mean and largest |v1 - v2| of normalised pixels, over 64 images and all pairs of views of one size."""
    pairs_agree: float | None = None
    """How much nearer the two views of an image are to one another than to views of other images: standard errors above
    chance, by the measure of pixels or embeddings that tells them best."""
    clean_scale: tuple[float, float] | None = None
    """The same of images as they are measured, without augmentation."""
    view_scale: tuple[float, float] | None = None
    """Mean and standard deviation of the pixels of views of the first size, as the backbone gets them."""
    images_share_draws: bool | None = None
    """Whether one draw of parameters serves all images of a batch, though it changes from step to step."""
    shared_draws: tuple[str, ...] | None = None
    """Parameters of views, by name, of which a part is the same for all images of a batch, and another in other
    batches."""
    steps_share_draws: bool | None = None
    """Whether an image has the same views at every step, though they differ from one another."""
    draws_are_keyed: bool | None = None
    """Whether the same generator gives the same views again, which exact resume rests on."""

    # networks
    view_sizes: tuple[int, ...] = ()
    """Sides of the views, in pixels."""
    stem_stride: float | None = None
    """Side of the view divided by the side of the map that the second convolution sees."""
    last_map: int | None = None
    """Side of the map that the last convolution makes of a view of the first size."""
    normalisation_layers: int | None = None
    """Normalisation layers of backbone, projector and predictor."""
    batch_norm_layers: int | None = None
    """Those among them whose statistics are a batch's."""
    batch_norm_images: int | None = None
    """Images that these statistics are taken from."""
    batch_norm_shuffled: bool | None = None
    """Whether the target's statistics are taken from other images than the online network's."""
    batch_norm_synchronised: bool | None = None
    """Whether the statistics are taken over all processes."""
    predictor_learns: bool | None = None
    """Whether there is a predictor with parameters."""
    projector_normalised: bool | None = None
    """Whether the projector ends in a normalisation layer."""

    # loss
    prevents_collapse: bool | None = None
    """Whether a constant output is a bad solution of the loss itself."""
    wants_predictions: bool | None = None
    blank_loss: float | None = None
    """The loss of outputs that are all zero: what knowing nothing costs, ln M for losses over M candidates."""
    agreement: tuple[float, float] | None = None
    """The loss of views that agree in everything, and of views that have nothing in common."""
    dead_inputs: tuple[str, ...] | None = None
    """Outputs of the online branch that the loss asks for and that get no gradient: `predictions of view 1`."""
    byol_scale: float | None = None
    """How steep the loss is, with BYOL's symmetrised 2 - 2 cos in both directions as 1; None for other forms."""
    scale_sensitive: bool | None = None
    """Whether the loss changes where all outputs are twice as long; None where it prevents collapse by itself."""
    positives_counted: float | None = None
    """Of a softmax loss on the projections of two views: terms in the denominator that are as large as the positive's
    where views of an image agree. 1 is right, 0 decoupled; None for other forms."""
    reads_labels: bool | None = None
    """Whether the loss changes with the labels."""
    queues: tuple[QueueFacts, ...] = ()

    # target
    target: Literal["copy", "online", "none"] | None = None
    """`copy`: a second network. `online`: the online network under stop-gradient. `none`: no target branch."""
    tau: Trajectory | None = None
    """How much of the target remains in each update."""
    target_gap: float | None = None
    """How far the target is from the online network at the start, as a share of its length."""
    unmoved: tuple[str, ...] | None = None
    """Parameters of the target that an update leaves where they are though the online network's differ."""

    # optimizer
    optimizer: str | None = None
    """Its name: `adam`, `lars`."""
    lr: Mapping[str, Trajectory] | None = None
    """Learning rate by part: backbone, projector, predictor, loss."""
    trained_parts: tuple[str, ...] | None = None
    """Those of backbone, projector, predictor and loss that have parameters to train."""
    unoptimised: tuple[str, ...] | None = None
    """Trainable parameters of the online branch and the loss that the optimizer does not have."""
    decayed_biases: bool | None = None
    """Whether bias or normalisation parameters take part in weight decay or in LARS's adaptation."""

    @property
    def begins_learnt(self) -> bool:
        """Whether the network of step 0 has learnt something: another run's weights, a file's, or pretrained ones."""
        return self.first_network != RANDOM

    @property
    def first_network(self) -> str:
        """What is measured at step 0."""
        return first_network({"initialised": self.initialised, "recipe": self.recipe})


RANDOM = "random network"


def first_network(facts: Mapping[str, Any]) -> str:
    """What is measured at step 0, by `facts.json`: a floor, which knowing nothing gives, or what others have learnt."""
    recipe = facts.get("recipe")
    backbone = recipe.get("backbone") if isinstance(recipe, Mapping) else None
    pretrained = isinstance(backbone, Mapping) and backbone.get("pretrained") is True
    return "initialised network" if facts.get("initialised") or pretrained else RANDOM


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number that can be reckoned with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


class Points(NamedTuple):
    """What was recorded under one key, oldest first, without what was not finite."""

    steps: list[int]
    epochs: list[float]
    values: list[float]


@dataclass
class Course:
    """A run as its records tell it, while it goes on or after it."""

    facts: Facts = field(default_factory=Facts)
    status: Mapping[str, Any] = field(default_factory=dict)
    """`status.json`: how far the run is, why it ended, at which steps it was resumed."""
    records: list[Mapping[str, Any]] = field(default_factory=list)
    _points: dict[str, Points] = field(default_factory=dict)
    _newest: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        records, self.records = self.records, []
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """A record more, as it stands in `metrics.jsonl`."""
        self.records.append(record)
        step, epoch = record.get("step"), record.get("epoch")
        step = int(step) if step is not None and is_number(step) else len(self.records) - 1
        epoch = float(epoch) if epoch is not None and is_number(epoch) else 0.0
        self._newest = step, epoch
        for key, value in record.items():
            if is_number(value):
                points = self._points.setdefault(key, Points([], [], []))
                points.steps.append(step)
                points.epochs.append(epoch)
                points.values.append(float(value))

    def points(self, key: str) -> Points:
        """What was recorded under a key; empty if nothing was."""
        return self._points.get(key, Points([], [], []))

    def last(self, key: str) -> float | None:
        """The newest value under a key."""
        values = self.points(key).values
        return values[-1] if values else None

    @property
    def step(self) -> int:
        """The newest step that was recorded."""
        return self._newest[0]

    @property
    def epoch(self) -> float:
        """The newest epoch that was recorded."""
        return self._newest[1]

    @property
    def share(self) -> float | None:
        """How much of the run is over, 0..1; None if its length is not known."""
        return self.step / self.facts.total_steps if self.facts.total_steps else None


# ---------------------------------------------------------------- what rules are, and what they say

RANKS: Mapping[Severity, int] = {"error": 0, "warning": 1, "info": 2}


def _checked(severity: str) -> None:
    if severity not in RANKS:
        raise ValueError(f"severity is {severity!r}; it should be one of {', '.join(RANKS)}")


@dataclass(frozen=True)
class Seen:
    """What a rule saw: a sentence with figures, and what is different in this case from what the rule says."""

    text: str
    severity: Severity | None = None
    cause: str | None = None
    fix: str | None = None
    key: str | None = None
    step: int | None = None
    """When it became true, if that is known better than the newest record's step."""
    what: str | None = None
    """The headline, where the rule's is too strong or too weak for this case."""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"what a rule saw should be a sentence, not {self.text!r}")
        if self.severity is not None:
            _checked(self.severity)


@dataclass(frozen=True)
class Rule:
    """A thing that goes wrong: how to see it, what causes it, what mends it, and who says so."""

    what: str
    """One line: what is wrong when the rule fires."""
    severity: Severity
    fix: str
    source: str
    """Paper with section, or whose report it is."""
    cause: str = ""
    """The likely cause, where `what` does not say it."""
    key: str = ""
    """The key of a recipe that is to blame, such as `target_updater.tau`."""
    before: Callable[[Facts], str | Seen | None] | None = None
    during: Callable[[Course], str | Seen | None] | None = None
    explains: tuple[str, ...] = ()
    """Ids of findings that this one brings about: they are told after it, as its consequences."""

    def __post_init__(self) -> None:
        if self.before is None and self.during is None:
            raise TypeError("a rule needs a function 'before', 'during' or both")
        _checked(self.severity)


@dataclass(frozen=True)
class Finding:
    """A rule that fired: what the user is told."""

    id: str
    severity: Severity
    what: str
    evidence: str
    cause: str
    fix: str
    source: str
    key: str
    step: int | None
    """The step at which it was seen; None before training."""
    because: tuple[str, ...] = ()
    """Ids of other findings that explain this one."""
    where: str = ""
    """File and line of the recipe that set `key`, where they are known."""

    @property
    def sentence(self) -> str:
        """What is wrong, the evidence and the fix, in a line."""
        return f"{self.what.rstrip('.')}: {self.evidence}; {self.fix}"


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """Errors first; among them causes before what they bring about, and what was known before training first."""
    return sorted(found, key=lambda f: (RANKS[f.severity], bool(f.because), f.step is not None, f.step or 0))
