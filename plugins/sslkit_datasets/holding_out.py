"""A share of a set that is not trained on: a function of the images' bytes, so that it stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from sslkit.errors import UserError


def held_out(digests: Sequence[bytes], labels: Tensor | None, share: float) -> tuple[list[int], list[int]]:
    """Part a set into images to train on and images to test on.

    Within each class the images are put into an order that their digests draw, and the first ones are held out: the
    share, rounded, but at least one and never all. Images with the same digest go the way of the first of them, so
    that none is on both sides.

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
        left = max(1, round(share * sum(map(len, members.values()))))
        drawn = sorted(members, key=lambda digest: hashlib.sha256(b"hold_out" + digest).digest())
        for digest in drawn[:-1]:
            if left <= 0:
                break
            chosen.update(members[digest])
            left -= len(members[digest])
    if not chosen:
        raise UserError(
            "data_source.hold_out: no class has two images that differ, so none can be held out; leave hold_out out"
        )
    return [i for i in range(len(digests)) if i not in chosen], sorted(chosen)
