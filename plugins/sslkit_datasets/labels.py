"""Labels as they are written -> class numbers: integers stay what they are, names are numbered in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sslkit.errors import UserError
from sslkit_datasets.images import shown

Written = int | str | None

_CLASSES = 100_000
"""Whoever classifies makes room for as many classes as the largest number says: identifiers are no classes."""


@dataclass(frozen=True)
class Labels:
    """The labels of all sets."""

    of: Mapping[str, Tensor | None]
    """int64 `[N]` by set; None where it has none."""
    names: tuple[str, ...] | None
    """By number, where labels are names."""


def to_labels(sets: Mapping[str, Sequence[Written]], where: str, name: Callable[[str, int], str]) -> Labels:
    """Number the labels of `training` and perhaps `test`.

    A set of which no image has a label has none, and so has one whose labels are all -1, which in published sets means
    unknown.

    Args:
        sets: the labels as they are written, None where an image has none.
        where: what they are written in, for people.
        name: what image i of a set is called, for people.

    Raises:
        UserError: some images have labels and some do not, numbers beside names, numbers that are no classes, or
            test classes that the training set does not have.
    """
    known = {which: _known(which, labels, where) for which, labels in sets.items()}
    kinds = {type(label) for labels in known.values() for label in labels or ()}
    if not kinds:
        return Labels(dict.fromkeys(sets), None)
    train, test = known["training"], known.get("test")
    if train is None:
        raise UserError(f"the test images have labels in {where}, the training images have none")
    if kinds == {int}:
        numbers = {
            which: None if labels is None else as_numbers(labels, where, partial(name, which))
            for which, labels in known.items()
        }
        return Labels(numbers, None)
    if len(kinds) > 1:
        raise UserError(f"labels in {where} are numbers in some places and names in others")
    names = sorted({str(label) for label in train})
    unknown = sorted({str(label) for label in test or ()} - set(names))
    if unknown:
        raise UserError(
            f"the test images have {len(unknown)} class{'es' if len(unknown) > 1 else ''} in {where} that no training "
            f"image has: {shown(', '.join(unknown[:3]))}"
        )
    number = {name: i for i, name in enumerate(names)}
    numbered = {
        which: None if labels is None else torch.tensor([number[str(label)] for label in labels], dtype=torch.int64)
        for which, labels in known.items()
    }
    return Labels(numbered, tuple(shown(name) for name in names))


def _known(which: str, labels: Sequence[Written], where: str) -> list[int | str] | None:
    found = [label for label in labels if label is not None]
    if not found:
        return None
    if len(found) < len(labels):
        raise UserError(f"{len(labels) - len(found)} of {len(labels)} {which} images have no label in {where}")
    return None if set(found) == {-1} else found


def as_numbers(labels: Sequence[int | str], where: str, name: Callable[[int], str]) -> Tensor:
    """Integers as int64 `[N]`. `name` is what image i is called.

    Raises:
        UserError: one cannot be the number of a class.
    """
    numbers = [int(label) for label in labels]
    wrong = next((i for i, number in enumerate(numbers) if not 0 <= number < _CLASSES), None)
    if wrong is not None:
        raise UserError(
            f"labels in {where} should be class numbers from 0 to {_CLASSES - 1}: {name(wrong)} has {numbers[wrong]}; "
            "number the classes from 0, or write their names as text"
        )
    return torch.tensor(numbers, dtype=torch.int64)
