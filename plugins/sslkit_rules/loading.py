"""Rules about how data reaches the device."""

from __future__ import annotations

from statistics import median

from sslkit.rules import Course, Rule, Seen

WORTH_TELLING, GRAVE = 0.1, 0.4
"""Shares of the time: a tenth is what better loading could win at most, and four tenths nearly double a run."""
NEWEST, FEWEST = 20, 3
"""Records that are looked at: the newest, so that a slow beginning is forgotten, and not fewer than a median needs."""


def _waits(course: Course) -> Seen | None:
    waits = course.points("data_wait").values
    if len(waits) < FEWEST:
        return None
    share = median(waits[-NEWEST:])
    if share <= WORTH_TELLING:
        return None
    seen = f"{share:.0%} of the time is spent waiting for images (median of {len(waits[-NEWEST:])} records)"
    return Seen(seen, "warning" if share > GRAVE else "info")


data_wait = Rule(
    what="The training waits for its images.",
    severity="warning",
    cause="decoding and cutting images takes longer than a step, or the disk is slow",
    fix="give it more cores (data_source.workers, where the source has it), store smaller files, or crop from squares "
    "that are kept in memory (data_source.crops_from = 'square', where that is an option)",
    source="the share of the time in which the loop waited for data, as the run recorded it; a step cannot begin "
    "without its batch",
    key="data_source",
    during=_waits,
)
