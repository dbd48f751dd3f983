"""Rules about what is measured: whether anything can tell a good run from a bad one, and whether it can be believed."""

from __future__ import annotations

import re

from sslkit.rules import Course, Facts, Rule, Seen

ACCURACY = re.compile(r"knn|probe|linear_|acc|top_?[15]\b|\bmap\b|m_?iou|auc|\bf1\b|recall", re.IGNORECASE)
"""Names of columns that hold a metric of quality."""
PRETEXT = re.compile(r"contrastive|pretext|inst|_k$|temperature|bank|queries", re.IGNORECASE)
"""Names that look like one and say how well the loss's own task is solved, or how a metric was measured."""
HEALTH = frozenset(("effective_rank", "rankme", "alpha_req", "lidar", "projection_rank", "std_sqrt_d", "uniformity"))
"""Metrics that tell a collapse without labels, though they rank no methods."""

SHARED_ERROR, SHARED_WARNING = 0.05, 0.005
"""Shares of the test images. Each may raise the accuracy by its own size: more than methods differ by, and about what
seeds differ by."""

EQUAL_ERROR, EQUAL_WARNING = 0.5, 0.1
"""Shares of the training images that are one picture. Blank tiles of a large scan may be some hundredths."""


def _no_quality(facts: Facts) -> Seen | None:
    if facts.quality is None or facts.quality:
        return None
    if facts.labelled is False:
        bare = facts.classes is None
        return Seen(
            f"{'the images have no labels' if bare else 'there are no labelled test images'}, so neither kNN nor a "
            "probe can be measured: rank and spread tell a collapse, and do not rank runs",
            severity="info",
            fix="a few hundred labelled images as test and bank make kNN possible" if bare else
            "labelled images to test on, or a tenth of the training images held out (data_source.hold_out = 0.1), make "
            "kNN possible",
        )  # fmt: skip
    labelled = "the images have labels, and " if facts.labelled else ""
    return Seen(f"{labelled}neither kNN nor a probe is measured")


def _loss_alone(course: Course) -> Seen | None:
    """Records of losses, and of nothing that could tell good from bad."""
    if course.facts.quality:
        return None
    keys = {key for record in course.records for key in record}
    if not any("loss" in key.lower() for key in keys) or keys & HEALTH:
        return None
    if any(ACCURACY.search(key) and not PRETEXT.search(key) for key in keys):
        return None
    others = sorted(key for key in keys if key not in ("step", "epoch") and "loss" not in key.lower())
    beside = f" beside {', '.join(others[:4])}" if others else ""
    return Seen(
        f"{len(course.records)} records of the loss{beside}: no accuracy of kNN or a probe, no rank, no spread",
        severity="error",
    )


no_quality_metric = Rule(
    what="No metric of quality is measured: a loss cannot rank self-supervised runs.",
    severity="warning",
    cause="kNN and the probe are switched off, or the run has only ever printed its loss",
    fix="measure kNN accuracy beside the random network's (leave the observers knn and probe on; for a loop of your "
    "own sslkit.watch(labelled=...)); with labels for a part of the images alone, use those",
    source="the forum thread 'Loss is increased after some epochs'; Garrido et al. 2023 (RankMe, arXiv 2210.02885), "
    "section 1: losses say nothing of the quality of features",
    key="observers",
    before=_no_quality,
    during=_loss_alone,
)


def _shared(facts: Facts) -> Seen | None:
    share = facts.shared_images
    if not share:
        return None
    text = f"{share:.2%} of the test images looked at are among the training images, pixel for pixel"
    return Seen(text, "error" if share > SHARED_ERROR else "warning" if share > SHARED_WARNING else "info")


test_images_in_training = Rule(
    what="Test images are among the training images.",
    severity="error",
    cause="splits that overlap, or one folder for both",
    fix="take test images from a split of their own; kNN finds a test image's own copy in its bank",
    source="Barz & Denzler 2020 (arXiv 1902.00423): duplicates across the splits of CIFAR raise accuracies; the limits "
    "are about what methods and seeds differ by",
    key="data_source",
    before=_shared,
)


def _one_class(facts: Facts) -> str | None:
    for what, classes in (("training", facts.classes), ("test", facts.test_classes)):
        if facts.quality and classes == 1:
            return f"the labels of the {what} images name 1 class"
    return None


one_class = Rule(
    what="All labels are the same: accuracies of kNN and the probe say nothing.",
    severity="warning",
    cause="one folder for all images, or labels that were not read",
    fix="labels of two classes or more, in training and test images alike; without them, switch the observers knn and "
    "probe off (enabled = false)",
    source="Wu et al. 2018 (arXiv 1805.01978), section 3.4: neighbours vote for their classes, and where there is one, "
    "it wins whatever the features are",
    key="data_source",
    before=_one_class,
)


def _equal(facts: Facts) -> Seen | None:
    share = facts.commonest_image
    if share is None or share <= EQUAL_WARNING:
        return None
    text = f"{share:.1%} of the training images looked at are one and the same picture, pixel for pixel"
    return Seen(text, "error" if share > EQUAL_ERROR else "warning")


equal_images = Rule(
    what="Many training images are one and the same picture.",
    severity="error",
    cause="a reader that returns one image again and again, or blank images in the place of what could not be read",
    fix="look at the images (sslkit views RECIPE), and leave out those that are blank or copies",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), section 2.1: an image's views are alike and those of others "
    "are not, which copies are both of; the limits are ours",
    key="data_source",
    before=_equal,
    explains=("loss_at_chance", "collapse", "dimensional_collapse", "knn_not_improving", "knn_falling"),
)
