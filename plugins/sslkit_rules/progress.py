"""Rules about quality: whether features get better than a random network's, and stay so."""

from __future__ import annotations

from sslkit.rules import Course, Rule, Seen
from sslkit_rules.collapse import SPREAD, cosines
from sslkit_rules.curves import Quality, far, now, quality

SHARE, EPOCHS = 1 / 3, 10.0
"""How much of a run has to be over before kNN has to be above the random network's: it often dips at first."""
LATE = 0.75
"""Share of a run after which it will not come any more."""
LOST = 0.8
"""How much of its best a sound run keeps."""

ENOUGH = 300
"""Optimizer steps below which features that are no better are no error: there was hardly any training."""


AT_THE_END = 0.95
"""Share of a run after which a gain that may be chance is told."""


def _no_better(course: Course) -> Seen | None:
    if course.facts.begins_learnt:
        return None  # the first figure is another run's, and to keep it may be all that is wanted
    knn = quality(course, "knn_top1")
    if knn is None or knn.floor is None:
        return _flat(course, knn or quality(course))
    if len(knn.values) < 4 or not far(course, SHARE, EPOCHS, knn.key):
        return None
    # Sound runs of the quickstart are at their floor for their first 84 steps; a log's steps may be epochs.
    long = course.facts.steps_per_epoch is None or knn.steps[-1] >= ENOUGH
    said = f"kNN is {knn.last:.3f} at step {knn.steps[-1]}; the random network's, at step 0, is {knn.floor:.3f}"
    if max(knn.values[-2:]) > knn.floor + knn.noise / 2:
        hardly = long and knn.last <= knn.floor + knn.noise and far(course, AT_THE_END, 5 * EPOCHS, knn.key)
        return Seen(f"{said}: a gain of less than two standard errors", "warning") if hardly else None
    alike, spread = cosines(course).values, course.points("std_sqrt_d").values
    shortcut = bool(alike) and now(alike) > 0.9 and (not spread or now(spread) > SPREAD)
    return Seen(
        said,
        # A probe gets better on features that stay as they are, so it is no witness.
        "error" if far(course, LATE, 2 * EPOCHS, knn.key) and long else "warning",
        cause="views that leave a shortcut, such as colours: the loss is low, and nothing of use is learnt"
        if shortcut
        else None,
        fix="stronger changes of colour and crop in both views" if shortcut else None,
        key="view_generator" if shortcut else None,
    )


def _flat(course: Course, found: Quality | None) -> Seen | None:
    """Of a log without the random network's figure: accuracy that does not rise from the beginning on."""
    if found is None or len(found.values) < 5 or not far(course, SHARE, EPOCHS, found.key):
        return None
    if found.steps[0] > 0.2 * found.steps[-1] or max(found.values[-2:]) > found.values[0] + found.noise:
        return None
    return Seen(f"{found.said}: it has not risen, and nothing says what a random network has", "warning")


knn_not_improving = Rule(
    what="The features are no better than a random network's.",
    severity="warning",
    cause="views that leave a shortcut, a learning rate far off, or a collapse",
    fix="look at the views first, then try a learning rate (optimizer.lr) a third and three times as high; see what "
    "else is told here",
    source="Wu et al. 2018 (arXiv 1805.01978), section 3.4: weighted kNN; beside it the floor that every run begins at",
    key="optimizer.lr",
    during=_no_better,
)


def _falls(course: Course) -> Seen | None:
    for key, name in (("knn_top1", "kNN"), ("probe_top1", "the probe")):
        found = quality(course, key)
        if found is None or len(found.values) < 3:
            continue
        start = found.values[0] if found.floor is None else found.floor
        if found.steps[-1] == found.steps[-2]:
            continue
        if found.best <= start + found.noise:
            lost = _below_its_first(course, found)
        else:
            lost = None if _kept(found) else found.last <= start + found.noise / 2
        if lost is None:
            continue
        when = found.steps[found.values.index(found.best)]
        return Seen(
            f"{name} was {found.best:.3f} at step {when} and is {found.last:.3f} at step {found.steps[-1]}",
            "error" if lost else "warning",
            step=when,
        )
    return None


def _below_its_first(course: Course, found: Quality) -> bool | None:
    """Without a floor: whether a fifth of the first figure is lost; None if the newest are not clearly below it.

    It may dip at first, and one record alone may be chance: both of the newest have to be below, late enough.
    """
    if found.floor is not None or not far(course, SHARE, EPOCHS, found.key):
        return None
    newest = max(found.values[-2:])
    return newest < LOST * found.values[0] if newest < found.values[0] - 2 * found.noise else None


def _kept(found: Quality) -> bool:
    return found.last >= LOST * found.best or found.last >= found.best - 1.5 * found.noise


knn_falling = Rule(
    what="The features get worse.",
    severity="warning",
    cause="a rate too high, a target that moves away, or a collapse that has begun",
    fix="stop, go back to the best checkpoint, and lower the learning rate (optimizer.lr) or look at tau "
    "(target_updater.tau)",
    source="vjepa2 issue 74: a rise of the loss, a sudden drop, and features that get worse",
    key="optimizer.lr",
    during=_falls,
)
