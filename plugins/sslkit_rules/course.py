"""Rules about the curves of loss and gradient: what rises, what stands still, what is no number."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median

from sslkit.rules import Course, Points, Rule, Seen, Severity
from sslkit_rules.curves import far, grew, lasted, now, since, smooth, window

RISE, STEEP = 1.5, 10.0
"""How many times its least a later loss may be: up to the first it is common, from the second on it is not."""
RANKED: Mapping[bool, tuple[Severity, Severity]] = {False: ("error", "warning"), True: ("warning", "info")}
"""How grave a steep and a lesser rise are, without and with features that get better."""
CHANCE = 0.01
"""How near to what knowing nothing costs the loss has to be, in the loss's own unit, or RELATIVE of it."""
RELATIVE = 0.01
ROUGH, LATE_RECORDS = 0.15, 16
"""How much of its height the loss changes by from record to record; sound runs here have .02 to .08."""
SPIKE, WINDOW = 10.0, 25
"""A gradient norm above so many times the median of so many records before it."""


# ---------------------------------------------------------------- no numbers


def _not_finite(course: Course) -> Seen | None:
    if course.status.get("reason") == "not_finite":
        at = course.status.get("step")
        step = at if isinstance(at, int) else None
        return Seen(f"the run stopped: the loss or its gradient was not finite at step {at}", step=step)
    for number, record in enumerate(course.records):
        wrong = [
            key
            for key, value in record.items()
            if (key in ("loss", "cosine", "std_sqrt_d") or key.startswith("grad_norm"))
            and (value is None or (isinstance(value, float) and not math.isfinite(value)))
        ]
        if wrong:
            step = record.get("step")
            at = step if isinstance(step, int) else number
            return Seen(f"{', '.join(wrong[:4])} of step {at} {'is' if len(wrong) == 1 else 'are'} not finite", step=at)
    return None


not_finite = Rule(
    what="The loss or its gradient is not a number.",
    severity="error",
    cause="a rate too high, half precision in the loss, a division by the norm of nothing, or Sinkhorn with an epsilon "
    "that overflows",
    fix="lower the learning rate or lengthen its warm-up (optimizer.lr), clip gradients (train.clip_grad_norm); "
    "float32 tells whether half precision is to blame (train.precision = 'fp32'); SwAV: a larger epsilon "
    "(loss.epsilon)",
    source="swav issue 67 and dinov2 issue 143; lightly issue 1259: NaN from normalising in fp16",
    key="optimizer.lr",
    during=_not_finite,
    explains=("gradient_spike", "loss_rise", "knn_falling", "knn_not_improving", "collapse", "dimensional_collapse"),
)


# ---------------------------------------------------------------- the loss rises


def least_possible(course: Course) -> float | None:
    """The loss of views that agree in everything, as far as it is known: heights are counted from there."""
    agreement, least = course.facts.agreement, min(course.points("loss").values, default=0.0)
    if agreement is not None and agreement[0] <= least:
        return agreement[0]
    if least >= 0:
        return 0.0
    return -1.0 if least >= -1 else None  # SimSiam's mean of -cos


def heights(course: Course) -> list[float] | None:
    """Losses above the least that the loss can be, smoothed; None if that least is not known."""
    floor = least_possible(course)
    if floor is None:
        return None
    above = [loss - floor for loss in smooth(course.points("loss").values)]
    tiny = 1e-6 * max(above, default=0.0)
    return [max(value, tiny) for value in above]


def _rises(course: Course) -> Seen | None:
    points, above, floor = course.points("loss"), heights(course), least_possible(course)
    if above is None or floor is None or len(above) < 4 or max(above) <= 0:
        return None
    low = high = bottom = 0
    for i, value in enumerate(above):
        if value < above[bottom]:
            bottom = i
        if value * above[low] > above[high] * above[bottom]:
            low, high = bottom, i
    times = above[high] / above[low]
    learns = grew(course)
    # A loss that only rises from its first record on is loss_not_falling's.
    if not low or times < 1.1 or (times < RISE and not learns) or (times < STEEP and not far(course, 0.2, 2)):
        return None
    graver, milder = RANKED[learns]
    severity = graver if times >= STEEP else milder
    over = min(above[-1], points.values[-1] - floor) < above[low]
    if over and times < STEEP:
        return None  # a bump on the way down
    text, what = _risen(points, (low, above[low] + floor), (high, above[high] + floor), times, over)
    if learns:
        return Seen(
            f"{text}, while kNN or the probe grows: common for losses with a moving target",
            severity,
            cause="a target that has moved on, or negatives that have become harder",
            fix="none",
            step=points.steps[high],
            what=what,
        )
    tau = course.facts.tau
    if tau is not None and tau.above_one is not None:
        crossed = tau.above_one[0]
        matches = points.steps[low] - course.step / 8 <= crossed <= points.steps[high]
        text += f"; tau passes 1 at step {crossed + 1}" + (": the onset matches" if matches else "")
    if times >= STEEP and above[-1] < above[high] / 2 and course.facts.prevents_collapse is not True:
        text += "; the fall afterwards is probably a target that hardly moves any more, not recovery"
    return Seen(text, severity, step=points.steps[high], what=what)


def _risen(
    points: Points, low: tuple[int, float], high: tuple[int, float], times: float, over: bool
) -> tuple[str, str]:
    """A rise from one record to another in words, and a headline as strong as it was."""
    place, width = _place(points), window(points.values)
    medians = f" (medians of {width} records)" if width > 1 else ""
    falls, rises = ("fell", "rose") if over else ("falls", "rises")
    text = (
        f"the loss{medians} {falls} to {low[1]:.4g} at {place(low[0])} and {rises} to {high[1]:.4g} at "
        f"{place(high[0])}, {times:.{0 if times >= STEEP else 1}f} times its least"
    )
    if over:
        return (
            f"{text} so far; it is {points.values[-1]:.4g} now",
            "The loss rose far above its least, and is below it again.",
        )
    return text, f"The loss rises {'far ' if times >= STEEP else ''}above its least."


def _place(points: Points) -> Callable[[int], str]:
    """How to say where a record is: by its epoch, where there are epochs."""
    if points.epochs and points.epochs[-1] > 0:
        return lambda i: f"epoch {points.epochs[i]:.3g}"
    return lambda i: f"step {points.steps[i]}"


loss_rise = Rule(
    what="The loss rises above its least.",
    severity="warning",
    cause="a target that moves away (tau above 1), a learning rate too high, or a target that is left behind",
    fix="look at tau over the whole run, then lower the learning rate (optimizer.lr); measure kNN, which tells "
    "whether features suffer",
    source="byol-pytorch issues 3 and 39; bytedance/ibot issue 31 and yaox12/BYOL-PyTorch issue 14: a rise that is "
    "sound, while kNN climbs",
    key="optimizer.lr",
    during=_rises,
)


# ---------------------------------------------------------------- the loss stands still


def _at_chance(course: Course) -> Seen | None:
    blank, points = course.facts.blank_loss, course.points("loss")
    if blank is None or len(points.values) < 5:
        return None
    near = max(CHANCE, RELATIVE * abs(blank))
    first = since(points, [abs(loss - blank) < near for loss in smooth(points.values)])
    if first is None or not lasted(course, first, 0.25, 1000) or grew(course):
        return None
    return Seen(
        f"the loss is {now(points.values):.5g}, and within {near:.2g} of {blank:.5g} since step {first}: what outputs "
        "that say nothing of the image cost",
        "error" if lasted(course, first, 0.5, 2000) else "warning",
        step=first,
    )


loss_at_chance = Rule(
    what="The loss stays where knowing nothing puts it.",
    severity="error",
    cause="pairs that are not of one image, a temperature that flattens everything, codes that are all alike (ln of "
    "the prototypes), or a learning rate of nothing",
    fix="see that row i of each branch is of image i; then the temperature (loss.temperature), for SwAV epsilon "
    "(loss.epsilon), for DINO centre and temperatures, then the learning rate (optimizer.lr)",
    source="simclr issue 30, dinov2 issue 407, swav issue 62: losses pinned at ln M",
    key="loss",
    during=_at_chance,
    explains=("knn_not_improving", "loss_not_falling", "collapse"),
)


def _does_not_fall(course: Course) -> Seen | None:
    points, above = course.points("loss"), heights(course)
    if above is None or len(above) < 6 or not far(course, 0.5, 5) or grew(course):
        return None
    first = max(above[0], sum(above[:3]) / 3)
    last = now(above)
    if last < 0.97 * first:
        return None
    return Seen(
        f"the loss was {points.values[0]:.4g} at step {points.steps[0]} and is {now(points.values):.4g} at step "
        f"{points.steps[-1]}",
        "error" if last > 1.5 * first else "warning",
    )


loss_not_falling = Rule(
    what="The loss is no lower than at the start.",
    severity="warning",
    cause="gradients that do not reach the weights, a sign, pairs of different images, or a learning rate far off",
    fix="see that grad_norm is not 0 and that the optimizer has the networks' own parameters; then try a learning "
    "rate (optimizer.lr) a tenth and ten times as high",
    source="sslkit's own benchmark of planted faults (docs/explanation/doctor.md)",
    key="optimizer.lr",
    during=_does_not_fall,
    explains=("knn_not_improving",),
)


# ---------------------------------------------------------------- gradients


def _no_gradient(course: Course) -> Seen | None:
    losses = course.points("loss")
    # A log of another program has no status, and its losses are rounded: equal ones say nothing.
    if course.status and len(losses.values) >= 5 and len(set(losses.values[-5:])) == 1:
        return Seen(f"the loss is {losses.values[-1]:.7g} in each of the newest 5 records", step=losses.steps[-5])
    parts = {key.removeprefix("grad_norm_") for key in _recorded(course) if key.startswith("grad_norm_")}
    for key in ("grad_norm", *(f"grad_norm_{part}" for part in sorted(parts))):
        points = course.points(key)
        if len(points.values) < 3 or any(value > 1e-12 for value in points.values[-3:]):
            continue
        if key == "grad_norm_loss" and not far(course, 0.5, 5):  # prototypes may be kept still at first
            continue
        first = since(points, [value <= 1e-12 for value in points.values])
        part = key.removeprefix("grad_norm").removeprefix("_") or "whole network"
        return Seen(f"the gradient of the {part} is 0 from step {first} on", step=first)
    if course.facts.optimizer and course.facts.trained_parts and course.status and not course.points("grad_norm").steps:
        return Seen(f"no gradient was recorded in {len(losses.values)} records") if len(losses.values) >= 3 else None
    missing = _missing(course, parts)
    if missing and len(course.points("grad_norm").values) >= 2:
        return Seen(f"no gradient reaches the {missing}: {', '.join(sorted(parts))} have one", key=missing)
    return None


def _recorded(course: Course) -> set[str]:
    """What the newest records of the loop hold; those of kNN and of the rank have no gradients."""
    newest: set[str] = set()
    found = 0
    for record in reversed(course.records):
        if "loss" in record or "grad_norm" in record:
            newest |= record.keys()
            found += 1
        if found == 3:
            break
    return newest


def _missing(course: Course, parts: set[str]) -> str | None:
    """A part that has parameters to train and is not among those with gradients."""
    trained = course.facts.trained_parts
    if trained is not None:
        return next((part for part in trained if part not in parts and part != "loss"), None) if parts else None
    if "backbone" not in parts and {"projector", "predictor", "loss"} & parts:
        return "backbone"
    learns = course.facts.predictor_learns and course.facts.wants_predictions
    return "predictor" if learns and "predictor" not in parts and {"backbone", "projector"} & parts else None


no_gradient = Rule(
    what="A part of the network gets no gradient.",
    severity="error",
    cause="a detach, a no_grad or a frozen parameter on the way from the loss",
    fix="detach targets only; see that requires_grad is on for all that is to learn",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.1: the stop-gradient is on the target alone",
    during=_no_gradient,
    explains=("knn_not_improving", "loss_at_chance", "loss_not_falling", "target_equals_online"),
)


def _spikes(course: Course) -> Seen | None:
    steps, _, norms = course.points("grad_norm")
    window: list[float] = []
    found: list[tuple[int, float]] = []
    for i, (step, norm) in enumerate(zip(steps, norms, strict=True)):
        if len(window) == WINDOW:
            middle = window[WINDOW // 2]
            if middle > 0 and norm > SPIKE * middle:
                found.append((step, norm / middle))
            del window[bisect_left(window, norms[i - WINDOW])]
        insort(window, norm)
    if not found:
        return None
    step, times = max(found, key=lambda spike: spike[1])
    often = len(found) >= max(3, 0.02 * len(norms)) and not grew(course)
    return Seen(
        f"{len(found)} of {len(norms)} records have a gradient norm above {SPIKE:g} times the median of those before; "
        f"{times:.3g} times at step {step}",
        "warning" if often else "info",
        step=found[0][0],
    )


gradient_spike = Rule(
    what="The gradient jumps.",
    severity="info",
    cause="a learning rate at the edge of what is stable, or single batches out of the ordinary",
    fix="clip gradients at a few times their usual norm (train.clip_grad_norm), or take a lower learning rate or a "
    "longer warm-up (optimizer.lr)",
    source="Chen et al. 2021 (MoCo v3, arXiv 2104.02057), section 4.1: dips of accuracy at spikes of the gradient",
    key="train.clip_grad_norm",
    during=_spikes,
)


# ---------------------------------------------------------------- oscillation


SETTLED = 100
"""Optimizer steps before which losses jump in sound runs, too."""


def _oscillates(course: Course) -> Seen | None:
    points, floor = course.points("loss"), least_possible(course)
    late = points.values[len(points.values) // 3 :]
    if floor is None or len(late) < LATE_RECORDS or grew(course):
        return None
    if course.facts.steps_per_epoch is not None and course.step < SETTLED:  # a log's steps may be epochs
        return None
    level = median(late) - floor
    jump = median(abs(b - a) for a, b in pairwise(late))
    if level <= 0 or jump < ROUGH * level:
        return None
    return Seen(
        f"from one record to the next the loss changes by {jump / level:.0%} of its height, in the median since step "
        f"{points.steps[len(points.values) // 3]}; sound runs have 2 to 7 %"
    )


rate_oscillation = Rule(
    what="The loss oscillates.",
    severity="warning",
    cause="a learning rate too high for the optimizer: Adam at a rate made for LARS or SGD, or SGD for a larger batch",
    fix="a learning rate (optimizer.lr) a third or a tenth as high, with a warm-up; for Adam between 3e-4 and 1e-3",
    source="byol-pytorch issues 39 and 44; the limit is calibrated",
    key="optimizer.lr",
    during=_oscillates,
)
