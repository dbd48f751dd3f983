"""Rules about views: whether they differ, how, and whether their randomness is what it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sslkit.rules import Course, Facts, Rule, Seen
from sslkit_rules.options import listed, option

OURS = ("two_crops", "multi_crop", "affine")
"""Generators whose mean and std are the training images' own unless the recipe has others."""

WEAK = 0.1
"""Mean |v1 - v2| of normalised pixels, below which views hardly differ. Recipes here have .5 to 1.2; on CIFAR-10 flips
alone make .31, crops of .95 of the area .12, and a jitter of .05 makes .07."""

FAR, WIDE = 2.0, 4.0
"""How far from 0 the mean of pixels is allowed to be, and from 1, as a factor, their standard deviation: dark or pale
data normalised with ImageNet's figures stay within, pixels of 0..255 do not."""

CHANCE = 2.5
"""Standard errors above chance within which views of an image agree no better than any others. In 30 batches each of
seven ways to draw views, right pairs had 7.4 and more with the 128 images that are looked at, 4.3 and more with 64; of
wrong ones one in 480 batches had more than 2.5. Blurred crops of at most .2 of the area come down to it with 64."""

MORE = "random resized crops, flips, colour jitter of .4 .4 .2 .1, grey at .2 (view_generator.use = 'two_crops')"


def _identical(facts: Facts) -> str | None:
    if facts.view_difference is None or facts.view_difference[1] != 0:
        return None
    return "max |v1 - v2| = 0 between the views of an image"


def _identical_recorded(course: Course) -> Seen | None:
    steps, _, largest = course.points("view_difference_max")
    same = [step for step, value in zip(steps, largest, strict=True) if value == 0]
    if not same:
        return None
    return Seen(f"max |v1 - v2| = 0 in {len(same)} of {len(steps)} records, first at step {same[0]}", step=same[0])


identical_views = Rule(
    what="The two views of an image are identical.",
    severity="error",
    cause="a transform without randomness, or one that is applied once for both views; the task is then trivial, and "
    "the loss small from the first epoch on",
    fix=MORE,
    source="the forum thread 'Loss is increased after some epochs', whose transform is ToTensor and Normalize; Chen et "
    "al. 2020 (SimCLR, arXiv 2002.05709), section 3",
    key="view_generator.use",
    before=_identical,
    during=_identical_recorded,
    explains=("cosine_high", "knn_not_improving", "knn_falling"),
)


def _strangers(facts: Facts) -> str | None:
    if facts.pairs_agree is None or facts.pairs_agree >= CHANCE:
        return None
    return (
        "the two views of an image are no more alike than views of different images, in colour, layout, texture and "
        f"embedding: {facts.pairs_agree:.3g} standard errors above chance by the best of these, where views of one "
        "image have 4 and more"
    )


pairs_differ = Rule(
    what="The two views of an image seem to be of different images.",
    severity="error",
    cause="an index that is off by one, views that are shuffled apart, or crops so small that they show nothing of "
    "the same thing",
    fix="make both views from one and the same image, and keep their order: what is at place i of one batch belongs to "
    "place i of the other",
    source="ours; Chen et al. 2020 (SimCLR, arXiv 2002.05709), algorithm 1: both views are drawn from one image",
    key="view_generator.use",
    before=_strangers,
    explains=(
        "loss_at_chance",
        "loss_not_falling",
        "collapse",
        "dimensional_collapse",
        "cosine_high",
        "knn_not_improving",
        "knn_falling",
    ),
)


def _weak(facts: Facts) -> str | None:
    if facts.view_difference is None:
        return None
    mean, largest = facts.view_difference
    if largest == 0 or mean >= WEAK:
        return None
    return (
        f"mean |v1 - v2| is {mean:.3g} of a standard deviation of the pixels, max {largest:.3g}; crops and colour "
        "jitter give .5 and more"
    )


weak_views = Rule(
    what="The two views of an image hardly differ.",
    severity="warning",
    cause="transforms that are nearly off; the task is nearly trivial",
    fix=MORE,
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), section 3 and figure 5: strong crops and colours decide what "
    "is learnt; the limit is ours, a fifth of the least that recipes here have",
    key="view_generator.use",
    before=_weak,
    explains=("cosine_high", "knn_not_improving", "knn_falling"),
)


def _keeps_colour(facts: Facts) -> str | None:
    """By the options of sslkit's own generators; of others nothing is known."""
    table = option(facts, "view_generator")
    if not isinstance(table, Mapping) or _identical(facts):
        return None
    if table.get("use") == "affine":
        off = table.get("appearance") is False
        changed = any(table.get(name) for name in ("light", "grayscale", "contrast", "offset"))
        return None if changed and not off else "light, grayscale, contrast and offset are off in both views"
    if table.get("use") not in ("two_crops", "multi_crop"):
        return None
    groups = [group for group in table.get("views") or () if isinstance(group, Mapping)]
    if any(_changes_colour({**table, **group}) for group in groups or [{}]):
        return None
    return "colour jitter and grayscale are off in every view"


def _changes_colour(view: Mapping[str, Any]) -> bool:
    strengths = any(view.get(name) for name in ("brightness", "contrast", "saturation", "hue"))
    return bool((view.get("jitter") and strengths) or view.get("grayscale"))


def _scale(facts: Facts) -> str | Seen | None:
    for what, scale in (("gets in training", facts.view_scale), ("is measured on", facts.clean_scale)):
        if scale is not None and not (abs(scale[0]) <= FAR and 1 / WIDE <= scale[1] <= WIDE):
            seen = f"pixels that the backbone {what} have mean {scale[0]:.3g} and deviation {scale[1]:.3g}, not 0 and 1"
            return _by_their_own(facts, seen) or seen
    return None


def _by_their_own(facts: Facts, seen: str) -> Seen | None:
    """What is wrong where the images' own mean and deviation are taken, which no option was given for."""
    table = option(facts, "view_generator")
    if not isinstance(table, Mapping) or table.get("use") not in OURS:
        return None
    if any(table.get(name) is not None for name in ("mean", "std")):
        return None
    ranged = option(facts, "data_source.value_range") is not None
    return Seen(
        f"{seen}, though the training images' own figures were taken",
        cause="a band that has nearly one value in all images, as one has that lies outside data_source.value_range",
        fix=("take a range that holds the values of every band (data_source.value_range)" if ranged else
             "look at each band's values") + ", or leave bands that hold nothing out (data_source.bands)",
        key="data_source.value_range" if ranged else "data_source",
    )  # fmt: skip


views_not_normalised = Rule(
    what="The views are not normalised.",
    severity="warning",
    cause="the mean and standard deviation of other data, or pixels on the scale 0..255",
    fix="normalise by the mean and standard deviation of the data on the scale 0..1 (leave view_generator.mean and "
    ".std out, which takes these)",
    source="ours; every method's code normalises by channel",
    key="view_generator.mean",
    before=_scale,
    explains=("knn_not_improving",),
)


views_keep_colour = Rule(
    what="The views keep the image's colours and light: matching those is all that the task asks.",
    severity="warning",
    cause="views that differ in geometry alone",
    fix="turn changes of colour on: jitter, brightness, contrast, saturation, hue and grayscale of two_crops, or "
    "appearance = true of affine",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), section 3.1 and figure 6: histograms of colours alone tell "
    "images apart; Grill et al. 2020 (BYOL, arXiv 2006.07733), figure 3b",
    key="view_generator",
    before=_keeps_colour,
    explains=("cosine_high", "knn_not_improving", "knn_falling"),
)


def _per_batch(facts: Facts) -> str | None:
    if facts.images_share_draws:
        return "copies of one image in a batch have the same views"
    if facts.shared_draws:
        return f"what is drawn as {listed(facts.shared_draws)} is the same for all images of a batch"
    return None


one_draw_per_batch = Rule(
    what="One draw of crop or colour serves all images of a batch.",
    severity="warning",
    cause="parameters drawn once for the whole batch, as batched transforms do unless told otherwise",
    fix="draw parameters for every image: the leading dimension of all that `draw(n, generator)` gives is n",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), section 2.1, algorithm 1: transforms are drawn for each "
    "image; torchvision issue 2929",
    key="view_generator.use",
    before=_per_batch,
    explains=(
        "loss_rise",
        "rate_oscillation",
        "knn_not_improving",
        "knn_falling",
    ),
)


def _per_run(facts: Facts) -> str | None:
    return "the views of the same images at step 0 and at step 1 are equal" if facts.steps_share_draws else None


one_draw_per_run = Rule(
    what="An image has the same views at every step.",
    severity="error",
    cause="a random stream that begins anew with each batch, or transforms without randomness; two fixed pictures of "
    "each image can be learnt by heart",
    fix="draw from the generator that `draw(n, generator)` is given, and seed nothing inside",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), algorithm 1; PyTorch issue 5059: workers that repeat one "
    "random stream",
    key="view_generator.use",
    before=_per_run,
    explains=("cosine_high", "knn_not_improving", "knn_falling"),
)


def _unkeyed(facts: Facts) -> str | None:
    return "the same generator gave other views the second time" if facts.draws_are_keyed is False else None


draws_not_keyed = Rule(
    what="The views' randomness does not come from the generator that they are given.",
    severity="warning",
    cause="random numbers drawn from a global stream, or in `crop` and `appear` instead of `draw`",
    fix="draw all random parameters in `draw(n, generator)`, from its generator",
    source="sslkit's contract `ViewMaker`: without it a run cannot be repeated, nor go on exactly where it stopped",
    key="view_generator.use",
    before=_unkeyed,
)
