"""Checks of data sources."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkit.testing.bench import Bench
from sslkit.testing.core import NotApplicable, check, require

KIND = "data_source"


def _sets(bench: Bench) -> list[tuple[str, Any]]:
    opened = bench.opened
    sets = [(name, getattr(opened, name, None)) for name in ("train", "test")]
    found = [(name, images) for name, images in sets if images is not None]
    if not found or not len(found[0][1]):
        raise NotApplicable("needs images to train on; see the check images")
    return found


def _some(images: Any) -> Tensor:
    """Positions all over a set, in no order, one of them twice."""
    last = len(images) - 1
    return torch.tensor([last, 0, last // 2, last // 3, 0])


@check("read() gives uint8 [n, C, H, W] in the order that is asked for, the same every time", KIND)
def images(bench: Bench) -> None:
    """And `tensor`, where there is one, holds the same images."""
    opened = bench.opened
    require(
        opened.train is not None and len(opened.train) > 0,
        "train holds no images; raise sslkit.errors.UserError "
        "from build() and say what is missing and what to put where",
    )
    shape: list[int] = []
    for name, which in _sets(bench):
        rows = _some(which)
        read = which.read(rows)
        require(
            isinstance(read, Tensor) and read.dtype == torch.uint8 and read.ndim == 4 and len(read) == len(rows),
            f"{name}.read({len(rows)} indices) gives {_put(read)}; it should be a uint8 tensor [n, C, H, W], 0 to 255",
        )
        require(read.device.type == "cpu", f"{name}.read() gives images on {read.device}; the engine moves them")
        require(
            torch.equal(read, which.read(rows)),
            f"{name}.read() gives other images the second time; random changes belong into a view generator",
        )
        one_by_one = torch.cat([which.read(rows[k : k + 1]) for k in range(len(rows))])
        require(
            torch.equal(read, one_by_one),
            f"{name}.read(indices) is not the images in the order of indices; index each image by its own position",
        )
        shape = shape or list(read.shape[1:])
        require(
            list(read.shape[1:]) == shape,
            f"{name} images are {list(read.shape[1:])}, and training images are "
            f"{shape}; all images of a source have one shape",
        )
        whole = which.tensor
        if whole is not None:
            require(
                isinstance(whole, Tensor)
                and whole.dtype == torch.uint8
                and len(whole) == len(which)
                and torch.equal(whole[rows], read),
                f"{name}.tensor is {_put(whole)} and not the images that read() gives; make it uint8 [N, C, H, W] with "
                "all images in order, or None where they do not fit in memory",
            )


def _put(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@check("labels are int64 [N] on the CPU, or None", KIND)
def labels(bench: Bench) -> None:
    """-1 is an image without one."""
    names = bench.opened.class_names
    for name, which in _sets(bench):
        given = which.labels
        if given is None:
            continue
        require(
            isinstance(given, Tensor)
            and given.dtype == torch.int64
            and tuple(given.shape) == (len(which),)
            and given.device.type == "cpu",
            f"{name}.labels is {_put(given)} for {len(which)} images; make it an int64 tensor [{len(which)}] on the "
            "CPU, or None where there are no labels",
        )
        low, high = int(given.min()), int(given.max())
        require(low >= -1, f"{name}.labels holds {low}; classes count from 0, and -1 means that there is no label")
        require(
            names is None or high < len(names),
            f"{name}.labels holds {high}, and class_names has "
            f"{len(names or ())} names; give one for each class, or None",
        )


@check("the same data has the same fingerprint when it is opened again", KIND)
def fingerprint(bench: Bench) -> None:
    """A run that goes on compares it, and refuses other images."""
    first, second = bench.opened.fingerprint, bench.open().fingerprint
    require(
        isinstance(first, str) and first,
        f"fingerprint is {first!r}; make it a text, such as a digest of the images or of their names, sizes and times",
    )
    require(
        first == second,
        "the fingerprint is another one when the source is opened again, so no run could be "
        "resumed; leave out times of day, hash() (which is salted), ids and the order of sets",
    )


@check("`bad` lists what was left out, each with its path and its problem", KIND)
def bad_images(bench: Bench) -> None:
    """It goes into the run directory as it is."""
    bad = bench.opened.bad
    require(
        isinstance(bad, list | tuple), f"bad is {type(bad).__name__}; make it a list, empty if nothing was left out"
    )
    for entry in bad:
        require(
            {"path", "problem"} <= set(entry), f"an entry of bad is {entry!r}; give it the keys 'path' and 'problem'"
        )
