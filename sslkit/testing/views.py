"""Checks of view generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sslkit import doctor, facts, randomness
from sslkit.batch import ViewSpec
from sslkit.testing.bench import Bench, default_random_state, finite, pictures
from sslkit.testing.core import check
from sslkit.testing.engine import small_parts
from sslkit.testing.outcome import Nonconforming, NotApplicable, require

KIND = "view_generator"
N = 8


def drawn(maker: Any, n: int = N, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of n samples."""
    parameters = maker.draw(n, randomness.generator(seed, "views"))
    if not isinstance(parameters, Mapping):
        raise NotApplicable("needs the parameters that draw() returns; see the check draws")
    return dict(parameters)


def made(maker: Any, images: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """The views, through both stages."""
    return list(maker.appear(maker.crop(images, parameters), parameters))


@check("`specs` is a tuple of ViewSpec, one for each view", KIND)
def view_specs(bench: Bench) -> None:
    """What the engine and the losses know of the views before they are made."""
    specs = bench.built().specs
    require(
        isinstance(specs, tuple) and specs and all(isinstance(s, ViewSpec) for s in specs),
        f"specs is {specs!r}; make it a tuple: (ViewSpec(run.image_size), ViewSpec(run.image_size))",
    )
    for number, spec in enumerate(specs):
        require(
            type(spec.size) is int and spec.size > 0 and spec.kind in ("global", "local"),
            f"specs[{number}] is {spec}; size is a positive int in pixels, kind 'global' or 'local'",
        )


@check("views are finite float [B, C, h, w], one for each spec, of the size that it says", KIND)
def view_shapes(bench: Bench) -> None:
    """Both of the crops, on the scale 0..1, and of the finished views."""
    maker = bench.built()
    images, parameters = pictures(N, bench.run), drawn(maker)
    crops = maker.crop(images, parameters)
    views = maker.appear(crops, parameters)
    for stage, tensors in (("crop", crops), ("appear", views)):
        require(
            isinstance(tensors, list | tuple) and len(tensors) == len(maker.specs),
            f"{stage}() returns {len(tensors) if hasattr(tensors, '__len__') else tensors!r} tensors for "
            f"{len(maker.specs)} specs; return a list with one tensor for each",
        )
        for number, (spec, tensor) in enumerate(zip(maker.specs, tensors, strict=True)):
            expected = (N, bench.run.channels, spec.size, spec.size)
            require(
                tuple(tensor.shape) == expected,
                f"{stage}() makes view {number} {list(tensor.shape)}; it should be {list(expected)}: [B, C, h, w]",
            )
            require(
                tensor.dtype == torch.float32,
                f"{stage}() makes view {number} {tensor.dtype}; divide the uint8 "
                "image by 255 first: images.float() / 255",
            )
            finite(tensor, f"view {number} after {stage}()")
    low, high = min(float(c.min()) for c in crops), max(float(c.max()) for c in crops)
    require(
        low >= -0.01 and high <= 1.01,
        f"crop() gives values from {low:.3g} to {high:.3g}; crops are on the scale "
        "0..1 (divide by 255), and normalising belongs into appear()",
    )


@check("draw() gives CPU tensors with one row for each image, from its generator alone", KIND)
def draws(bench: Bench) -> None:
    """So that a step repeats, and that parameters can be cut into parts of a batch."""
    maker = bench.built()
    parameters = maker.draw(N, randomness.generator(0, "views"))
    require(isinstance(parameters, dict), f"draw() returns {type(parameters).__name__}; return a dict of tensors")
    for name, tensor in parameters.items():
        require(
            isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.ndim and len(tensor) == N,
            f"draw({N}, generator)[{name!r}] should be a CPU tensor with {N} rows, one for each image; give every "
            "parameter a leading dimension n",
        )
    with default_random_state(1):
        first = drawn(maker)
    with default_random_state(2):
        before = torch.random.get_rng_state()
        second = drawn(maker)
        untouched = torch.equal(before, torch.random.get_rng_state())
    for name, tensor in first.items():
        require(
            torch.equal(tensor, second[name]),
            f"draw() gives another {name!r} for the same generator; take every random number from the generator it is "
            "given (generator=generator), not from numpy, random or torch's default one",
        )
    require(untouched, "draw() uses torch's default generator; give generator=generator to every call that draws")


@check("views are a function of the images and the parameters: nothing else is random", KIND)
def views_keyed(bench: Bench) -> None:
    """A step that is repeated sees the same views."""
    maker = bench.built()
    images, parameters = pictures(N, bench.run), drawn(maker)
    with default_random_state(1):
        first = made(maker, images, parameters)
    with default_random_state(2):
        second = made(maker, images, parameters)
    require(
        all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
        "crop() or appear() gives other views for the same parameters; draw whatever is random in draw() and read it "
        "from the parameters",
    )


@check("every image of a batch gets views of its own, and its views differ from one another", KIND)
def views_differ(bench: Bench) -> None:
    """One draw for a whole batch, or one for all views, makes the task far too easy."""
    maker = bench.built()
    images = pictures(1, bench.run).expand(N, -1, -1, -1).contiguous()
    views = made(maker, images, drawn(maker))
    for number, view in enumerate(views):
        require(
            not torch.equal(view[:1].expand_as(view), view),
            f"{N} copies of one image get the same view {number}; draw parameters of shape [n, ...] and apply each "
            "row to its own image",
        )
    for number, spec in enumerate(maker.specs[1:], 1):
        if spec == maker.specs[0]:
            require(
                not torch.equal(views[0], views[number]),
                f"views 0 and {number} of an image are identical; draw parameters for each view: [n, V, ...]",
            )
    other = made(maker, images, drawn(maker, seed=1))
    require(
        not all(torch.equal(a, b) for a, b in zip(views, other, strict=True)),
        "another generator gives the same views; use the generator that draw() is given",
    )


@check("views of some images are those images' views of the whole batch", KIND)
def view_subsets(bench: Bench) -> None:
    """Images are cropped in parts by loader workers, and micro-batches are cut from a batch."""
    maker = bench.built()
    images, parameters = pictures(N, bench.run), drawn(maker)
    rows = torch.tensor([5, 2, 7])
    some = {name: tensor[rows] for name, tensor in parameters.items()}
    stages: dict[str, Callable[[Tensor, Mapping[str, Tensor]], list[Tensor]]] = {
        "crop": lambda i, p: list(maker.crop(i, p)),
        "appear": lambda i, p: made(maker, i, p),
    }
    for stage, make in stages.items():
        whole, part = make(images, parameters), make(images[rows], some)
        for number, (a, b) in enumerate(zip(whole, part, strict=True)):
            require(
                a[rows].shape == b.shape and torch.allclose(a[rows], b, rtol=1e-4, atol=1e-4),
                f"{stage}() makes another view {number} of an image when other images are in the batch; let nothing "
                "depend on the batch as a whole (its mean, its size, positions in it)",
            )


@check("the health rules that look at views before training find nothing", KIND)
def health(bench: Bench) -> None:
    """In the small recipe: views that are normalised, differ, and are drawn for each image and each step."""
    known = facts.gather(small_parts(bench))
    found = [
        finding
        for finding in doctor.before(known)
        if finding.severity != "info" and finding.key.partition(".")[0] == bench.kind
    ]
    require(
        not found,
        "; ".join(f"{finding.id}: {finding.sentence}" for finding in found),
    )


@check("the stored images stay as they are", KIND)
def images_untouched(bench: Bench) -> None:
    """They are read again in the next epoch."""
    maker = bench.built()
    images, parameters = pictures(N, bench.run), drawn(maker)
    before, drawn_before = images.clone(), {name: tensor.clone() for name, tensor in parameters.items()}
    made(maker, images, parameters)
    require(torch.equal(images, before), "crop() changes the stored images; make a copy first: images.float() / 255")
    maker.clean(images)
    require(torch.equal(images, before), "clean() changes the stored images; make a copy first: images.float() / 255")
    require(
        all(torch.equal(parameters[n], t) for n, t in drawn_before.items()),
        "crop() or appear() changes the parameters; do not work on them in place",
    )


@check("clean() gives the normalised image for evaluation, the same every time", KIND)
def clean_images(bench: Bench) -> None:
    """No randomness, each image for itself."""
    maker = bench.built()
    images = pictures(N, bench.run)
    with default_random_state(1):
        first = maker.clean(images)
    with default_random_state(2):
        second = maker.clean(images)
    if not isinstance(first, Tensor):
        raise Nonconforming(f"clean() returns {type(first).__name__}; return one tensor [B, C, h, w]")
    require(
        first.ndim == 4 and tuple(first.shape[:2]) == (N, bench.run.channels) and first.dtype == torch.float32,
        f"clean() returns {first.dtype} {list(first.shape)}; it should be float32 [{N}, {bench.run.channels}, h, w]",
    )
    finite(first, "what clean() returns")
    require(
        torch.equal(first, second),
        "clean() gives other pictures the second time; evaluation needs the same ones: no random crop, no jitter",
    )
    require(
        torch.allclose(first[2:5], maker.clean(images[2:5]), rtol=1e-4, atol=1e-4),
        "clean() makes another picture of an image when other images are in the batch; normalise with the run's mean "
        "and std, not the batch's",
    )


SIZES = ((40, 90), (64, 33), (97, 97), (12, 20))
"""Height and width of images that views are cut from."""
ALIKE = 0.02
"""How far the crop that is cut may be from the one that is cropped, on average, on the scale 0..1."""


@check("cut() makes of one image of any size what crop() makes of squares, by parameters of draw_sized()", KIND)
def cuts(bench: Bench) -> None:
    """Where a data source gives images as they lie in their files."""
    maker = bench.built()
    if not (hasattr(maker, "cut") or hasattr(maker, "draw_sized")):
        raise NotApplicable("it crops squares only, having no draw_sized() and cut()")
    require(
        hasattr(maker, "cut") and hasattr(maker, "draw_sized"),
        "there is one of draw_sized() and cut(); views are cut from originals by both, or not at all",
    )
    side = bench.run.image_size
    drawn_for = torch.full((N, 2), side, dtype=torch.int32)
    plain, sized = (
        maker.draw(N, randomness.generator(0, "views")),
        maker.draw_sized(drawn_for, randomness.generator(0, "views")),
    )
    require(
        plain.keys() == sized.keys() and all(torch.equal(plain[name], sized[name]) for name in plain),
        "draw_sized() of squares of image_size draws something else than draw(); draw the same numbers in one order",
    )
    squares = pictures(N, bench.run)
    cropped = maker.crop(squares, plain)
    for number, crops in enumerate(zip(*_cut(bench, maker, list(squares), sized), strict=True)):
        gap = float((torch.stack(crops).float() / 255 - cropped[number]).abs().mean())
        require(
            gap <= ALIKE,
            f"cut() makes crop {number} of a square {gap:.2f} from what crop() makes of it, on average, on the scale "
            "0..1; cut the same box, and flip where the row says so",
        )
    images = [
        torch.nn.functional.interpolate(square[None], size, mode="bilinear")[0]
        for square, size in zip(squares, SIZES, strict=False)
    ]
    parameters = maker.draw_sized(torch.tensor(SIZES, dtype=torch.int32), randomness.generator(0, "views"))
    stacked = [torch.stack(own).float() / 255 for own in zip(*_cut(bench, maker, images, parameters), strict=True)]
    for number, view in enumerate(maker.appear(stacked, parameters)):
        finite(view, f"view {number} of crops that were cut")


def _cut(bench: Bench, maker: Any, images: list[Tensor], parameters: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """The crops of each image, of the shapes that they should have, and of nothing but the image and its row."""
    found = []
    for number, image in enumerate(images):
        row, before = {name: values[number] for name, values in parameters.items()}, image.clone()
        with default_random_state(1):
            crops = maker.cut(image, row)
        require(torch.equal(image, before), "cut() changes the image that it is given; make a copy first")
        with default_random_state(2):
            again = maker.cut(image, row)
        shapes = [(torch.uint8, (bench.run.channels, spec.size, spec.size)) for spec in maker.specs]
        made = [(c.dtype, tuple(c.shape)) if isinstance(c, Tensor) else c for c in crops]
        require(
            made == shapes,
            f"cut() of an image {list(image.shape)} gives {made}; it should be a list of uint8 [C, s, s], one for each "
            "spec and of its size",
        )
        require(
            all(torch.equal(a, b) for a, b in zip(crops, again, strict=True)),
            "cut() gives other crops for the same row; draw whatever is random in draw_sized()",
        )
        found.append(list(crops))
    return found
