"""From a network and a protocol to a figure: every choice on training images, the test images asked once."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sslkit import features, randomness
from sslkit.errors import UserError
from sslkit.evaluation import finetune, linear
from sslkit.evaluation.extracting import features_of
from sslkit.evaluation.material import TEST_SHARE, Material, Network, Split, some
from sslkit.evaluation.protocols import Protocol, Wanted
from sslkit.opened_run import knn_of
from sslkit.recipe import Recipe

BATCH = 512
"""Features that `linear_sgd` takes at a time."""
NOISE = 1e-3
"""A gradient above this, where L-BFGS stopped, is told."""


@dataclass(frozen=True)
class Score:
    """What one network reaches by one protocol."""

    protocol: Protocol
    network: str
    """`trained`, `random`, `initialised` or `pixels`."""
    seeds: tuple[float, ...]
    """Top-1 accuracy for each seed; a protocol that draws nothing has one."""
    chosen: tuple[dict[str, float], ...]
    """For each seed, what was chosen by held-out training images, and their accuracy then."""
    seconds: float
    """That it took, features included where they were not kept from before."""

    @property
    def top1(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.seeds)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None of one."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None


def protocols_of(material: Material, wanted: Wanted) -> list[Protocol]:
    """The protocols that were asked for, in their order, each with all its options."""
    found = []
    number, queries = len(material.train.where), len(material.test.where)
    test = f"{TEST_SHARE:.0%} of train, which the encoder has seen" if material.held_out else "test"
    common = {
        "precision": "bf16" if material.bf16 else "fp32",
        "test_set": test,
        "queries": queries,
        "of": material.tests,
    }
    bank = len(some(material.train, wanted.bank).where)
    k, temperature = knn_options(material.recipe, wanted)
    if k >= bank and any(name in ("knn", "patches") for name in wanted.protocols):
        material.say(f"kNN: k = {k} of a bank of {bank} images lets all of them vote; make k smaller")
    knn = {"k": min(k, bank), "temperature": temperature, "bank": bank, "distance": "cosine"}
    fitted = {"train": number, "standardised": True, "held_out": linear.HELD_OUT}
    swept = {"solver": "L-BFGS", "C": list(linear.STRENGTHS)}
    drawn = {"seeds": wanted.seeds} if wanted.seeds > 1 else {}
    for name in dict.fromkeys(wanted.protocols):
        if name == "knn":
            found.append(Protocol(name, {**knn, "layer": wanted.layer, **common}))
        elif name == "linear":
            found.append(Protocol(name, {"layer": wanted.layer, **swept, **fitted, **drawn, **common}))
        elif name == "linear_sgd":
            epochs = {"epochs": wanted.epochs_of(name), "batch": min(BATCH, number), "lr": list(linear.RATES)}
            found.append(Protocol(name, {"layer": wanted.layer, **epochs, **fitted, **drawn, **common}))
        elif name == "patches":
            views = {"patches": wanted.patches, "layer": wanted.layer}
            found.append(Protocol("patches_knn", {**views, **knn, **common}))
            found.append(Protocol("patches_linear", {**views, **swept, **fitted, **drawn, **common}))
        else:
            for share in dict.fromkeys(int(s) if float(s).is_integer() else s for s in wanted.labels):
                images = len(finetune.some_labels(material.train, share, 0).where)
                found.append(Protocol(name, {
                    "labels": share, "images": images, "epochs": wanted.epochs_of(name, share),
                    "batch": min(finetune.BATCH, images), "lr": list(finetune.RATES), "held_out": finetune.HELD_OUT,
                    "crops": list(finetune.CROPS["scale"]), "flip": finetune.CROPS["flip"], **drawn, **common,
                }))  # fmt: skip
    return found


def knn_options(recipe: Recipe, wanted: Wanted) -> tuple[int, float]:
    """k and temperature: as asked for, else those of the run's own kNN."""
    k, temperature = knn_of(recipe)
    return wanted.k or k, wanted.temperature or temperature


def score(material: Material, network: Network, protocol: Protocol, wanted: Wanted) -> Score | None:
    """A network's figure; None where the protocol says nothing of it, as fine-tuning of raw pixels."""
    if network.name == "pixels" and (protocol.name == "finetune" or protocol.name.startswith("patches")):
        return None
    begun, top1, choices = time.perf_counter(), [], []
    draws_nothing = protocol.name.endswith("knn")
    for seed in range(1 if draws_nothing else wanted.seeds):
        predicted, chosen = _predicted(material, network, protocol, wanted, seed)
        who = f"{network.name} {protocol.title} seed {seed}"
        top1.append(material.exam.score(who, predicted))
        choices.append(chosen)
    return Score(protocol, network.name, tuple(top1), tuple(choices), time.perf_counter() - begun)


def _predicted(
    material: Material, network: Network, protocol: Protocol, wanted: Wanted, seed: int
) -> tuple[Tensor, dict[str, float]]:
    if protocol.name == "finetune":
        predict, chosen = finetune.finetuned(
            material, network, protocol.options["labels"], protocol.options["epochs"], seed
        )
        return predict(), chosen
    patches = protocol.options.get("patches", 0)
    by_knn = protocol.name.endswith("knn")
    train: Split = some(material.train, wanted.bank) if by_knn else material.train
    rows, queries = (features_of(material, network, images, patches) for images in (train, material.test))
    labels = train.labels.to(rows.device)
    if by_knn:
        k, temperature = protocol.options["k"], protocol.options["temperature"]
        return features.knn_predict(rows, labels, queries, material.classes, k=k, temperature=temperature), {}
    standardised = linear.Standardised(rows)
    rows, queries = standardised(rows), standardised(queries)
    if protocol.name == "linear_sgd":
        classifier, chosen = _by_sgd(rows, labels, material.classes, protocol.options, seed)
    else:
        classifier, chosen = _by_lbfgs(rows, labels, material.classes, seed)
        if chosen["gradient"] > NOISE:
            material.say(f"{network.name} {protocol.title}: L-BFGS stopped at a gradient of {chosen['gradient']:.1e}; "
                         "the optimum may be a little better")  # fmt: skip
    return classifier.predict(queries), chosen


def _by_lbfgs(rows: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[linear.Linear, dict[str, float]]:
    held, rest = _split(labels, seed)
    problem, start, tried = linear.LogisticRegression(rows[rest], labels[rest], classes), None, []
    for strength in linear.STRENGTHS:  # from the most regularised on, where the optimum is near zero
        start = problem.fit(strength, start).linear
        tried.append((_right(start, rows[held], labels[held]), strength, start))
    best, strength, start = max(tried, key=lambda one: one[0])  # of equals the most regularised
    fitted = linear.LogisticRegression(rows, labels, classes).fit(strength, start)
    return fitted.linear, {"C": strength, "held_out": best, "gradient": fitted.gradient}


def _by_sgd(
    rows: Tensor, labels: Tensor, classes: int, options: dict[str, Any], seed: int
) -> tuple[linear.Linear, dict[str, float]]:
    held, rest = _split(labels, seed)
    how = {"epochs": options["epochs"], "batch": options["batch"], "seed": seed}
    tried = linear.fit_sgd(rows[rest], labels[rest], classes, rates=linear.RATES, **how)
    right = [_right(one, rows[held], labels[held]) for one in tried]
    best = max(range(len(right)), key=right.__getitem__)  # of equals the smallest rate
    [classifier] = linear.fit_sgd(rows, labels, classes, rates=[linear.RATES[best]], **how)
    return classifier, {"lr": linear.RATES[best], "held_out": right[best]}


def _split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    held, rest = linear.stratified(labels, linear.HELD_OUT, randomness.generator(seed, "linear/held_out"))
    if not len(held):
        raise UserError("linear: every class has one labelled training image, so none can be held out to choose by; "
                        "use knn, or label more")  # fmt: skip
    return held.to(labels.device), rest.to(labels.device)


def _right(classifier: linear.Linear, rows: Tensor, labels: Tensor) -> float:
    return float((classifier.predict(rows) == labels).float().mean())
