"""Checks of data sources."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sslkit import randomness
from sslkit.testing.bench import Bench
from sslkit.testing.core import check
from sslkit.testing.outcome import Nonconforming, NotApplicable, described, require

KIND = "data_source"
COMPARED = 64
"""Images of a set that are compared between two openings."""
READERS, READS, SWITCHES = 3, 3, 1000
"""Threads that read at once, how often each, and how often it gives way to the others meanwhile."""
LOCK = "open a file of each read's own, or take a threading.Lock around what several reads share"


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


@check("several threads may read at the same time", KIND)
def threads(bench: Bench) -> None:
    """The engine reads ahead in one, and measures features in another."""
    for name, which in _sets(bench):
        try:
            alike = _read_at_once(which)
        except Exception as error:  # whatever a stranger's code raises
            raise Nonconforming(
                f"{name}.read() raised {described(error)} where {READERS} threads read at once; {LOCK}"
            ) from error
        require(alike, f"{name}.read() gives other images where {READERS} threads read at once; {LOCK}")


def _read_at_once(images: Any) -> bool:
    """Whether each of several threads is given what it asks for."""
    rows = torch.linspace(0, len(images) - 1, min(len(images), COMPARED // 4)).long()
    expected, start = images.read(rows), threading.Barrier(READERS)

    def read(order: Tensor) -> bool:
        start.wait()
        with _giving_way():
            return all(torch.equal(images.read(rows[order]), expected[order]) for _ in range(READS))

    orders = [torch.randperm(len(rows), generator=randomness.generator(n, "threads")) for n in range(READERS)]
    with ThreadPoolExecutor(READERS) as pool:
        return all(list(pool.map(read, orders)))


@contextmanager
def _giving_way() -> Iterator[None]:
    """Let other threads go ahead after every call of compiled code, such as one that seeks a place in a file.

    What goes wrong once in a night does so at once then.
    """
    left, usual = iter(range(SWITCHES)), sys.getprofile()

    def give_way(frame: object, event: str, argument: object) -> None:
        if event == "c_return" and next(left, None) is not None:
            time.sleep(1e-6)

    sys.setprofile(give_way)
    try:
        yield
    finally:
        sys.setprofile(usual)


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
    again = bench.open()
    first, second = bench.opened.fingerprint, again.fingerprint
    require(
        isinstance(first, str) and first,
        f"fingerprint is {first!r}; make it a text, such as a digest of the images or of their names, sizes and times",
    )
    require(
        first == second,
        "the fingerprint is another one when the source is opened again, so no run could be "
        "resumed; leave out times of day, hash() (which is salted), ids and the order of sets",
    )
    for name, which in _sets(bench):
        other = getattr(again, name)
        rows = torch.linspace(0, len(which) - 1, min(len(which), COMPARED)).long()
        require(
            other is not None and len(other) == len(which) and torch.equal(which.read(rows), other.read(rows)),
            f"the fingerprint is the same when the source is opened again, but {name} holds other images, or in "
            "another order; sort what is listed, draw splits from info.seed or the options, and compute the "
            "fingerprint of images in their order",
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


@check("original() gives each image as it is, uint8 [C, h, w] of the height and width in `sizes`", KIND)
def originals(bench: Bench) -> None:
    """Views are drawn for the sizes before any image is read."""
    given = [(name, which) for name, which in _sets(bench) if getattr(which, "sizes", None) is not None]
    if not given:
        raise NotApplicable("it gives squares only, having no `sizes`")
    for name, which in given:
        sizes = which.sizes
        require(
            isinstance(sizes, Tensor)
            and sizes.dtype == torch.int32
            and tuple(sizes.shape) == (len(which), 2)
            and sizes.device.type == "cpu",
            f"{name}.sizes is {_put(sizes)} for {len(which)} images; make it an int32 tensor [{len(which)}, 2] on the "
            "CPU: height and width of each",
        )
        channels = which.read(torch.zeros(1, dtype=torch.int64)).shape[1]
        for index in _some(which).tolist():
            image = which.original(index)
            expected = [channels, *sizes[index].tolist()]
            require(
                isinstance(image, Tensor) and image.dtype == torch.uint8 and list(image.shape) == expected,
                f"{name}.original({index}) gives {_put(image)}; it should be uint8 {expected}, by its channels and "
                "`sizes`",
            )
            require(
                image.is_contiguous() and image.device.type == "cpu",
                f"{name}.original({index}) is not a tensor in one piece on the CPU; call contiguous()",
            )
        _read_whole_at_once(name, which)


def _read_whole_at_once(name: str, which: Any) -> None:
    rows = _some(which).tolist()
    expected = {index: which.original(index).clone() for index in rows}

    def alike(index: int) -> bool:
        with _giving_way():
            return torch.equal(which.original(index), expected[index])

    with ThreadPoolExecutor(READERS) as pool:
        same = all(list(pool.map(alike, rows * READS)))
    require(
        same, f"{name}.original() gives another image the second time, or where {READERS} threads read at once; {LOCK}"
    )


@check("order() is a permutation that follows from its generator alone; sample() gives ascending positions", KIND)
def shards(bench: Bench) -> None:
    """Of a set that is cheap to read in some orders only."""
    given = [(name, w) for name, w in _sets(bench) if hasattr(w, "order") or hasattr(w, "sample")]
    if not given:
        raise NotApplicable("its images may be read in any order, having no order() and sample()")
    for name, which in given:
        require(
            hasattr(which, "order") and hasattr(which, "sample"),
            f"{name} has one of order() and sample(); a set that lies in shards has both",
        )
        first = which.order(randomness.generator(0, "order"))
        every = torch.arange(len(which))
        require(
            isinstance(first, Tensor) and first.dtype == torch.int64 and torch.equal(first.sort().values, every),
            f"{name}.order() gives {_put(first)}; it should be int64 [{len(which)}] with every position once",
        )
        require(
            torch.equal(first, which.order(randomness.generator(0, "order"))),
            f"{name}.order() gives another order for the same generator; take every random number from the generator",
        )
        require(
            len(which) < 8 or not torch.equal(first, which.order(randomness.generator(1, "order"))),
            f"{name}.order() gives the same order for another generator, so that all epochs would be alike",
        )
        for number in (1, 5, 10 * len(which)):
            chosen = which.sample(number)
            rising = isinstance(chosen, Tensor) and chosen.dtype == torch.int64 and bool((chosen.diff() > 0).all())
            require(
                rising and 0 < len(chosen) <= number and int(chosen.min()) >= 0 and int(chosen.max()) < len(which),
                f"{name}.sample({number}) should be int64, ascending, {number} positions of the set at most",
            )
