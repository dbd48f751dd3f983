"""Rules about what the target does while a run goes: whether it follows as tau says, and whether it stays near."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from sslkit.rules import Course, Points, Rule, Seen
from sslkit_rules.curves import far, grew, now, number, since

EQUAL = 1e-6
"""Drift that float32 cannot tell from none."""
AWAY, LARGER = 0.4, 1.1
"""Drift and norm ratio of a target that runs away. Sound runs stay below .2 and 1.03."""
TELLS = 3e-4
"""1 - tau below which float32 no longer shows what tau was."""
OFF = 0.1
"""How far the share that was moved may be from 1 - tau, as a share of it; .01 in sound runs."""
ONCE = 0.02
"""How far the target's updates may be from the steps, as a share of them."""
SUDDEN = 0.6
"""What a drift cannot fall below within one record, if the learning rate does not."""
JUMP = 4.0
"""What it cannot rise above; runs here with other faults rise by 2.3 at most."""


def _equal(course: Course) -> Seen | None:
    drift = course.points("target_drift")
    after = [(step, value) for step, value in zip(drift.steps, drift.values, strict=True) if step > 1]
    if len(after) < 3 or any(value > EQUAL for _, value in after[-3:]):
        return None
    if not any(course.points("lr").values or [1.0]):
        return None
    first = since(drift, [value <= EQUAL for value in drift.values])
    stands = course.points("target_step").values[-3:]
    loss = course.points("loss").values
    still = bool(stands) and not any(stands)
    text = f"the drift between online and target network is {drift.values[-1]:.3g} from step {first} on"
    if not still:
        return Seen(text, step=first)
    return Seen(
        f"{text}, and no update has moved either of them; the loss is {loss[-1]:.4g}" if loss else text,
        cause="neither network moves: the optimizer's step is not taken, or its gradients are nothing",
        fix="see that the optimizer has the online network's own parameters and that its step is called",
        key="optimizer.use",
        step=first,
    )


target_equals_online = Rule(
    what="The target is the online network: nothing is ahead of anything.",
    severity="error",
    cause="tau = 0, weights that both networks share, or a copy in place of an average",
    fix="make the target a deep copy once, and move it by a tau of .99 that rises to 1 (target_updater.tau)",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5a: 0.3 % with tau = 0",
    key="target_updater.tau",
    during=_equal,
    explains=(
        "collapse",
        "cosine_high",
        "dimensional_collapse",
        "loss_not_falling",
        "knn_not_improving",
        "knn_falling",
    ),
)


# ---------------------------------------------------------------- away


def _diverges(course: Course) -> Seen | None:
    ratio, drift = course.points("target_norm_ratio"), course.points("target_drift")
    if len(ratio.values) < 3 or now(ratio.values) <= LARGER:
        return None
    first = since(ratio, [value > LARGER for value in ratio.values])
    gap = f", and the drift {now(drift.values):.3g}" if drift.values else ""
    grows = ratio.values[-1] >= 0.98 * max(ratio.values)
    return Seen(
        f"the target's parameters are {now(ratio.values):.3g} times as long as the online network's{gap}",
        "error" if grows and not grew(course) else "warning",
        step=first,
    )


target_diverges = Rule(
    what="The target runs away from the online network.",
    severity="error",
    cause="a tau above 1, an update with the wrong sign, or a weight decay that shrinks the online network alone",
    fix="keep tau between 0 and 1, and target = tau * target + (1 - tau) * online",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), equation 1; the limits are calibrated: sound runs have .95 to "
    "1.03",
    key="target_updater.tau",
    during=_diverges,
    explains=("loss_rise", "target_not_following", "knn_falling", "knn_not_improving"),
)


def _left_behind(course: Course) -> Seen | None:
    drift = course.points("target_drift")
    if len(drift.values) < 5 or not far(course, 0.3, 3) or now(drift.values) < AWAY:
        return None
    if now(drift.values) < 0.95 * max(drift.values):  # it comes nearer
        return None
    half = drift.values[len(drift.values) // 2]
    return Seen(
        f"the drift is {now(drift.values):.3g} and was {half:.3g} halfway: it has no end; sound runs have .03 to .3",
        "error" if now(drift.values) > 2 * AWAY and not grew(course) else "warning",
        step=since(drift, [value >= AWAY for value in drift.values]),
    )


target_not_following = Rule(
    what="The target is left behind: the gap to the online network grows without end.",
    severity="warning",
    cause="a tau too near to 1 for the run's length, an update that is not made, or a learning rate too high",
    fix="lower tau (target_updater.tau) for short runs (.97 for 40 epochs, .99 for 300), or lower the learning rate "
    "(optimizer.lr)",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 5a and appendix F; the limit is calibrated",
    key="target_updater.tau",
    during=_left_behind,
)


# ---------------------------------------------------------------- as tau says


def _not_applied(course: Course) -> Seen | None:
    seen: list[tuple[int, float, float]] = []
    for record in course.records:
        tau, measured = number(record, "tau"), number(record, "tau_measured")
        if tau is None or measured is None or record.get("target_step") == 0 or not 0 <= tau < 1 - TELLS:
            continue
        off = abs((1 - measured) / (1 - tau) - 1) > OFF
        seen = [*seen, (int(number(record, "step") or 0), tau, measured)] if off else []
        if len(seen) == 3:
            break
    if len(seen) < 3:
        return None
    step, tau, measured = seen[-1]
    times = median((1 - m) / (1 - t) for _, t, m in seen)
    return Seen(
        f"tau is {tau:.6g} at step {step}, and the target moved as with {measured:.6g}: {times:.3g} times as far",
        cause=_why(course, tau, measured, times),
        step=seen[0][0],
    )


def _why(course: Course, tau: float, measured: float, times: float) -> str:
    if abs(measured) < 0.02 < tau:
        return "the target is copied, not averaged"
    if abs(measured - (1 - tau)) < 0.05 * tau:
        return "tau and 1 - tau changed places"
    if abs((1 - measured) - (1 - tau * tau)) < 0.02 * (1 - tau):
        return "the update is made twice in each step"
    if times > 1.5:
        return f"the update is made about {times:.2g} times in each step, as for each micro-batch"
    if times < 1:
        return "the update leaves parameters out, or moves them less than tau says"
    return "another tau than the schedule's is used"


tau_not_applied = Rule(
    what="The target does not move as tau says.",
    severity="error",
    cause="an update that is called more than once in a step, leaves parameters out, or uses another tau",
    fix="call the update once after each optimizer step, for every parameter: target = tau * target + "
    "(1 - tau) * online",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), equation 1; lightly-train issue 968: an average moved for each "
    "micro-batch; lightning-bolts issue 440: one that skips parameters",
    key="target_updater.use",
    during=_not_applied,
    explains=("target_equals_online", "target_not_following", "loss_not_falling", "knn_not_improving"),
)


def _miscounted(course: Course) -> Seen | None:
    updates = course.points("target_updates")
    for step, count in zip(updates.steps, updates.values, strict=True):
        if step > 1 and abs(count - step) > max(2.0, ONCE * step):
            return Seen(
                f"{count:.0f} updates of the target in {step} steps",
                cause="an update for each micro-batch" if count > step else "updates that are left out",
                step=step,
            )
    return None


updates_not_steps = Rule(
    what="The target is not updated once in each step.",
    severity="error",
    cause="an update for each micro-batch or each process",
    fix="update once after each optimizer step, whatever the accumulation",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), algorithm 1; lightly-train issue 968",
    key="train.accumulate",
    during=_miscounted,
    explains=("tau_not_applied",),
)


# ---------------------------------------------------------------- going on


def _reset(course: Course) -> Seen | None:
    resumed = course.status.get("resumed_at")
    known = [at for at in resumed if isinstance(at, int)] if isinstance(resumed, list) else []
    text = _tau_restarts(course.points("tau")) or _drift_restarts(course)
    if text is None:
        return None
    step, words = text
    near = [at for at in known if at < step]
    return Seen(f"{words}{f'; the run went on from step {near[-1]}' if near else ''}", step=step)


def _tau_restarts(tau: Points) -> tuple[int, str] | None:
    """Tau back at its start, after half of a way or more in small steps."""
    if len(tau.values) < 4:
        return None
    start, top = tau.values[0], tau.values[0]
    for (_, before), (step, after) in pairwise(zip(tau.steps, tau.values, strict=True)):
        top = max(top, before)
        if top > start and top <= 1 and after < before and after - start < 0.1 * (before - start) and after >= start:
            return (
                step,
                f"tau falls from {before:.6g} back to {after:.6g} at step {step}, near the {start:.6g} it began at",
            )
    return None


def _drift_restarts(course: Course) -> tuple[int, str] | None:
    """The gap gone from one record to the next, though neither tau nor the learning rate fell; or far wider."""
    rows = [
        (int(number(r, "step") or 0), drift, number(r, "lr"), number(r, "tau"))
        for r in course.records
        if (drift := number(r, "target_drift")) is not None
    ]
    for (_, first, *_), (_, before, lr, tau), (step, after, lr_after, tau_after) in zip(
        rows, rows[1:], rows[2:], strict=False
    ):
        steady = before > 100 * EQUAL and after > EQUAL and abs(first - before) < 0.25 * before
        same_rate = lr is None or lr_after is None or lr_after > 0.8 * lr
        same_tau = tau is None or tau_after is None or tau_after >= tau - 1e-9
        if steady and same_rate and same_tau and after < SUDDEN * before:
            return step, f"the drift falls from {before:.3g} to {after:.3g} at step {step}, and nothing else changed"
        if steady and after > JUMP * before and (lr is None or lr_after is None or lr_after < 2 * lr):
            return step, f"the drift jumps from {before:.3g} to {after:.3g} at step {step}: one network is another one"
    return None


resume_reset = Rule(
    what="The target, the online network or the schedules began anew in the middle of the run.",
    severity="error",
    cause="a checkpoint without the target, the weights or the step, from which the run went on",
    fix="save and restore the target, the optimizer and the step; go back to a checkpoint from before",
    source="EAT issue 13, and solo-learn's users, whose resumed runs began with another average",
    key="target_updater",
    during=_reset,
    explains=("tau_falls", "partial_collapse", "knn_falling", "loss_rise"),
)
