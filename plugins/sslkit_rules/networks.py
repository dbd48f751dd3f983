"""Rules about networks: their normalisation, their precision, and how much of a small image their stem keeps."""

from __future__ import annotations

from sslkit.rules import Facts, Rule, Seen
from sslkit_rules.options import number, used

SMALL_BATCH = 32
"""Images that BatchNorm wants: from 16 on downwards its error grows (Wu & He 2018, figure 1); 32 is what MoCo and most
supervised training have on a device."""
SMALL_VIEW = 64
"""Side of views, in pixels, up to which a stem made for 224 is too coarse."""
COARSE = 4
"""How many times a large-image stem, 7x7 with stride 2 and max-pool, shrinks the picture."""


def _no_normalisation(facts: Facts) -> str | None:
    if facts.normalisation_layers != 0 or facts.prevents_collapse is not False:
        return None
    return "0 normalisation layers in backbone, projector and predictor"


no_normalisation = Rule(
    what="No part of the network normalises, and the loss does not keep outputs apart.",
    severity="warning",
    cause="a backbone and heads without BatchNorm or its like",
    fix="BatchNorm in the heads (projector.hidden_norm = 'batch', predictor.hidden_norm = 'batch'), or a backbone with "
    "BatchNorm, or with GroupNorm and weight standardisation",
    source="Richemond et al. 2020 (arXiv 2010.10241): BYOL without any normalisation learns nothing; with GroupNorm "
    "and weight standardisation it works",
    key="projector",
    before=_no_normalisation,
    explains=("collapse", "dimensional_collapse", "cosine_high", "knn_not_improving", "knn_falling"),
)


def _small(facts: Facts) -> Seen | None:
    images = facts.batch_norm_images
    if not facts.batch_norm_layers or images is None or images >= SMALL_BATCH:
        return None
    of = f" of the {facts.batch_size}" if facts.batch_size and facts.batch_size > images else ""
    accumulated = (number(facts, "train.accumulate") or 1) > 1
    return Seen(
        f"statistics of {facts.batch_norm_layers} BatchNorm layers are of {images}{of} images of a step",
        severity="error" if images < 2 else None,  # one image has no variance
        key="train.accumulate" if accumulated else None,
    )


batch_norm_small = Rule(
    what="BatchNorm sees few images at a time.",
    severity="warning",
    cause="a small batch, many micro-batches or groups of train.batch_norm",
    fix="32 images or more (train.batch_size) for each micro-batch and group, or a network without BatchNorm",
    source="Wu & He 2018 (GroupNorm, arXiv 1803.08494), figure 1; Grill et al. 2020 (BYOL, arXiv 2006.07733), figure "
    "3a: small batches cost accuracy by way of BatchNorm",
    key="train.batch_size",
    before=_small,
)


def _local(facts: Facts) -> str | None:
    if facts.processes < 2 or not facts.batch_norm_layers or facts.batch_norm_synchronised is not False:
        return None
    if facts.batch_norm_shuffled:
        return None
    each = f", {facts.batch_norm_images} images each" if facts.batch_norm_images else ""
    return f"{facts.processes} processes, and each takes BatchNorm's statistics from its own images{each}"


batch_norm_not_synchronised = Rule(
    what="BatchNorm is not synchronised over the processes.",
    severity="warning",
    cause="networks that were not converted before they were distributed",
    fix="convert networks with torch.nn.SyncBatchNorm.convert_sync_batchnorm, which needs GPUs (train.batch_norm = "
    "'sync'), or use networks with GroupNorm",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), section 2.2: global BatchNorm, so that no process knows a "
    "pair by its statistics; BYOL's code has it, too",
    key="train.batch_norm",
    before=_local,
)


def _half(facts: Facts) -> Seen | None:
    if facts.loss_precision == "fp16":
        return Seen("the loss computes in fp16: 1e-12, the usual least norm, is 0 there, and 65,504 the largest number")
    if facts.loss_precision == "bf16":
        return Seen("the loss computes in bf16, which keeps 8 bits: 2 - 2 cos cannot tell .996 from 1", "warning")
    return None


half_precision_loss = Rule(
    what="The loss is computed in half precision.",
    severity="error",
    cause="a loss under autocast; normalising then divides by 0 or overflows",
    fix="convert outputs to float32 before the loss: `.float()`; networks may compute in bf16",
    source="lightly issue 1259: NaN from normalising in fp16",
    key="train.precision",
    before=_half,
    explains=("not_finite",),
)


def _coarse(facts: Facts) -> str | None:
    if facts.stem_stride is None or not facts.view_sizes:
        return None
    if facts.stem_stride < COARSE or max(facts.view_sizes) > SMALL_VIEW:
        return None
    side = facts.view_sizes[0]
    last = f"; the last convolution's map is {facts.last_map}x{facts.last_map}" if facts.last_map else ""
    return f"{side} px are {side / facts.stem_stride:.3g} px after the stem, {facts.stem_stride:g} times fewer{last}"


stem_too_coarse = Rule(
    what="The backbone's stem is made for large images.",
    severity="warning",
    cause="a 7x7 convolution with stride 2 and a max-pool, for 224 px; it costs accuracy, and explains no curve",
    fix="a stem of 3x3 with stride 1 and without max-pool (backbone.stem = 'small_image')",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), appendix B.9",
    key="backbone.stem",
    before=_coarse,
)


def _no_projector(facts: Facts) -> str | None:
    return "the loss is computed on the backbone's features" if used(facts, "projector") == "identity" else None


projector_missing = Rule(
    what="There is no projector between features and loss.",
    severity="warning",
    cause="projector.use = 'identity'",
    fix="put a small MLP between the backbone and the loss (projector.use = 'mlp')",
    source="Chen et al. 2020 (SimCLR, arXiv 2002.05709), section 4.2: features before a non-linear head are better by "
    "more than 10 points",
    key="projector.use",
    before=_no_projector,
)
