"""What a recipe should say, by what the images and the machine are like. Pure: a look goes in, choices come out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from sslkit.looking import Look
from sslkit.suggesting.lines import Choices, power_of_two
from sslkit.suggesting.methods import Method
from sslkit.suggesting.usable import broken_shares, holdable, short_sides, what_for

SIZES = ((48, 32), (80, 64), (160, 96))
"""Up to which median side, in pixels, views are how large; above, what the machine can bear."""
LARGE = {"cuda": 224, "cpu": 96}
FRUGAL = {"cuda": 128, "cpu": 96}
"""Sides of views of photographs, and what is taken where the hours do not suffice for those."""
SMALL_STEM = 64
"""Side up to which a ResNet wants the stem for small images."""
SINGLE_PIXEL = 16
"""Side of views that a ResNet's large-image stem and stages make a single pixel of, where bfloat16 goes wrong on a CPU
(sslkit.bf16)."""
BLURRED = 96
"""Side from which a blur leaves something to see."""
DEEP = 20_000
"""Images from which a ResNet-50 has something to learn, on a GPU."""
BATCH, LEAST_BATCH = 256, 32
ENOUGH_EPOCHS, MOST_EPOCHS, ENOUGH_STEPS = 30, 400, 500
"""Below the first the cheaper network is taken, and above the second a small set gains little."""
MEASURING = 0.1
"""Share of the hours that is left for opening the images and for measurements."""
KEPT = 0.25
"""Share of the memory that images may take."""
OBLONG = 1.2
"""Longer side by shorter, of which the central square is no longer the picture."""
HELD_OUT = 0.1
MEASURED = 20
"""Times that kNN is measured in a run, at most."""
VOTERS, BANK = 200, 3_000
"""Defaults of the observer knn."""
SHORT, CHECKPOINTS = 60, 300
"""Seconds that a run may lose, and from one checkpoint to the next in a long one."""
FEW = 3_000
"""Images below which weights that others trained matter more than anything that is chosen here."""
SECONDS_TO_CHECK = 600
"""What decoding every file before training may take."""


DEEP_GREY = "16-bit grey"
"""Of files that a data source scales by itself where it is not told a range."""


@dataclass(frozen=True)
class Machine:
    """What a run has to do with."""

    device: str
    """`cpu` or `cuda`."""
    cores: int
    memory: int
    """Bytes."""
    fast_bf16: bool
    """Whether bfloat16 is faster there than float32."""


@dataclass(frozen=True)
class Wanted:
    """What the user says."""

    root: str
    name: str
    hours: float = 1.0
    size: int | None = None
    mixed: bool = False
    """Whether images lie beside folders of images, so that folders are no classes."""


@dataclass(frozen=True)
class Found:
    """What was measured with choices made before."""

    seconds_per_image: float
    """Of training, without reading."""
    batch_size: int | None = None
    """The largest that fits the device's memory, where BATCH does not."""


def choose(
    look: Look, machine: Machine, wanted: Wanted, method: Method, found: Found | None = None, *, frugal: bool = False
) -> Choices:
    """A recipe for these images.

    Args:
        look, machine, wanted: What there is and what is asked for.
        method: What loss, heads, target and optimizer are taken from.
        found: How fast an earlier choice trains; without it the recipe has one epoch.
        frugal: Whether to take the cheaper network and views.
    """
    made = Choices()
    made.add("name", wanted.name, "its runs are in runs/NAME")
    made.add("seed", 0, "all randomness follows from it")
    size = wanted.size or _size(look, machine, frugal)
    stem, deep = _network(look, machine, size, frugal)
    train, per_class = _data(made, look, machine, wanted, size, found)
    batch = _batch(train, method, found)
    steps_an_epoch = max(1, train // batch)
    if found is not None:
        seconds = found.seconds_per_image + _reading(look, machine, made)
        made.affordable = wanted.hours * 3600 * (1 - MEASURING) / (seconds * batch * steps_an_epoch)
        made.epochs = max(1, min(MOST_EPOCHS, math.floor(made.affordable)))
    steps = made.epochs * steps_an_epoch
    _views(made, look, machine, wanted, method, size)
    _encoder(made, look, machine, method, size, stem, deep)
    method.parts(made, steps, steps_an_epoch, train, batch, machine.device)
    _train(made, machine, wanted, method, batch, train, steps_an_epoch, found, size, stem)
    _observers(made, look, train, per_class)
    if look.files < FEW:
        made.notes.append(
            f"{look.files:,} images are few: weights that others trained are a better beginning (init_from takes "
            "timm's and files, docs/how-to/start-from-a-run.md)"
        )
    return made


# ---------------------------------------------------------------- size, network


def _size(look: Look, machine: Machine, frugal: bool) -> int:
    middle = median(short_sides(look))
    fitting = next((size for below, size in SIZES if middle < below), None)
    return fitting or (FRUGAL if frugal else LARGE)[machine.device]


def _network(look: Look, machine: Machine, size: int, frugal: bool) -> tuple[str, bool]:
    """The stem, and whether the network is the deeper one."""
    deep = machine.device == "cuda" and look.files >= DEEP and not frugal
    small = size <= SMALL_STEM and not (frugal and machine.device == "cpu")
    return ("small_image" if small else "default"), deep


# ---------------------------------------------------------------- data


def _data(
    made: Choices, look: Look, machine: Machine, wanted: Wanted, size: int, found: Found | None
) -> tuple[int, int | None]:
    """Choose how images are read; how many are trained on, and how many the smallest class has of them."""
    broken, broken_tests = broken_shares(look)
    train = max(1, math.floor(look.files * (1 - broken)))
    made.add("data_source.use", "folder", f"{look.files:,} image files{what_for(look)}")
    made.add("data_source.root", wanted.root, "elsewhere: --set data_source.root=FOLDER")
    _stored(made, look, machine, size, found)
    per_class = _labels(made, look, wanted)
    if made.value("data_source.hold_out"):
        train = math.floor(train * (1 - HELD_OUT))
    kinds = ", ".join(f"{n:,} {mode}" for mode, n in sorted(look.modes.items(), key=lambda kind: -kind[1]))
    made.add("data_source.channels", look.channels, f"of those looked at: {kinds}")
    if look.value_range is not None:
        low, high = (float(f"{bound:.6g}") for bound in look.value_range)
        deep = look.modes.get(DEEP_GREY, 0)
        if 0 < 2 * deep <= sum(look.modes.values()):  # what a few files hold is no measure for the others
            made.notes.append(
                f"{deep:,} of the images are 16-bit grey, with values between {low:g} and {high:g}, and are "
                "scaled by 65,535: look whether they are too dark, and see data_source.value_range"
            )
        else:
            made.add("data_source.value_range", [low, high if high > low else low + 1.0],
                     "becomes 0..255: the .1 and 99.9 percentile of the values that are not 8-bit")  # fmt: skip
    if look.unreadable:
        named = ", ".join(str(bad["path"]) for bad in look.unreadable[:3])
        more = f" and {len(look.unreadable) - 3} more" if len(look.unreadable) > 3 else ""
        share = min(1.0, math.ceil(max(broken, broken_tests) * 1000 + 1) / 1000)
        worse = f"; {100 * broken_tests:.2g}% of the test images" if broken_tests > broken else ""
        made.add("data_source.max_bad", share, f"{len(look.unreadable)} of {look.looked_at:,} cannot be read, and are "
                 f"left out: {named}{more}{worse}")  # fmt: skip
    return train, per_class


def _stored(made: Choices, look: Look, machine: Machine, size: int, found: Found | None) -> None:
    """Whether images are kept as squares in memory, or views are cut from the files."""
    oblong = _percentile([max(pair) / max(1, min(pair)) for pair in zip(look.heights, look.widths, strict=True)], 0.95)
    middle = round(median(short_sides(look)))
    kept = max(size, min(middle, 2 * size))
    bytes_kept = (look.files + look.test_files) * kept * kept * look.channels
    fits = bytes_kept <= KEPT * machine.memory
    slow = found is not None and look.seconds_per_image / machine.cores > found.seconds_per_image / 2
    if fits and (oblong < OBLONG or slow):
        why = f"views are cut from squares of this side in memory, {bytes_kept / 1e9:.1g} GB in all"
        if oblong >= OBLONG:
            why += f"; decoding ({look.seconds_per_image * 1000:.0f} ms an image) would take longer than training"
            made.notes.append("the central square of each image is used: its ends are not seen")
        elif middle > kept:
            why += f"; the shorter sides are {middle} px in the median"
        made.add("data_source.size", kept, why)
        if bytes_kept > 4e9:
            made.add("data_source.memory_limit_gb", math.ceil(bytes_kept / 1e9), "a quarter of the memory at most")
        return
    made.add("data_source.size", size, "side of the squares that features are measured on")
    reason = "not square" if oblong >= OBLONG else "more than fit in a quarter of the memory as squares"
    made.add("data_source.crops_from", "original", f"views are cut from the files: the images are {reason}")
    if look.files * look.seconds_per_image / machine.cores > SECONDS_TO_CHECK:
        made.add("data_source.check", "headers", "decoding all files before training would take "
                 f"{look.files * look.seconds_per_image / machine.cores / 60:.0f} min")  # fmt: skip


def _reading(look: Look, machine: Machine, made: Choices) -> float:
    """What cutting from files adds to the training of an image: on a GPU it goes on beside it."""
    if made.value("data_source.crops_from") is None:
        return 0.0
    return look.seconds_per_image / machine.cores if machine.device == "cpu" else 0.0


def _labels(made: Choices, look: Look, wanted: Wanted) -> int | None:
    """Choose what labels are read and what features are tested on; images of the smallest class to train on."""
    classes = look.classes or {}
    if wanted.mixed:
        made.add("data_source.classes", "none", "images lie beside folders, which can be no classes then: no labels")
    if len(classes) < 2:
        return None
    least = min(classes.values())
    if look.test_files:
        return least if len(look.test_classes or {}) > 1 else None
    if not holdable(look):
        made.notes.append("no class has two images that differ: none can be held out to measure quality on")
        return None
    if least < 2:
        made.notes.append(f"{sum(n < 2 for n in classes.values())} of {len(classes)} classes have a single image")
    made.add("data_source.hold_out", HELD_OUT, "of each class: kNN is measured on these, which are not trained on")
    return max(1, math.floor(least * (1 - HELD_OUT)))


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.floor(share * len(values)))] if values else 1.0


# ---------------------------------------------------------------- views and encoder


def _views(made: Choices, look: Look, machine: Machine, wanted: Wanted, method: Method, size: int) -> None:
    middle = round(median(short_sides(look)))
    by = "asked for" if wanted.size else f"the shorter sides of the images are {middle} px in the median"
    if not wanted.size and size < LARGE["cuda"] and middle >= SIZES[-1][0]:
        by += f"; {LARGE['cuda']} " + ("with more hours" if machine.device == "cuda" else "is for a GPU")
    for line in method.views(size, by, blurred=size >= BLURRED):
        made.add(f"view_generator.{line.key}", line.value, line.why)
    if look.channels != 3:
        kind = "grey images have no colours" if look.channels == 1 else f"{look.channels} bands are no colours"
        made.lines = [line for line in made.lines if line.key not in COLOURS]
        for key in COLOURS:
            made.add(key, 0.0, kind)
    if made.value("view_generator.flip") is None:
        made.add("view_generator.flip", 0.5, "0 where left and right differ in meaning, as in writing")


COLOURS = ("view_generator.saturation", "view_generator.hue", "view_generator.grayscale")


def _encoder(made: Choices, look: Look, machine: Machine, method: Method, size: int, stem: str, deep: bool) -> None:
    made.add("backbone.use", "timm", "any model of timm: sslkit describe backbone.timm")
    if deep:
        made.add("backbone.model", "resnet50", f"{look.files:,} images and a GPU are enough for it")
    else:
        few = look.files < DEEP
        why = f"{look.files:,} images are few for a larger one" if few else "a CPU bears no larger one"
        made.add("backbone.model", "resnet18", why if few or machine.device == "cpu" else "the hours are few")
    if stem == "small_image":
        made.add("backbone.stem", stem, f"3x3, stride 1, no max-pool, for {size} px: SimCLR, appendix B.9")
    elif size <= SMALL_STEM:
        made.add("backbone.stem", stem, "shrinks the image to a quarter at once: a sixteenth of the work, and less "
                 "accuracy; with more hours or a GPU: small_image")  # fmt: skip


# ---------------------------------------------------------------- training


def _batch(train: int, method: Method, found: Found | None) -> int:
    wished = train / (2 if method.compares else 8)
    batch = power_of_two(min(BATCH, max(wished, min(LEAST_BATCH, train))))
    return max(2, min(batch, (found.batch_size if found else None) or BATCH))


def _train(
    made: Choices, machine: Machine, wanted: Wanted, method: Method, batch: int, train: int, per_epoch: int,
    found: Found | None, size: int, stem: str,
) -> None:  # fmt: skip
    steps = made.epochs * per_epoch
    one = wanted.hours == 1
    hours, have = ("an hour", "has") if one else (f"{wanted.hours:g} hours", "have")
    rate = f" at {1 / found.seconds_per_image:,.0f} images/s" if found else ""
    if made.affordable >= MOST_EPOCHS:
        why = f"{steps:,} steps; {hours} {have} more{rate}, and small sets gain little beyond"
    else:
        why = f"{steps:,} steps: what {hours} {have} on this machine{rate}"
    made.add("train.epochs", made.epochs, why)
    if found and (steps < ENOUGH_STEPS or made.epochs < 10):
        cheaper = "" if machine.device == "cuda" else ", a GPU"
        made.notes.append(
            f"{hours} {'is' if one else 'are'} {made.epochs} epoch{'s' * (made.epochs != 1)}, {steps:,} steps: little "
            f"for any method (CIFAR-10 takes 200 epochs); more --hours{cheaper} or a smaller --size give more"
        )
    fits = "as many as fit the device's memory" if found and found.batch_size == batch else (
        "the recipes' usual" if batch == BATCH else f"some {train:,} images give but {per_epoch} steps an epoch"
    )  # fmt: skip
    made.add("train.batch_size", batch, fits)
    if machine.fast_bf16 and (machine.device == "cuda" or _smallest(made, size) > SINGLE_PIXEL):
        faster = "faster on a CPU that multiplies in it, as this one" if machine.device == "cpu" else "of networks"
        made.add("train.precision", "bf16", f"{faster}; loss and weights in float32")
    method.train(made, batch)
    seconds = found.seconds_per_image * batch if found else 1.0
    made.add("train.log_every", max(1, min(50, steps // 100)), "a hundred records or more")
    made.add("train.checkpoint_every", *_checkpoints(steps, seconds))
    accepted = list(_accepted(made, method, batch, size, stem, train))
    if accepted:
        made.add("train.accept", [name for name, _ in accepted], "; ".join(why for _, why in accepted))


def _checkpoints(steps: int, seconds: float) -> tuple[int, str]:
    """Steps from one checkpoint to the next, so that a run that dies loses a tenth of itself at most."""
    if steps * seconds < SHORT:
        return steps, "at the end: the run is short"
    every = max(1, min(_round(CHECKPOINTS / seconds), steps // 10))
    apart = every * seconds
    each = f"{apart / 60:.0f} min" if apart >= 90 else f"{apart:.0f} s"
    return every, f"steps: every {each} or so, and at the end"


def _smallest(made: Choices, size: int) -> int:
    """Side of the smallest views."""
    return min([size, *(int(group.get("size", size)) for group in made.value("view_generator.views") or ())])


def _round(number: float) -> int:
    """Rounded to one digit that counts."""
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, number))))
    return int(round(number / unit) * unit)


def _accepted(made: Choices, method: Method, batch: int, size: int, stem: str, train: int) -> Iterable[tuple[str, str]]:
    """Findings that are known and meant."""
    if stem == "default" and size <= SMALL_STEM:
        yield "stem_too_coarse", "the stem above is meant"
    if batch < LEAST_BATCH:
        yield "batch_norm_small", f"there are some {train} images"
    if method.few_negatives(batch):
        yield "few_negatives", f"there are some {train} images"


# ---------------------------------------------------------------- observers


def _observers(made: Choices, look: Look, train: int, per_class: int | None) -> None:
    made.add("observers.0.use", "knn", "accuracy of the nearest neighbours, beside the random network's")
    if per_class is None:
        without = (
            "the images have no labels" if not look.classes else
            "one folder is no choice of classes" if len(look.classes) < 2 else
            "the test images have no labels" if look.test_files else "no class has two images that differ"
        )  # fmt: skip
        made.add("observers.0.enabled", False, f"{without}: rank and spread are measured, which find broken runs")
        made.add("observers.1.use", "probe", "a linear classifier beside the run")
        made.add("observers.1.enabled", False, without)
        return
    every = math.ceil(made.epochs / MEASURED)
    times = math.ceil(made.epochs / every)
    made.add("observers.0.every_epochs", every, f"{times} time{'s' * (times > 1)} in the run, and before it")
    in_bank = per_class * min(1.0, BANK / max(1, train))
    k = max(1, min(VOTERS, math.floor(in_bank / 2)))
    why = "as in the literature" if k == VOTERS else f"half of what the smallest class has in the bank ({in_bank:.0f})"
    made.add("observers.0.k", k, f"neighbours that vote: {why}")
