"""Which metrics of a run are drawn together, and what a reader is told of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sslkit.charts import Chart, Curve, Level, Mark
from sslkit.recorded import PROTOCOL, Run
from sslkit.rules import RANKS, Finding, Severity


@dataclass(frozen=True)
class Group:
    """Metrics that one chart shows: `metrics` maps a key, or a pattern of keys, to what its curve is called."""

    title: str
    meaning: str
    metrics: Mapping[str, str]
    log: bool = False
    levels: tuple[Level, ...] = ()


GROUPS = (
    Group(
        "Accuracy of features",
        "Share of test images that kNN and a linear probe get right. Dotted: before any training.",
        {"knn_top1": "kNN", "probe_top1": "probe", "probe_train_top1": "probe, training views"},
    ),
    Group(
        "Loss",
        "What is minimised. It cannot rank runs: an easier task has a lower one.",
        {"loss": "loss"},
    ),
    Group(
        "Cosine",
        "Mean cosine between predictions and targets, or what stands in their place.",
        {"cosine": "cosine"},
    ),
    Group(
        "Effective rank",
        "Share of the possible directions in use. Below .1, or half of what it was: dimensional collapse.",
        {
            "effective_rank_share": "features",
            "rankme_share": "RankMe",
            "projection_rank_share": "projections",
        },
    ),
    Group(
        "Spread of projections (std √d)",
        "1: spread over the whole sphere. Towards 0: complete collapse.",
        {"std_sqrt_d": "spread"},
    ),
    Group(
        "Alignment and uniformity",
        "How far views of an image are apart, 0 at best, and how evenly images spread, -4 at best. It takes both.",
        {"alignment": "alignment", "uniformity": "uniformity"},
    ),
    Group(
        "tau",
        "How much of the target remains in an update. Above 1 the target runs away from the online network.",
        {"tau": "as scheduled", "tau_measured": "as the target moved"},
    ),
    Group(
        "Learning rate",
        "By part of the model, where parts differ.",
        {"lr": "lr", r"lr_(.+)": r"\1"},
    ),
    Group(
        "Distance of the target",
        "Of the parameters of target and online network, relative to the online network's norm.",
        {"target_drift": "drift ‖ξ-θ‖/‖θ‖", "target_norm_ratio": "norms ‖ξ‖/‖θ‖"},
    ),
    Group(
        "Step of the target",
        "How far the newest update moved the target, relative to its norm. 0: it is frozen.",
        {"target_step": "step"},
        log=True,
    ),
    Group(
        "Gradient norm",
        "Before clipping. A sudden jump goes before trouble.",
        {"grad_norm": "all", r"grad_norm_(.+)": r"\1"},
        log=True,
    ),
    Group(
        "Difference between two views",
        "|v1 - v2| of normalised pixels. 0: the views are identical, and there is nothing to learn.",
        {"view_difference": "mean", "view_difference_max": "largest"},
    ),
    Group(
        "Options of the loss",
        "As their schedules have them.",
        {r"loss\.(.+)": r"\1"},
    ),
    Group(
        "alpha-ReQ",
        "How fast the features' eigenvalues fall: 1 is thought best. Means little where the rank is low.",
        {"alpha_req": "slope"},
    ),
    Group(
        "Speed",
        "Images trained on per second.",
        {"images_per_second": "images/s"},
    ),
    Group(
        "Waiting for data",
        "Share of the time.",
        {"data_wait": "share"},
    ),
)  # fmt: skip
"""The charts of a report, in this order."""

UNDRAWN = {
    "step", "epoch", "target_updates", "effective_rank", "rankme", "projection_rank", *PROTOCOL, "lidar",
    "lidar_images", "lidar_views",
}  # fmt: skip
"""Keys that need no chart: they count, are drawn as a share, say how something was measured, or stand only once."""


def charts(run: Run, findings: Sequence[Finding] = ()) -> list[Chart]:
    """A chart for each group of which anything was recorded, with a line for each finding that has a step.

    What no group knows is drawn as well: terms of the loss together, other metrics each for itself.
    """
    run = replace(run, records=[_with_shares(record) if "rankme" in record else record for record in run.records])
    keys = list(dict.fromkeys(key for record in run.records for key in record))
    marks, drawn, used = marked(run, findings), [], set()
    for group in GROUPS:
        names = {key: name for key in keys if key not in used and (name := _named(key, group.metrics))}
        used |= set(names)
        order = list(group.metrics.values())
        names = dict(sorted(names.items(), key=lambda item: order.index(item[1]) if item[1] in order else len(order)))
        drawn.append((replace(group, levels=(*group.levels, *_floors(run, names.keys()))), names))
    left = [key for key in keys if key not in used | UNDRAWN]
    terms = {key: key for record in run.records if "loss" in record for key in left if key in record}
    drawn.insert(2, (Group("Terms of the loss", "What the loss is made of, as it reports them.", {}), terms))
    drawn += [(Group(key, "Recorded by an observer.", {}), {key: key}) for key in left if key not in terms]
    return [
        Chart(group.title, group.meaning, curves, marks=marks, levels=group.levels, log=group.log and _positive(curves))
        for group, names in drawn
        if (
            curves := [curve for key, name in names.items() if _has_values(curve := replace(run.curve(key), name=name))]
        )
    ]


def numbered(findings: Iterable[Finding]) -> dict[str, Finding]:
    """Findings by the short name that the page gives them: E1, W2, I3."""
    return {f"{finding.severity[0].upper()}{number}": finding for number, finding in enumerate(findings, start=1)}


def marked(run: Run, findings: Sequence[Finding]) -> list[Mark]:
    """A mark at each step at which something was found; of marks too near to be read apart, the first has the words."""
    found = sorted((f.step, name, f.severity) for name, f in numbered(findings).items() if f.step is not None)
    near = max((record["step"] for record in run.records), default=0) / 15
    groups: list[list[tuple[int, str, Severity]]] = []
    for one in found:
        if groups and one[0] - groups[-1][0][0] <= near:
            groups[-1].append(one)
        else:
            groups.append([one])
    marks = []
    for group in groups:
        names = sorted((name for _, name, _ in group), key=lambda name: int(name[1:]))  # the gravest come first
        words = ", ".join(names) if len(names) < 4 else f"{names[0]} + {len(names) - 1}"
        for step in dict.fromkeys(step for step, _, _ in group):
            gravest = min((severity for at, _, severity in group if at == step), key=RANKS.__getitem__)
            marks.append(Mark(step, epoch_of(run, step), words, gravest))
            words = ""
    return marks


def epoch_of(run: Run, step: int) -> float:
    """The epoch of a step, of which there may be no record."""
    for record in reversed(run.records):
        if record["step"] and "epoch" in record:
            return float(step * record["epoch"] / record["step"])
    return float(step)


def _with_shares(record: Mapping[str, object]) -> dict[str, object]:
    """RankMe as a share too: the record says of how many dimensions by its other rank."""
    known = dict(record)
    rank, share, rankme = (record.get(key) for key in ("effective_rank", "effective_rank_share", "rankme"))
    if isinstance(rank, float) and isinstance(share, float) and isinstance(rankme, float) and rank > 0:
        known["rankme_share"] = rankme * share / rank
    return known


def _named(key: str, metrics: Mapping[str, str]) -> str:
    """What a key's curve is called, empty if it is none of these metrics."""
    for pattern, name in metrics.items():
        if pattern == key:
            return name
        if "(" in pattern and (found := re.fullmatch(pattern, key)):
            return found.expand(name)
    return ""


def _floors(run: Run, keys: Collection[str]) -> list[Level]:
    """The kNN accuracy of the network before training, where it was measured. A probe's first is no such floor: its own
    weights are untrained then, and it is at chance whatever the features are."""
    drawn = [key for key in keys if run.points(key)]
    begun = [(number, *run.points(key)[0]) for number, key in enumerate(drawn) if key == "knn_top1"]
    return [Level(value, number) for number, step, value in begun if step == 0]


def _has_values(curve: Curve) -> bool:
    return any(value is not None for value in curve.values)


def _positive(curves: Iterable[Curve]) -> bool:
    return all(value is None or value > 0 for curve in curves for value in curve.values)
