"""The protocols by name: what each does, in words and in options, and nothing that a figure depends on left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sslkit.errors import UserError, did_you_mean

Name = Literal["knn", "linear", "linear_sgd", "finetune", "patches"]
NAMES: tuple[Name, ...] = get_args(Name)

WORDS = {
    "knn": "Weighted kNN (Wu et al. 2018, arXiv 1805.01978, section 3.4): the k training images whose features have "
    "the largest cosine with a test image's vote for their class with the weight exp(cosine / T).",
    "linear": "Logistic regression on frozen features of clean images, standardised by their mean and standard "
    "deviation over the training images, solved to its optimum by L-BFGS. The strength of the regularisation, C as "
    "scikit-learn defines it, is chosen among seven from 0.0001 to 100 by a tenth of the training images of each "
    "class, which are held out for that; then all training images are fitted.",
    "linear_sgd": "The same classifier trained by SGD: Nesterov's momentum of .9, no weight decay, a cosine to 0, on "
    "frozen features of clean images, which are not augmented. The learning rate is chosen among eight from 0.001 to "
    "3 by a tenth of the training images of each class, which are held out for that; then all training images are "
    "trained on.",
    "finetune": "Backbone and a linear classifier, which begins at zero, trained together on a part of the labels, "
    "the same share of each class: SGD, Nesterov's momentum of .9, no weight decay, a cosine to 0, BatchNorm in "
    "training mode, random crops (area 0.2 to 1) and mirroring. The learning rate is chosen among 0.01, 0.03 and 0.1, "
    "in a third of the epochs, by a fifth of those labelled images, which are held out for that; then all of them are "
    "trained on.",
    "patches": "Features averaged over several views of an image, drawn by the run's own view generator (Tong et al. "
    "2023, EMP-SSL, arXiv 2304.03977), training and test images alike; then kNN and logistic regression as in `knn` "
    "and `linear`.",
}
"""What the reference says and `sslkit evaluate` prints."""
ONCE = "Test images are classified once, after every choice was made."
OF: dict[str, tuple[Name, ...]] = {
    "k": ("knn", "patches"), "temperature": ("knn", "patches"), "bank": ("knn", "patches"), "labels": ("finetune",),
    "epochs": ("linear_sgd", "finetune"), "patches": ("patches",),
    "seeds": ("linear", "linear_sgd", "finetune", "patches"),
}  # fmt: skip
"""Options that some protocols alone have; nothing of kNN is drawn at random."""
EPOCHS = {"linear_sgd": {100: 100}, "finetune": {1: 60, 10: 30, 100: 30}}
"""By the percentage of labels, where `epochs` says nothing; a percentage between takes that of the one above."""


@dataclass(frozen=True)
class Protocol:
    """A protocol with all that its figure depends on, beside weights, data and versions."""

    name: str
    """`knn`, `linear`, `linear_sgd`, `finetune`, `patches_knn` or `patches_linear`."""
    options: dict[str, Any]

    @property
    def title(self) -> str:
        """For a row of a table: the name and the options that users choose."""
        told = {"k": "k", "temperature": "T", "bank": "bank", "labels": "labels", "patches": "patches",
                "epochs": "epochs", "seeds": "seeds"}  # fmt: skip
        parts = [
            f"{word} {self.options[key]:,}{'%' * (key == 'labels')}"
            for key, word in told.items()
            if key in self.options
        ]
        if self.options["queries"] < self.options["of"]:
            parts.append(f"{self.options['queries']:,} of {self.options['of']:,} test images")
        if self.options.get("layer") == "projection":
            parts.append("projection")
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    protocols: Sequence[str] = ("knn", "linear")
    k: int | None = None
    """None: that of the run's own kNN."""
    temperature: float | None = None
    bank: int = 0
    queries: int = 0
    layer: str = "backbone"
    labels: Sequence[float] = (1, 10, 100)
    epochs: int | None = None
    patches: int = 16
    seeds: int = 1
    floor: bool = True
    cache: bool = True
    overrides: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for name in self.protocols:
            if name not in NAMES:
                known = ", ".join(NAMES)
                raise UserError(f"protocols: there is no {name!r}{did_you_mean(str(name), NAMES)}; choose of {known}")
        if not self.protocols:
            raise UserError(f"protocols: none is named; choose of {', '.join(NAMES)}")
        for name, least in (("k", 1), ("bank", 0), ("queries", 0), ("patches", 1), ("seeds", 1), ("epochs", 1)):
            if name not in ("k", "epochs") or getattr(self, name) is not None:
                _whole(name, getattr(self, name), least)
        if self.temperature is not None and not _positive(self.temperature):
            raise UserError(f"temperature: should be a finite number above 0, not {self.temperature!r}")
        if self.layer not in ("backbone", "projection"):
            raise UserError(f"layer: should be 'backbone' or 'projection', not {self.layer!r}")
        if not self.labels or not all(_positive(share) and share <= 100 for share in self.labels):
            raise UserError(f"labels: should be percentages above 0 and up to 100, not {list(self.labels)!r}")
        if self.layer == "projection" and "finetune" in self.protocols:
            raise UserError("layer: finetune trains the backbone; use layer 'backbone', or leave finetune out")
        for override in self.overrides:
            key = str(override).partition("=")[0].strip()
            if not key.startswith("data_source."):
                raise UserError(f"{key}: cannot be set here: the weights are evaluated as they were trained, on other "
                                "data at most; set keys of data_source, as data_source.root=..., and train anew for "
                                "any other")  # fmt: skip

    def epochs_of(self, name: str, labels: float = 100) -> int:
        """Epochs of a protocol that trains."""
        by_labels = EPOCHS[name]
        return self.epochs or by_labels[next(share for share in sorted(by_labels) if share >= labels)]


def several(value: Any) -> tuple[Any, ...]:
    """What was given as one or as several."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def given(protocols: Sequence[str], **options: Any) -> dict[str, Any]:
    """Those of the options in `OF` that are not None; for the others `Wanted` has a default.

    Raises:
        UserError: one is given that none of the protocols has, and would be ignored.
    """
    found = {name: value for name, value in options.items() if value is not None}
    if all(name in NAMES for name in protocols):  # of any other `Wanted` tells
        for name in found:
            if protocols and not set(OF[name]).intersection(protocols):
                raise UserError(f"{name}: is an option of {' and '.join(OF[name])}, and would be ignored by "
                                f"{' and '.join(protocols)}; leave it out, or ask for {OF[name][0]}, too")  # fmt: skip
    return found


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}: should be a whole number of {least} or more, not {value!r}")


def _positive(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    except OverflowError:  # a whole number that no float is as large as
        return False


def percentages(text: str) -> tuple[float, ...]:
    """`"1,10,100"` as numbers, whole ones as int.

    Raises:
        UserError: it is no such list.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"labels: should be percentages such as 1,10,100, not {text!r}") from None
    return tuple(int(share) if share.is_integer() else share for share in found)
