"""What was drawn for a view, in words: for any view generator, by the names of its parameters.

A parameter of any name and shape is written as its name and its numbers. These read better:

- `box`, four integers: top, left, height and width of a crop, in pixels of the image.
- `jitter` (yes or no) with `brightness`, `contrast`, `saturation` (factors), `hue` (turns) and `order` (those four, as
  0 to 3, in the order in which they come): written in that order, and not at all where the answer is no.
- `saturation` and `hue` of the jitter, and `grayscale`, not of views with one channel, which have no colours.
- `NAME_DETAIL` beside a yes-or-no parameter that is called NAME, or begins with it: left out where the answer is no.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

JITTER = ("brightness", "contrast", "saturation", "hue")
COLOURS = ("saturation", "hue", "grayscale")
"""What leaves a grey image as it is."""
SPELT_OUT = 6
"""A parameter of more numbers than this is written as its shape and its range."""

Values = dict[str, Tensor]
Box = tuple[int, int, int, int]
"""Top, left, height, width."""


def drawn(parameters: Mapping[str, Tensor], sample: int, samples: int, views: int) -> tuple[list[Values], Values]:
    """The parameters of one sample: those of each view, and those of all views alike.

    A parameter is one of each view if its dimension 1 has as many entries as there are views, as sslkit's own have.
    """
    own: list[Values] = [{} for _ in range(views)]
    common: Values = {}
    for name, given in parameters.items():
        values = torch.as_tensor(given).detach().cpu()
        if values.ndim < 1 or len(values) != samples:  # against the contract, and yet to be shown
            common[name] = values
        elif values.ndim > 1 and values.shape[1] == views:
            for view in range(views):
                own[view][name] = values[sample, view]
        else:
            common[name] = values[sample]
    return own, common


def words(values: Values, side: tuple[int, int], *, grey: bool = False) -> list[str]:
    """One line for each thing that was drawn. `side` is the height and width of the image; `grey`, whether views
    have one channel."""
    return list(_lines(values, side, COLOURS if grey else ()))


def _lines(values: Values, side: tuple[int, int], without: Collection[str]) -> Iterator[str]:
    crop, known = box(values, side), _knows_jitter(values)
    if crop is not None:
        yield f"crop {100 * crop[2] * crop[3] / (side[0] * side[1]):.0f}% of area"
    switches = {name: bool(value) for name, value in values.items() if value.dtype == torch.bool and value.ndim == 0}
    for name, value in values.items():
        if name == "box" and crop is not None:
            continue
        if known and name in ("jitter", "order", *JITTER):
            if name == "jitter" and switches[name]:
                yield from _jitter(values, without)
        elif name in switches:
            if switches[name] and name not in without and not any(other.startswith(f"{name}_") for other in values):
                yield name.replace("_", " ")
        elif all(on for switch, on in switches.items() if _is_detail(name, switch)):
            yield f"{name.replace('_', ' ')} {_numbers(value)}"


def _is_detail(name: str, switch: str) -> bool:
    """`blur_sigma` is one of `blur`, and `gray_weights` of `grayscale`."""
    stem, detail, _ = name.partition("_")
    return name.startswith(f"{switch}_") or bool(detail and "_" not in switch and switch.startswith(stem))


def box(values: Values, side: tuple[int, int]) -> Box | None:
    """The crop, or None where there is none or `box` is something else."""
    value = values.get("box")
    if value is None or value.shape != (4,) or value.is_floating_point() or value.is_complex():
        return None
    top, left, height, width = value.tolist()
    inside = 0 <= top <= top + height <= side[0] and 0 <= left <= left + width <= side[1]
    return (top, left, height, width) if inside and height > 0 and width > 0 else None


def _knows_jitter(values: Values) -> bool:
    order, jitter = values.get("order"), values.get("jitter")
    return (
        order is not None
        and jitter is not None
        and jitter.dtype == torch.bool
        and jitter.ndim == 0
        and order.shape == (4,)
        and sorted(order.tolist()) == [0, 1, 2, 3]
        and all(name in values and values[name].ndim == 0 for name in JITTER)
    )


def _jitter(values: Values, without: Collection[str]) -> Iterator[str]:
    for number in values["order"].tolist():
        name = JITTER[int(number)]
        if name in without:
            continue
        value = float(values[name])
        yield f"hue {360 * value:+.0f}°" if name == "hue" else f"{name} x {value:.2f}"


def _numbers(value: Tensor) -> str:
    if value.numel() == 0:
        return "(nothing)"
    if value.numel() <= SPELT_OUT:
        return " ".join(_number(x, 3 if value.numel() == 1 else 2) for x in value.flatten().tolist())
    shape = " x ".join(str(n) for n in value.shape)
    if value.is_complex():
        return f"({shape} numbers)"
    low, high = (_number(x, 2) for x in (value.min().item(), value.max().item()))
    return f"({shape} numbers, {low} to {high})"


def _number(value: float | bool | complex, digits: int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
