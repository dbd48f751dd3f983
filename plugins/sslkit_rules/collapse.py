"""Rules about collapse: outputs that become alike, at once or dimension by dimension, wholly or in part."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from sslkit.rules import Course, Points, Rule, Seen
from sslkit_rules.curves import far, grew, lasted, now, quality, since

SPREAD, NONE = 0.5, 0.1
"""std * sqrt(d): below the first outputs are drawn together, below the second they are one point. Sound runs end above
.62; contrastive ones dip to .36, SupCon's to .14, and rise again."""
DENSE = -0.2
"""Uniformity above which all pairs are near one another: 0 is a single point, -1 and less sound."""
ENDURES = 0.3
"""Share of a run for which it has to last, or STEPS, where the loss itself works against it."""
STEPS = 1000
LOW_RANK, FLAT_RANK = 0.1, 0.03
"""Effective rank as a share of min(N, d). Sound runs here have .12 and more."""
KEPT = 0.5
"""How much of its highest rank a sound run keeps: .56 and more here."""
ALIKE, SOON = 0.99, 3.0
"""The cosine that BYOL and SimSiam come nowhere near (.93 to .94 at the end), and the epochs that it has to come in."""
APART = -0.1
"""Cosine between the views below which three records in a row are no chance: unrelated outputs have 0."""

# ---------------------------------------------------------------- complete collapse


def _collapsed(course: Course) -> Seen | None:
    spread = course.points("std_sqrt_d")
    if len(spread.values) < 3 or course.points("teacher_entropy").values:  # DINO's outputs are centred afterwards
        return None
    first = since(spread, [value < SPREAD for value in spread.values])
    if first is None or now(spread.values) >= SPREAD:
        return None
    if course.facts.prevents_collapse is not False:
        rises = spread.values[-1] > 1.1 * min(spread.values)
        if rises or not lasted(course, first, ENDURES, STEPS):
            return None
    value, before = now(spread.values), max(spread.values)
    dense = course.last("uniformity")
    knn = quality(course, "knn_top1")
    useless = knn is not None and knn.lost and far(course, 0.4, 10)
    gone = (value < NONE or (dense is not None and dense > DENSE) or useless) and not grew(course)
    return Seen(
        f"std * sqrt(d) of the projections is {value:.3g}, from {before:.3g} at its best, and below {SPREAD:g} since "
        f"step {first}; 1 is spread evenly, 0 a single point",
        "error" if gone else "warning",
        step=first,
    )


collapse = Rule(
    what="The outputs collapse: all images get nearly the same one.",
    severity="warning",
    cause="a stop-gradient or predictor that is missing, a target that is the online network, a rate too high, pairs "
    "of different images, gradients that add up from step to step, or a loss without a term that keeps outputs apart",
    fix="look at stop-gradient, predictor and target first; then lower the learning rate (optimizer.lr) and lengthen "
    "its warm-up",
    source="Chen & He 2021 (SimSiam, arXiv 2011.10566), section 4.1 and figure 2; the limits are calibrated",
    during=_collapsed,
    explains=(
        "dimensional_collapse", "cosine_high", "knn_not_improving", "knn_falling", "loss_not_falling",
    ),
)  # fmt: skip


# ---------------------------------------------------------------- few dimensions


PLAIN_FIX = (
    "see that gradients are set to zero before each step and that both views are of one image; then weaken the views, "
    "lower the learning rate (optimizer.lr), or slow the target (target_updater.tau)"
)


def _few_dimensions(course: Course) -> Seen | None:
    found = [
        seen
        for name, what in (("effective", "features"), ("projection", "projections"))
        if (seen := _rank(course, course.points(f"{name}_rank_share"), what))
    ]
    return min(found, key=lambda seen: seen.severity == "warning", default=None)


def _rank(course: Course, rank: Points, what: str) -> Seen | None:
    if len(rank.values) < 2:  # one measurement tells no direction, and random networks may start low
        return None
    last, top = rank.values[-1], max(rank.values)
    low = last < LOW_RANK and last < 1.1 * rank.values[0]
    if not low and (last >= KEPT * top or (last >= KEPT * KEPT * top and grew(course))):
        return None
    text = f"the effective rank of the {what} is {last:.3g} of min(N, d)"
    if last < KEPT * top:
        text += f", and was {top:.3g} at step {rank.steps[rank.values.index(top)]}"
    gone = last < FLAT_RANK or last < KEPT * KEPT * top
    seen = Seen(text, "error" if gone and not grew(course) else "warning", step=rank.steps[-1])
    # Of a method without a term that decorrelates, there is no weight to raise.
    return replace(seen, fix=PLAIN_FIX) if course.facts.prevents_collapse is False else seen


dimensional_collapse = Rule(
    what="Dimensions collapse: the outputs lie in few directions.",
    severity="warning",
    cause="a loss without a term that decorrelates, views so strong that their noise outweighs the image, or a rate "
    "too high",
    fix="raise the weight of the covariance or redundancy term if the loss has one, take a larger batch, or weaken the "
    "views",
    source="Jing et al. 2022 (arXiv 2110.09348), sections 3 to 5; Hua et al. 2021 (arXiv 2105.00470); the limits are "
    "calibrated",
    during=_few_dimensions,
    explains=("knn_not_improving", "knn_falling", "cosine_high"),
)


# ---------------------------------------------------------------- alike too soon


def _alike(course: Course) -> Seen | None:
    steps, epochs, values = cosines(course)
    enough = 2 if len(values) < 20 else 3
    first = next((i for i in range(len(values) - enough + 1) if min(values[i : i + enough]) > ALIKE), None)
    # Whoever gets there late, or with features that have become better, has learnt it.
    if first is None or epochs[first] > SOON or grew(course):
        return None
    return Seen(
        f"the cosine between the views is above {ALIKE:g} from step {steps[first]} on (epoch {epochs[first]:.3g}), and "
        f"at most {max(values):.4g}; sound runs come to .93 or .94 at their end",
        step=steps[first],
    )


def _apart(course: Course) -> Seen | None:
    steps, _, values = course.points("cosine")
    if len(values) < 5 or max(values[-3:]) > APART or min(values[-3:]) > values[0]:
        return None
    return Seen(f"the cosine between the views is {values[-1]:.3f} at step {steps[-1]}, and was {values[0]:.3f} at "
                f"step {steps[0]}")  # fmt: skip


views_pushed_apart = Rule(
    what="The views of an image are pushed apart.",
    severity="error",
    cause="the loss has its sign wrong, or pairs views of different images as if they were of one",
    fix="see that the loss is lowest where the views of an image agree",
    source="ours: every method here makes the views of an image alike; sound runs never fall below 0 for long",
    key="loss.use",
    during=_apart,
    explains=("knn_not_improving", "knn_falling", "loss_not_falling"),
)


def cosines(course: Course) -> Points:
    """The mean cosine between the views, measured or worked out from BYOL's loss."""
    measured = course.points("cosine")
    scale = course.facts.byol_scale
    if measured.values or not scale:
        return measured
    steps, epochs, losses = course.points("loss")
    return Points(steps, epochs, [1 - loss / (4 * scale) for loss in losses])


cosine_high = Rule(
    what="The views are matched almost perfectly, too soon.",
    severity="warning",
    cause="views that are the same or keep what gives the image away, collapse, or a rate too high",
    fix="look at the views (sslkit report shows them), then at std_sqrt_d and kNN",
    source="simsiam issue 40: .93 to .94 at the end of a sound run; the forum thread 'Loss is increased after some "
    "epochs': .997 in its second epoch",
    key="view_generator.use",
    during=_alike,
)


# ---------------------------------------------------------------- prototypes


def _prototypes(course: Course) -> Seen | None:
    kl = course.points("kl")
    if len(kl.values) < 3:
        return None
    entropy = course.last("teacher_entropy")
    entropy = course.last("code_entropy") if entropy is None else entropy
    used = course.points("prototypes_used").values
    first = since(kl, [value < 0.02 * max(1.0, kl.values[0]) for value in kl.values])
    few = len(used) >= 3 and now(used) < max(2.0, 0.05 * max(used))
    if not few and (first is None or not lasted(course, first, 0.1, 500)):
        return None
    text = f"predictions differ from their targets by {now(kl.values):.3g} nats (kl), {kl.values[0]:.3g} at first"
    text += f"; {now(used):.0f} prototypes are used of {max(used):.0f} at most" if used else ""
    if entropy is not None:
        shape = "one dominates" if entropy < 0.1 else "all get the same"
        text += f"; the targets' entropy is {entropy:.3g} nats: {shape}"
    return Seen(text, "error" if far(course, 0.5, 5) and not grew(course) else "warning", step=first)


prototype_collapse = Rule(
    what="The targets do not depend on the image: one prototype dominates, or all share alike.",
    severity="error",
    cause="DINO: without centring one dominates, without sharpening all share alike; SwAV: an epsilon too high",
    fix="DINO: a centre's momentum of .9 and a teacher's temperature of .04 (loss.centre_momentum, "
    "loss.teacher_temperature); SwAV: an epsilon of .03 or .02 (loss.epsilon), or prototypes that are frozen for "
    "longer (loss.freeze_prototypes_epochs)",
    source="Caron et al. 2021 (DINO, arXiv 2104.14294), section 5.3 and figure 7; swav issue 62",
    key="loss",
    during=_prototypes,
    explains=("loss_at_chance", "knn_not_improving", "knn_falling", "collapse", "dimensional_collapse", "cosine_high",
              "no_gradient", "loss_not_falling"),
)  # fmt: skip


# ---------------------------------------------------------------- partial collapse


def _partly(course: Course) -> Seen | None:
    """The loss falls at once to below half of what it was, and with it what the features are worth."""
    if not far(course, 0.1, 2):
        return None
    steps, _, losses = course.points("loss")
    signs = []
    for name, what, kept in (
        ("effective_rank_share", "the rank", 0.75),
        ("projection_rank_share", "the projections' rank", KEPT),
    ):
        rank = course.points(name)
        if len(rank.values) > 2 and rank.values[-1] < kept * max(rank.values):
            signs.append((max(rank.values), rank.values[-1], what, rank.steps[rank.values.index(max(rank.values))]))
    for key, what in (("knn_top1", "kNN"), ("probe_top1", "the probe")):
        found = quality(course, key)
        if found is not None and found.last < found.best - max(found.noise, 0.1 * found.best):
            signs.append((found.best, found.last, what, found.steps[found.values.index(found.best)]))
    drop = _drop(losses)
    if drop is None or not signs:
        return None
    at, before, after = drop
    best, last, what, when = signs[-1]
    if steps[at] < when:
        return None
    return Seen(
        f"the loss falls from {before:.4g} to {after:.4g} near step {steps[at]}, and {what} from {best:.3g} at step "
        f"{when} to {last:.3g}",
        step=steps[at],
    )


def _drop(losses: list[float], width: int = 4) -> tuple[int, float, float] | None:
    """Where the medians of `width` losses before and after differ most, if the loss falls by more than half there."""
    if len(losses) < 4 * width or min(losses) < 0:
        return None
    best: tuple[int, float, float] | None = None
    for i in range(2 * width, len(losses) - width + 1):
        before, after = median(losses[i - width : i]), median(losses[i : i + width])
        if before > 0 and after < 0.5 * before and (best is None or after / before < best[2] / best[1]):
            best = (i, before, after)
    # A loss that has only ever fallen learns; the sudden fall of a partial collapse comes after a rise or a rest.
    if best is None or best[1] < 0.8 * median(losses[best[0] - 2 * width : best[0] - width]):
        return None
    return best


partial_collapse = Rule(
    what="Part of the representation collapses: the loss drops at once, and the features get worse.",
    severity="warning",
    cause="a rate too high for a target that follows too fast or too slowly",
    fix="go back to a checkpoint from before the drop, lower the learning rate (optimizer.lr), and look at tau "
    "(target_updater.tau)",
    source="vjepa2 issue 74; Li et al. 2022 (arXiv 2209.15007): partial collapse in SimSiam, and what its rank tells",
    key="optimizer.lr",
    during=_partly,
    explains=("knn_falling", "knn_not_improving"),
)
