"""Which of the images that were looked at can be used, and for what."""

from __future__ import annotations

from collections import Counter

from sslkit.looking import Look


def broken_shares(look: Look) -> tuple[float, float]:
    """Shares of the training and of the test images that cannot be read, for each set is measured by itself."""
    total = look.files + look.test_files
    tests = sum(not str(bad["path"]).startswith("train/") for bad in look.unreadable) if look.test_files else 0
    tests_seen = max(tests, round(look.looked_at * look.test_files / max(1, total)))
    trains = len(look.unreadable) - tests
    return trains / max(1, trains, look.looked_at - tests_seen), tests / max(1, tests_seen)


def holdable(look: Look) -> bool:
    """Whether a class has two readable images that differ, so that one can be held out. Copies count once, in the
    first class that has them."""
    gone = {str(bad["path"]) for bad in look.unreadable}.union(*(group[1:] for group in look.duplicates))
    lost = Counter(_class_of(path) for path in gone)
    return any(count - lost[name] > 1 for name, count in (look.classes or {}).items())


def holds_out(look: Look) -> bool:
    """Whether a share of the images is to be measured on, since none were put aside for that."""
    return len(look.classes or {}) > 1 and not look.test_files and holdable(look)


def short_sides(look: Look) -> list[int]:
    """Of each image that was looked at, in pixels."""
    return [min(sides) for sides in zip(look.heights, look.widths, strict=True)]


def what_for(look: Look) -> str:
    """To go on with after the number of images."""
    if holds_out(look):
        return ", of which a tenth is held out"
    return " to train on" + (f", {look.test_files:,} to test on" if look.test_files else "")


def _class_of(path: str) -> str:
    """The folder of a training image; a folder called train is the set itself, wherever there is one."""
    first, _, rest = path.partition("/")
    return rest.partition("/")[0] if first == "train" else first
