"""A share of a set that is not trained on: each image's bytes say on which side it is, so that it stays there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from sslkit.errors import UserError


def held_out(digests: Sequence[bytes], labels: Tensor | None, share: float) -> tuple[list[int], list[int]]:
    """Part a set into images to train on and images to test on.

    Each digest draws a number between 0 and 1, and below the share an image is held out. So the share is kept on
    average, and images that are added or removed move none of the others, with one exception: of a class that would
    be all on one side, the image with the smallest number is held out, or that with the largest is trained on. Images
    with the same digest are on the same side.

    Args:
        digests: one per image.
        labels: int64 `[N]`; None takes all images as one class.
        share: more than 0, less than 1.

    Returns:
        Positions to train on and positions held out, both ascending.

    Raises:
        UserError: no class has two different images.
    """
    classes: dict[int, dict[bytes, list[int]]] = {}
    groups: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        group = groups.setdefault(digest, [])
        if not group:  # the same bytes in two classes count in the first
            classes.setdefault(0 if labels is None else int(labels[i]), {})[digest] = group
        group.append(i)
    chosen: set[int] = set()
    for members in classes.values():
        drawn = sorted(members, key=_drawn)
        below = sum(_drawn(digest) < share for digest in drawn)
        for digest in drawn[: min(max(1, below), len(drawn) - 1)]:
            chosen.update(members[digest])
    if not chosen:
        raise UserError(
            "data_source.hold_out: no class has two images that differ, so none can be held out; leave hold_out out"
        )
    return [i for i in range(len(digests)) if i not in chosen], sorted(chosen)


def facts(share: float | None) -> dict[str, object]:
    """What enters fingerprints."""
    return {} if share is None else {"held_out_below": share}


def _drawn(digest: bytes) -> float:
    return int.from_bytes(hashlib.sha256(b"hold_out" + digest).digest()[:6], "big") / 2**48
