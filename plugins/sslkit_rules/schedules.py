"""Rules about schedules: their values, and whether they are as long as the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sslkit.rules import Facts, Rule, Seen, Trajectory
from sslkit_rules.options import number, option

SETTLED = 0.25
"""Share of the run at whose beginning a schedule has to have come to its end, to be called too short for it. MoCo's
staircase stands still for the last fifth (He et al. 2020, section 4)."""
NOTHING = 0.005
"""Share of its peak below which a learning rate trains nothing worth naming: two drops to a tenth end above it."""
ALL_BUT = 1e-4
"""Share of the way from its start to 1 that tau may lack when it has come to its end: a tau that was meant to stop
short of 1, such as MoCo's from .99 to .999, moves the target to the last step."""
STEEPENS = 1.75
"""How many times steeper a curve has to be in its second half than in its first to look cut off. For a whole cosine it
is 1, with a warm-up of up to three tenths of the run less than 1.7; for one that is cut off at half its way 2.4."""
UNFINISHED = 0.1
"""Share of its way that a cut-off schedule still has to go."""
STAIR = 0.02
"""Share of the run that the last value may take: a staircase, such as one value an epoch, has no slope to go by."""
FEW = 20
"""Runs with fewer steps have no shape to speak of."""


def _moving(facts: Facts) -> Iterator[tuple[str, str, Trajectory]]:
    """Name, key and course of each scheduled number, equal learning rates once."""
    if facts.tau is not None:
        yield "tau", "target_updater.tau", facts.tau
    told: list[Trajectory] = []
    for part, rate in (facts.lr or {}).items():
        if rate not in told:
            told.append(rate)
            own = option(facts, f"optimizer.groups.{part}.lr") is not None
            key = f"optimizer.groups.{part}.lr" if own else "optimizer.lr"
            yield "lr" if len(told) == 1 else f"lr of the {part}", key, rate


# ---------------------------------------------------------------- values


def _values(facts: Facts) -> str | None:
    told = [
        f"{name} {curve.start:.6g} at step 0, {curve.middle:.6g} at {curve.steps // 2}, {curve.end:.6g} at "
        f"{curve.steps - 1}, the last" + (f" (at most {curve.most:.6g}, at {curve.most_at})" * _peaks(curve))
        for name, _, curve in _moving(facts)
    ]
    return "; ".join(told) or None


def _peaks(curve: Trajectory) -> bool:
    return curve.most > max(curve.start, curve.middle, curve.end)


schedule_values = Rule(
    what="These are the schedules, by optimizer steps of the whole run.",
    severity="info",
    fix="count optimizer steps, not micro-batches or the steps of one process",
    source="solo-learn issue 248: schedules that were too long by the number of processes",
    before=_values,
)


# ---------------------------------------------------------------- length


def _early(facts: Facts) -> Seen | None:
    for name, key, curve in _moving(facts):
        rest = (curve.steps - curve.settled) / curve.steps
        if curve.steps < FEW or not curve.settled or rest < SETTLED:
            continue
        if name == "tau":
            ended, means = 0 <= 1 - curve.end <= ALL_BUT * (1 - curve.start), "the target hardly moves"
        else:
            # A staircase may stay on its last step for long, if that step is not nothing.
            rate = option(facts, key)
            stairs = isinstance(rate, Mapping) and rate.get("use") in ("step", "piecewise")
            least = 0.0 if stairs else NOTHING * curve.most
            ended, means = curve.end <= least and curve.end < curve.most, "nothing is learnt any more"
        if ended:
            return Seen(
                f"{name} is {curve.end:.6g} from step {curve.settled} of {curve.steps} on: for the last {rest:.0%} of "
                f"the run {means}{_counted(facts, curve)}",
                key=key,
            )
    return None


def _counted(facts: Facts, curve: Trajectory) -> str:
    """What was counted in place of optimizer steps, if the schedule is too short by just that factor."""
    ratio = curve.steps / (curve.settled + 1)
    for what, times in (("micro-batches", number(facts, "train.accumulate")), ("processes", float(facts.processes))):
        if times and times > 1 and abs(ratio / times - 1) < 0.02:
            return f"; the schedule is {times:g} times too short, and there are {times:g} {what}"
    return ""


schedule_ends_early = Rule(
    what="A schedule ends long before the run.",
    severity="warning",
    cause="micro-batches, processes or another run's steps counted as this run's optimizer steps",
    fix="give the schedule the run's optimizer steps; sslkit's own schedules without unit = 'steps' or 'epochs' do so",
    source="solo-learn issue 248; Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.3: K is the number of steps",
    before=_early,
    explains=("knn_not_improving",),
)


def _unfinished(facts: Facts) -> Seen | None:
    for name, key, curve in _moving(facts):
        half = curve.steps / 2
        rate = option(facts, key)
        if curve.steps < FEW or (isinstance(rate, Mapping) and rate.get("use") in ("step", "piecewise")):
            continue
        if (curve.steps - curve.settled) / curve.steps > STAIR:
            continue
        if name == "tau":
            first, second = curve.middle - curve.start, curve.end - curve.middle
            left = (1 - curve.end) / (1 - curve.start) if curve.start < 1 else 0.0
            until = "1"
        else:
            before = half - curve.most_at
            first = (curve.most - curve.middle) * half / before if before > 0 else 0.0
            second = curve.middle - curve.end
            left = curve.end / curve.most if curve.most > 0 else 0.0
            until = "0"
        if first > 0 and second >= STEEPENS * first and left > UNFINISHED:
            return Seen(
                f"{name} is {curve.end:.6g} at the last of {curve.steps} steps and still on its way to {until}, "
                f"{second / first:.2g} times as steep in the second half as in the first",
                key=key,
            )
    return None


schedule_unfinished = Rule(
    what="A schedule looks cut off: the run ends where it is steepest.",
    severity="warning",
    cause="a schedule made for more steps than the run has, as when it counts the images or the processes of a longer "
    "one",
    fix="give the schedule the run's own number of optimizer steps",
    source="solo-learn issue 248; Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.3: tau is 1 at the end",
    before=_unfinished,
    explains=("knn_not_improving",),
)


def _long_warmup(facts: Facts) -> Seen | None:
    for name, key, curve in _moving(facts):
        # Of a rate that goes up and down again and again, the highest place says nothing.
        rises = curve.most > 2 * curve.start and (curve.falls is None or curve.falls[0] > curve.most_at)
        if name != "tau" and curve.steps >= FEW and rises and curve.most_at > curve.steps / 2:
            return Seen(
                f"{name} rises from {curve.start:.6g} to {curve.most:.6g} until step {curve.most_at} of {curve.steps}",
                key=key,
            )
    return None


warmup_long = Rule(
    what="The learning rate's warm-up takes more than half of the run.",
    severity="warning",
    cause="a warm-up in epochs of a longer run",
    fix="a tenth of the run or less (optimizer.lr = { use = 'warmup_cosine', peak = ..., warmup_epochs = ... })",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.3, and Chen et al. 2020 (SimCLR, arXiv 2002.05709), "
    "section 2.2: 10 epochs of 100 to 1000; the limit of a half is ours",
    before=_long_warmup,
    explains=("knn_not_improving",),
)
