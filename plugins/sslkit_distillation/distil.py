"""What DINO and ReSSL share: the cross-entropy between a teacher's distributions and a student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sslkit.batch import LossTerms
from sslkit.nn import precise


def log_distribution(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logarithms of softmax(logits / temperature) over the last dimension, in float32 or better."""
    return (precise(logits) / temperature).log_softmax(-1)


def distil(
    students: Mapping[int, Tensor], teachers: Mapping[int, Tensor], compared: Sequence[tuple[int, int]]
) -> LossTerms:
    """The mean cross-entropy over pairs of views and over images.

    Args:
        students: Logarithms of distributions, `[B, K]`, by view.
        teachers: The same of the teacher, without gradient.
        compared: Pairs (student's view, teacher's view), at least one; every teacher in equally many.

    Returns:
        The loss, the entropy of the teacher's distributions, and the divergence of the student's from them.
    """
    targets = {view: logs.exp() for view, logs in teachers.items()}
    total = torch.stack([_cross_entropy(targets[teacher], students[student]) for student, teacher in compared]).mean()
    with torch.no_grad():
        entropy = torch.stack([_cross_entropy(targets[view], logs) for view, logs in teachers.items()]).mean()
    return LossTerms(total, {"teacher_entropy": entropy, "kl": total.detach() - entropy})


def _cross_entropy(target: Tensor, logs: Tensor) -> Tensor:
    return -(target * logs).sum(-1).mean()
