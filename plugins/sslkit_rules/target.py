"""Rules about the target: what tau may be, what an update has to move, and what a method without negatives needs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from sslkit.rules import Course, Facts, Rule, Seen
from sslkit_rules.options import listed

NOISE = 1e-9
"""Differences of tau below this are rounding."""

LOW, FAST = 0.5, 0.9
"""Below `LOW`, more of the target is replaced than kept: a share that is probably the other one. Below `FAST` lies
nothing that a paper recommends: BYOL's table 5a goes from 72.5 % at .99 to 68.4 % at .9 and 0.3 % at 0."""

FROZEN_STEPS = 100
"""Steps over which a target has to stand still, so that it is no accident of one update."""
FROZEN_RECORDS = 5
"""Records in a row that say the same in a shorter run."""
ROUNDED = 1e-4
"""Where tau is nearer to 1 than this, float32 may round a sound update to none, as at the end of BYOL's schedule."""


# ---------------------------------------------------------------- tau out of its range


def _at(facts: Facts, step: int) -> str:
    """The update after `step`, in words."""
    total = f" of {facts.tau.steps}" if facts.tau else ""
    epoch = f" (epoch {step / facts.steps_per_epoch:.4g})" if facts.steps_per_epoch else ""
    return f"step {step + 1}{total}{epoch}"


def _above_one(facts: Facts) -> Seen | None:
    tau = facts.tau
    if tau is None or tau.above_one is None:
        return None
    step, value = tau.above_one
    text = f"tau is {value:.9g} at {_at(facts, step)}, above 1"
    text += f", and {tau.end:.9g} at the end" if tau.end > 1 else ""
    # Without the steps of an epoch, a log's records stand for steps, of which there were many more.
    if facts.steps_per_epoch and tau.growth >= 1.05:
        text += f"; the gap between target and online network grows x{tau.growth:.2g} by the end"
    lack = 1 - tau.start
    mirrored = abs(tau.middle - 1) < 0.1 * lack and abs(tau.end - 1 - lack) < 0.3 * lack
    if not mirrored:
        return Seen(text)
    base = round(1 - 2 * lack, 6)
    return Seen(
        text,
        cause="tau ends as far above 1 as it began below: the + 1 inside the bracket of BYOL's formula is missing",
        fix=f"1 - (1 - base) * (cos(pi*k/K) + 1) / 2 with base = {base:g} (target_updater.tau = "
        f'{{ use = "cosine", start = {base:g}, end = 1.0 }}); start again from epoch 0',
    )


def _above_one_recorded(course: Course) -> Seen | None:
    tau, seen = course.facts.tau, _above_one(course.facts)
    if seen is not None and tau is not None and tau.above_one is not None:
        first = tau.above_one[0] + 1
        return replace(seen, step=first) if course.step >= first else None
    steps, _, values = course.points("tau")
    over = [(step, value) for step, value in zip(steps, values, strict=True) if value > 1]
    if not over:
        return None
    # A record's tau holds for the steps since the record before it.
    spans = (b - a for a, b in pairwise(steps))
    grown = math.exp(min(700.0, sum(n * math.log(v) for n, v in zip(spans, values[1:], strict=True) if v > 1)))
    growth = f"; the gap between target and online network has grown about x{grown:.2g}" if grown >= 1.05 else ""
    return Seen(
        f"tau is {over[0][1]:.9g} in the record of step {over[0][0]}, above 1, and {over[-1][1]:.9g} in that of step "
        f"{over[-1][0]}{growth}",
        step=over[0][0],
    )


tau_above_one = Rule(
    what="The target's tau is above 1: the target moves away from the online network.",
    severity="error",
    cause="the schedule's formula, or a step that runs past its length",
    fix="1 - (1 - base) * (cos(pi*k/K) + 1) / 2 with step k no larger than K (target_updater.tau = { use = 'cosine', "
    "start = 0.99, end = 1.0 }); start again from epoch 0",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.3; the forum thread 'Loss is increased after some "
    "epochs', whose formula lacks the + 1",
    key="target_updater.tau",
    before=_above_one,
    during=_above_one_recorded,
    explains=("loss_rise", "target_diverges", "target_not_following", "knn_not_improving", "knn_falling"),
)


def _below_zero(facts: Facts) -> str | None:
    if facts.tau is None or facts.tau.below_zero is None:
        return None
    step, value = facts.tau.below_zero
    return f"tau is {value:.9g} at {_at(facts, step)}, below 0"


def _below_zero_recorded(course: Course) -> str | Seen | None:
    tau, seen = course.facts.tau, _below_zero(course.facts)
    if seen is not None and tau is not None and tau.below_zero is not None:
        first = tau.below_zero[0] + 1
        return Seen(seen, step=first) if course.step >= first else None
    points = course.points("tau")
    for step, value in zip(points.steps, points.values, strict=True):
        if value < 0:
            return Seen(f"tau is {value:.9g} in the record of step {step}, below 0", step=step)
    return None


tau_below_zero = Rule(
    what="The target's tau is below 0: the target overshoots the online network.",
    severity="error",
    cause="the schedule's formula, or its signs",
    fix="keep tau between 0 and 1; BYOL's rises from .99 or more to 1 (target_updater.tau = { use = 'cosine', start = "
    "0.99, end = 1.0 })",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.1: the target decay rate is in [0, 1]",
    key="target_updater.tau",
    before=_below_zero,
    during=_below_zero_recorded,
    explains=("loss_rise", "target_diverges", "knn_not_improving", "knn_falling"),
)


def _falls(facts: Facts) -> str | None:
    tau = facts.tau
    if tau is None or tau.falls is None:
        return None
    step, before, after = tau.falls
    if before - after < NOISE and tau.most - tau.end < NOISE:
        return None
    return f"tau falls from {before:.9g} to {after:.9g} at {_at(facts, step)}, and is {tau.end:.9g} at the end"


def _falls_recorded(course: Course) -> Seen | None:
    tau, seen = course.facts.tau, _falls(course.facts)
    if seen is not None and tau is not None and tau.falls is not None:
        first = tau.falls[0] + 1
        return Seen(seen, step=first) if course.step >= first else None
    steps, _, values = course.points("tau")
    for i in range(1, len(values)):
        if values[i - 1] - values[i] >= NOISE:
            return Seen(
                f"tau falls from {values[i - 1]:.9g} in the record of step {steps[i - 1]} to {values[i]:.9g} in that "
                f"of step {steps[i]}",
                step=steps[i],
            )
    return None


tau_falls = Rule(
    what="The target's tau falls: the target speeds up instead of settling.",
    severity="error",
    cause="a schedule that decays, or a step that runs past its length K, where the cosine turns back",
    fix="let tau rise or stay, and keep step k at most K (target_updater.tau = { use = 'cosine', start = 0.99, end = "
    "1.0 })",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.3; Caron et al. 2021 (DINO, arXiv 2104.14294), "
    "section 3.1: tau rises to 1",
    key="target_updater.tau",
    before=_falls,
    during=_falls_recorded,
)


# ---------------------------------------------------------------- tau too low, too high


def _rises_at_once(facts: Facts, level: float) -> bool:
    """Whether tau is above `level` for most of the run though it starts below.

    An average that warms up from 0 within some hundred steps is sound. Halfway, a cosine from s to 1 is at (1 + s) / 2.
    """
    return facts.tau is not None and facts.tau.middle >= (1 + level) / 2


def _low(facts: Facts) -> Seen | None:
    if facts.tau is None or not 0 <= facts.tau.start < LOW or _rises_at_once(facts, LOW):
        return None
    start = facts.tau.start
    meant = f"if {start:.9g} is meant as the share of the online network, set {1 - start:.9g}; otherwise " * (start > 0)
    return Seen(
        f"tau is {start:.9g} at the start: each update replaces {1 - start:.3g} of the target, which is then nearly "
        "the online network",
        fix=f"{meant}a tau of .99 or more that rises to 1 (target_updater.tau)",
    )


tau_low = Rule(
    what="The target's tau is below 0.5: the target is nearly the online network.",
    severity="warning",
    cause="1 - tau given for tau",
    fix="a tau of .99 or more that rises to 1 (target_updater.tau)",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5a: 0.3 % with tau = 0; He et al. 2020 (MoCo, arXiv "
    "1911.05722), section 4.1: no convergence with m = 0; Caron et al. 2021 (DINO, arXiv 2104.14294), figure 6",
    key="target_updater.tau",
    before=_low,
    explains=(
        "target_equals_online",
        "collapse",
        "dimensional_collapse",
        "cosine_high",
        "knn_not_improving",
        "knn_falling",
    ),
)


def _fast(facts: Facts) -> str | None:
    relies = facts.prevents_collapse is False or any(queue.negatives for queue in facts.queues)
    if not relies or facts.tau is None or not 0 <= facts.tau.start < FAST or _rises_at_once(facts, FAST):
        return None
    if _low(facts):
        return None
    start = facts.tau.start
    return f"tau is {start:.9g} at the start: the target remembers about {1 / (1 - start):.2g} steps"


tau_fast = Rule(
    what="The target's tau is below 0.9: the target follows faster than any paper recommends.",
    severity="warning",
    cause="a tau for very short runs",
    fix="a tau from .9 on for runs of some thousand steps, .99 or .996 for long ones (target_updater.tau)",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5a: 72.5 % with .99, 68.4 % with .9, 0.3 % with 0; He et "
    "al. 2020 (MoCo, arXiv 1911.05722), section 4.1: 59.0 % with .999, 55.2 % with .9",
    key="target_updater.tau",
    before=_fast,
)


def _slow(facts: Facts) -> str | None:
    tau = facts.tau
    # Without the steps of an epoch, a log's records stand for steps, of which there were many more.
    if tau is None or facts.steps_per_epoch is None or tau.falls is not None:
        return None
    if tau.start <= 0 or tau.middle > 1 or tau.least == 1:
        return None
    # A target that began with what another network has learnt, or as a copy of such a one, may well keep it.
    if facts.begins_learnt:
        return None
    # What is left of the random start is the product of all tau. As tau never falls, it is at least this much.
    left = tau.start ** (tau.steps / 2) * tau.middle ** (tau.steps / 2)
    if left <= 1 / math.e:
        return None
    return (
        f"with tau from {tau.start:.9g} to {tau.end:.9g} over {tau.steps} steps, at least {left:.0%} of the target is "
        "still its random start at the end"
    )


tau_slow = Rule(
    what="The target's memory is longer than the whole run: it hardly leaves its random start.",
    severity="warning",
    cause="a tau made for a run of many more steps",
    fix="train longer, or lower tau (target_updater.tau): BYOL's presets have .97, .99 and .996 for 40, 300 and 1000 "
    "epochs, and 1,680 steps on small images take .9",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5a: a target that stays random gives 18.8 % instead of "
    "72.5 %; the limit of one time constant is ours",
    key="target_updater.tau",
    before=_slow,
    explains=("target_not_following", "knn_not_improving"),
)


# ---------------------------------------------------------------- a target that does not move


def _frozen(facts: Facts) -> str | None:
    if facts.tau is None or not facts.tau.least == facts.tau.most == 1:
        return None
    return f"tau is 1 at each of the {facts.tau.steps} steps: no update moves the target"


def _frozen_recorded(course: Course) -> Seen | None:
    """Nothing moved in every record over 100 steps, though tau asks for it and the online network differs."""
    still: list[int] = []
    tau = 1.0
    for record in course.records:
        moved, asked, gap = record.get("target_step"), record.get("tau"), record.get("target_drift")
        if moved is None or asked is None:
            continue
        if moved == 0 and asked < 1 - ROUNDED and gap != 0:
            still.append(int(record.get("step") or 0))
            tau = asked
        else:
            still = []
        if still and (still[-1] - still[0] >= FROZEN_STEPS or len(still) >= FROZEN_RECORDS):
            return Seen(
                f"the newest update moved no parameter of the target in any record from step {still[0]} to "
                f"{still[-1]}, though tau is {tau:.9g}",
                severity="error",
                cause="the target's update is not called, or moves other tensors than the target's",
                fix="call the update once after each optimizer step, on the target's own parameters",
                key="target_updater.use",
                step=still[0],
            )
    return None


target_frozen = Rule(
    what="The target never moves.",
    severity="warning",
    cause="tau = 1",
    fix="a tau below 1 (target_updater.tau); BYOL's rises from .99 or more to 1",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5a: 18.8 % with tau = 1, a random target, against 72.5 %",
    key="target_updater.tau",
    before=_frozen,
    during=_frozen_recorded,
    explains=("tau_not_applied", "target_not_following", "knn_not_improving"),
)


def _apart(facts: Facts) -> str | None:
    if facts.target != "copy" or not facts.target_gap or facts.initialised:  # that run's target was apart, too
        return None
    return f"before the first step the gap is {facts.target_gap:.3g} of the online network's length, where a copy has 0"


target_starts_apart = Rule(
    what="The target does not start as a copy of the online network.",
    severity="warning",
    cause="weights of its own, drawn anew or loaded from elsewhere",
    fix="copy the online network's parameters into the target before the first step",
    source="He et al. 2020 (MoCo, arXiv 1911.05722), algorithm 1; Grill et al. 2020 (BYOL, arXiv 2006.07733)",
    key="target_updater.use",
    before=_apart,
    explains=("target_not_following",),
)


def _unmoved(facts: Facts) -> str | None:
    if not facts.unmoved:
        return None
    count = f"{len(facts.unmoved)} parameter{'s' * (len(facts.unmoved) > 1)}"
    return f"an update leaves {count} of the target where they were: {listed(facts.unmoved)}"


ema_skips_parameters = Rule(
    what="The target's update leaves parameters out, which stay as they were drawn.",
    severity="error",
    cause="a filter by name or kind, or networks whose parameters are not in one order",
    fix="move every parameter of the target: drop the filter in the target updater",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), equation 1; lightning-bolts issue 440",
    key="target_updater.use",
    before=_unmoved,
    explains=("tau_not_applied", "target_not_following", "knn_not_improving"),
)


# ---------------------------------------------------------------- parts that keep collapse away


def _no_predictor(facts: Facts) -> str | None:
    if facts.prevents_collapse is not False or facts.predictor_learns is not False:
        return None
    # DINO takes no predictions either: a slow teacher of its own and centring do without a predictor.
    if not facts.wants_predictions and facts.target not in ("online", "none"):
        return None
    return "the loss does not prevent a constant output, and the predictor has no parameters"


predictor_missing = Rule(
    what="No predictor learns, and nothing else keeps the outputs from becoming constant.",
    severity="warning",
    cause="a predictor that was left out or is the identity",
    fix="put an MLP behind the online projector as a predictor (predictor.use = 'mlp')",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5b; Chen & He 2021 (SimSiam, arXiv 2011.10566), table 1: "
    "known to collapse without one, whatever the target",
    key="predictor",
    before=_no_predictor,
    explains=("collapse", "dimensional_collapse", "cosine_high", "knn_not_improving", "knn_falling"),
)


def _no_average(facts: Facts) -> str | None:
    if facts.prevents_collapse is not False or facts.target != "online" or facts.projector_normalised is not False:
        return None
    return "the target is the online network itself, and the projector's output is not normalised"


ema_missing = Rule(
    what="There is no moving average, and the heads are made for one.",
    severity="warning",
    cause="BYOL's moving average was taken away while its heads and its optimizer stayed",
    fix="make the target a moving average of the online network (target_updater.use = 'ema'), or take SimSiam's "
    "parts: BatchNorm on the projector's output (projector.output_norm = 'batch_no_affine'), a predictor that narrows, "
    "a constant rate for it (see the recipe simsiam_cifar10)",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5a: 0.3 % with tau = 0; Chen & He 2021 (SimSiam, arXiv "
    "2011.10566), tables 1 to 3; simsiam issue 7",
    key="target_updater.use",
    before=_no_average,
    explains=("collapse", "dimensional_collapse", "cosine_high", "knn_not_improving", "knn_falling"),
)
