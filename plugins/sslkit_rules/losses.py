"""Rules about losses: their scale and sign, their queues, their negatives, and what they should not look at."""

from __future__ import annotations

import math

from sslkit.rules import Facts, Rule, Seen
from sslkit_rules.options import listed, option, used, values

IN_BATCH = ("nt_xent", "moco_v3", "nnclr")
"""Losses that tell an image apart from the others of its batch. DCL is made for small batches."""
FEW_IMAGES = 64
"""Images in a batch that such losses want: SimCLR's smallest is 256, lightly's CIFAR-10 benchmark has 128."""
APART = {
    "vicreg": ("variance", "covariance"), "vibcreg": ("variance", "covariance"), "barlow_twins": ("off_diagonal",),
    "lejepa": ("sigreg",), "tico": ("rho",),
}  # fmt: skip
"""Weights of the terms without which a constant output, or one of few dimensions, is the best solution."""
EVEN = 0.2
"""SwAV's epsilon above which its codes are nearly uniform: cosines differ by some tenths."""
COLD, HOT = 0.03, 1.0
"""Temperatures that SimCLR's table 5 has (.05 to 1) end here; MoCo v3 has 1, and no paper more."""

COUNTED = 1.9
"""Terms as large as the positive's from which on one of them is too many; a mask that puts 0 for a similarity adds less
than one, and matters little."""


def _halved(facts: Facts) -> Seen | None:
    scale = facts.byol_scale
    if scale is None or not any(abs(scale - wrong) < 0.01 * wrong for wrong in (0.5, 0.25)):
        return None
    if scale < 0.4 and facts.target != "copy":  # SimSiam's own form
        return None
    text = f"the loss is {scale:.3g} times as steep as the sum of 2 - 2 cos over both directions"
    # LARS with clip_lr is plain SGD wherever its own rate is above lr.
    clipped = facts.optimizer == "lars" and option(facts, "optimizer.clip_lr")
    if facts.optimizer in ("adam", "adamw", "lars") and not clipped:
        return Seen(f"{text}; {facts.optimizer} scales gradients itself, so it changes next to nothing here", "info")
    return Seen(text)


loss_halved = Rule(
    what="BYOL's loss is averaged where the reference sums.",
    severity="warning",
    cause="the mean of both directions, or of cosines; a learning rate found with the sum is then too low",
    fix="sum both directions (loss.form = 'byol'), or raise the learning rate (optimizer.lr) by the same factor",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.1: the sum; lightly pull request 1286",
    key="loss.form",
    before=_halved,
)


def _prefers_apart(facts: Facts) -> str | None:
    # With labels, images that agree are those of one class, which the made-up outputs do not follow.
    if facts.agreement is None or facts.agreement[0] < facts.agreement[1] or facts.reads_labels:
        return None
    same, apart = facts.agreement
    return f"the loss is {same:.5g} for views that agree in everything and {apart:.5g} for views with nothing in common"


loss_prefers_disagreement = Rule(
    what="The loss is no lower where an image's views agree.",
    severity="error",
    cause="a sign, or views that are paired with those of other images",
    fix="look at the sign of the loss, and that row i of every branch is of image i",
    source="what every loss of this kind is for: Wang & Isola 2020 (arXiv 2005.10242), section 4.1, alignment",
    key="loss.use",
    before=_prefers_apart,
    explains=("loss_at_chance", "loss_not_falling", "collapse", "knn_not_improving", "knn_falling"),
)


def _dead(facts: Facts) -> Seen | None:
    # Projections may serve as targets without a gradient where predictions are what learns.
    spared = "projections" if facts.wants_predictions else "nothing"
    dead = [name for name in facts.dead_inputs or () if not name.startswith(spared)]
    if not dead:
        return None
    return Seen(f"no gradient reaches {listed(dead)}")


loss_without_gradient = Rule(
    what="The loss asks for outputs of the online network and gives them no gradient.",
    severity="warning",
    cause="a detach too many, or a direction of the pair that was left out",
    fix="detach targets only, and ask in `needs` for nothing that the loss does not use",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.1, and Chen & He 2021 (SimSiam, arXiv 2011.10566), "
    "table 7: one direction alone costs accuracy",
    key="loss.use",
    before=_dead,
    explains=("no_gradient", "loss_not_falling", "knn_not_improving"),
)


def _lengths(facts: Facts) -> str | None:
    # DINO's cross-entropy, in which lengths sharpen, has no predictions.
    if facts.prevents_collapse is not False or not facts.wants_predictions or not facts.scale_sensitive:
        return None
    return "the loss changes where all outputs are twice as long, and nothing in it keeps them apart"


loss_not_normalised = Rule(
    what="The loss depends on how long the outputs are: they are not normalised.",
    severity="warning",
    cause="a squared error of the outputs as they are: shorter outputs lower it without agreeing any better",
    fix="divide predictions and targets by their lengths (torch.nn.functional.normalize; loss.use = 'cosine'); accept "
    "the finding where lengths are meant",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), equation 2: the squared error of unit vectors, 2 - 2 cos",
    key="loss.use",
    before=_lengths,
    explains=("loss_rise", "collapse", "dimensional_collapse", "knn_not_improving", "knn_falling"),
)


# ---------------------------------------------------------------- queues


def _never_full(facts: Facts) -> str | None:
    for queue in facts.queues:
        pushed = queue.pushed_per_step * (facts.total_steps or 0)
        if facts.total_steps is not None and queue.rows > pushed:
            return f"the queue holds {queue.rows} rows, and the whole run pushes {pushed}: the others stay random"
    return None


queue_never_full = Rule(
    what="The loss's queue is never full: some of it stays random.",
    severity="warning",
    cause="a queue made for more data or more epochs",
    fix="a smaller queue (loss.queue)",
    source="He et al. 2020 (MoCo, arXiv 1911.05722), section 3.2: the queue holds keys of earlier batches",
    key="loss.queue",
    before=_never_full,
)


def _exceeds(facts: Facts) -> Seen | None:
    for queue in facts.queues:
        if not facts.batch_size or not facts.train_images or queue.pushed_per_step < 1:
            continue
        images = queue.rows * facts.batch_size // queue.pushed_per_step
        if images > facts.train_images:
            text = f"the queue's {queue.rows} rows are of {images} images, and there are {facts.train_images}"
            return Seen(text if queue.negatives else f"{text}; solo-learn's CIFAR recipes have it so, too",
                        severity=None if queue.negatives else "info")  # fmt: skip
    return None


queue_exceeds_data = Rule(
    what="The loss's queue holds more images than there are: an image meets older rows of itself.",
    severity="warning",
    cause="a queue made for a larger data set",
    fix="a queue (loss.queue) well below the number of training images",
    source="moco issue 146; He et al. 2020 (MoCo, arXiv 1911.05722), table 1: 65,536 rows of 1.28 million images",
    key="loss.queue",
    before=_exceeds,
)


def _rest(facts: Facts) -> str | None:
    for queue in facts.queues:
        rest = queue.rows % queue.pushed_per_step if queue.pushed_per_step > 0 else 0
        if rest:
            return f"{queue.rows} rows, {queue.pushed_per_step} pushed in a step: {rest} remain"
    return None


queue_not_divisible = Rule(
    what="The loss's queue is no multiple of what a step pushes.",
    severity="info",
    cause="sslkit's queue wraps around and loses nothing; MoCo's code refuses it",
    fix="a queue (loss.queue) that is a multiple of the rows that a step pushes",
    source="moco issue 146, and the assertion in MoCo's code",
    key="loss.queue",
    before=_rest,
)


def _leak(facts: Facts) -> str | None:
    negatives = any(queue.negatives for queue in facts.queues)
    if not negatives or not facts.batch_norm_layers or facts.batch_norm_shuffled is not False or facts.target != "copy":
        return None
    return (
        f"{facts.batch_norm_layers} BatchNorm layers, query and key normalised with the same images, and the negatives "
        "from other batches"
    )


moco_leak = Rule(
    what="BatchNorm gives the key away: it shares its batch with the query, and the queue does not.",
    severity="warning",
    cause="BatchNorm without MoCo's shuffling",
    fix="shuffle the target's batch between the groups that BatchNorm sees (train.batch_norm = 'split:8'), or take a "
    "network without BatchNorm",
    source="He et al. 2020 (MoCo, arXiv 1911.05722), section 3.3 and figure A.1: the pretext task is solved, and "
    "nothing learnt; moco issue 46",
    key="train.batch_norm",
    before=_leak,
    explains=("knn_not_improving", "knn_falling"),
)


# ---------------------------------------------------------------- negatives, temperature, labels


def _few(facts: Facts) -> str | None:
    loss = used(facts, "loss")
    if loss not in IN_BATCH or facts.batch_size is None or facts.batch_size >= FEW_IMAGES:
        return None
    return f"loss {loss!r} tells an image apart from the {facts.batch_size - 1} others of its batch"


few_negatives = Rule(
    what="There are few negatives: the batch is small for a loss that compares its images.",
    severity="warning",
    cause="a small train.batch_size",
    fix="a batch of 128 images or more (train.batch_size), a loss with a queue (loss.use = 'moco'), or one made for "
    "small batches (loss.use = 'dcl')",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), figure 9; Yeh et al. 2022 (DCL, arXiv 2110.06848), section 4",
    key="train.batch_size",
    before=_few,
)


def _among_negatives(facts: Facts) -> str | None:
    counted = facts.positives_counted
    if counted is None or counted < COUNTED:
        return None
    return (
        f"where an image's two views agree and other images are far, {counted:.3g} terms in the denominator are as "
        f"large as the positive's, itself included: the loss cannot fall below ln {counted:.3g} = "
        f"{math.log(counted):.3g}"
    )


own_view_among_negatives = Rule(
    what="A view is told apart from itself, or from its own positive: the denominator counts it as a negative.",
    severity="warning",
    cause="similarities of views to themselves that are not masked, or a positive that is added to a sum which has it",
    fix="leave the diagonal out of the similarities: masked_fill(torch.eye(2 * N, dtype=torch.bool), -inf)",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), equation 1: the sum is over k other than i",
    key="loss.use",
    before=_among_negatives,
    explains=("loss_at_chance", "loss_not_falling", "knn_not_improving", "knn_falling"),
)


def _temperature(facts: Facts) -> Seen | None:
    for name in ("temperature", "student_temperature"):
        turns = values(option(facts, f"loss.{name}"))
        wrong = [value for value in turns if not COLD <= value <= HOT]
        if wrong:
            return Seen(f"loss.{name} is {wrong[0]:g}; papers have .05 to 1", key=f"loss.{name}")
    return None


temperature_extreme = Rule(
    what="The loss's temperature is outside of what papers have tried.",
    severity="warning",
    cause="similarities multiplied where they are to be divided, or a unit mistaken",
    fix="a temperature between .07 and .5 (loss.temperature)",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), table 5: .05 to 1; Wang & Liu 2021 (arXiv 2012.09740)",
    key="loss.temperature",
    before=_temperature,
    explains=("not_finite", "loss_at_chance", "prototype_collapse", "knn_not_improving", "knn_falling"),
)


def _off(facts: Facts) -> Seen | None:
    for name in APART.get(used(facts, "loss") or "", ()):
        turns = values(option(facts, f"loss.{name}"))
        if turns and not any(turns):
            return Seen(f"loss.{name} is 0", key=f"loss.{name}")
    return None


regulariser_off = Rule(
    what="A term that keeps outputs apart is switched off.",
    severity="warning",
    cause="a weight of 0",
    fix="the weight that its paper has (see the recipe of the method, such as vicreg_cifar10)",
    source="Bardes et al. 2022 (VICReg, arXiv 2105.04906), section 5: collapse without the variance term, and less "
    "accuracy without the covariance term; Zbontar et al. 2021 (Barlow Twins, arXiv 2103.03230), table 3",
    key="loss.use",
    before=_off,
    explains=(
        "collapse",
        "dimensional_collapse",
        "cosine_high",
        "knn_not_improving",
        "knn_falling",
        "loss_at_chance",
    ),
)


def _epsilon(facts: Facts) -> str | None:
    epsilon = max(values(option(facts, "loss.epsilon")), default=0.0) if used(facts, "loss") == "swav" else 0.0
    return f"loss.epsilon is {epsilon:g}, above {EVEN:g}" if epsilon > EVEN else None


sinkhorn_epsilon = Rule(
    what="SwAV's epsilon is so large that every image is given to all prototypes alike.",
    severity="warning",
    cause="a value of another implementation, such as one that multiplies by it",
    fix="an epsilon between .02 and .1, .05 in the paper (loss.epsilon)",
    source="Caron et al. 2020 (SwAV, arXiv 2006.09882), section 3.1: a strong entropy ends in a trivial solution; "
    "the limit is four times the paper's value",
    key="loss.epsilon",
    before=_epsilon,
    explains=("prototype_collapse", "loss_at_chance", "knn_not_improving", "knn_falling"),
)


def _labels(facts: Facts) -> Seen | None:
    if not facts.reads_labels:
        return None
    if used(facts, "loss") == "supcon":
        return Seen("loss 'supcon' changes with the labels, as it is meant to: its accuracy is supervised", "info")
    name = used(facts, "loss")
    return Seen(f"{f'loss {name!r}' if name else 'the loss'} is another number with other labels")


labels_in_loss = Rule(
    what="The loss reads the labels: this is no self-supervised run.",
    severity="warning",
    cause="labels of the batch that enter the loss",
    fix="leave `branches.labels` alone, or compare the run with supervised ones only",
    source="Khosla et al. 2020 (SupCon, arXiv 2004.11362) for what labels add; lejepa issue 39 for a leak by mistake",
    key="loss.use",
    before=_labels,
)
