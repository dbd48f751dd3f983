"""What was found in a folder, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from sslkit.looking import Look
from sslkit.suggesting.usable import short_sides, what_for


def described(look: Look) -> Mapping[str, str]:
    """What was found, for a table."""
    short = sorted(short_sides(look))
    found = {"images": f"{look.files:,}{what_for(look)}, {look.bytes / 1e6:,.3g} MB"}
    if look.looked_at < look.files + look.test_files:
        found["looked at"] = f"{look.looked_at:,} of them, evenly chosen"
    if short:
        found["shorter sides"] = f"{short[0]} to {short[-1]} px, {round(median(short))} in the median"
    found["kinds"] = ", ".join(f"{n:,} {mode}" for mode, n in sorted(look.modes.items(), key=lambda kind: -kind[1]))
    for name, classes in (("classes", look.classes), ("of the test", look.test_classes)):
        if classes:
            sizes = sorted(classes.values())
            found[name] = f"{len(classes)}, of {sizes[0]} to {sizes[-1]} images, {round(median(sizes))} in the median"
    if not look.classes:
        found["classes"] = "none: quality cannot be measured, health can"
    if look.duplicates:
        found["equal files"] = f"{len(look.duplicates)} groups, as {_group(look.duplicates[0])}; all are kept"
    if look.in_both:
        found["in both sets"] = f"{len(look.in_both)} groups, as {_group(look.in_both[0])}: kNN would find them"
    if look.unreadable:
        first = look.unreadable[0]
        found["unreadable"] = f"{len(look.unreadable)}, as {first['path']} ({first['problem']})"
    return found


def _group(paths: Sequence[str]) -> str:
    return " = ".join(paths[:2])
