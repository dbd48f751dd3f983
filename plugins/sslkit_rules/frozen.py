"""Rules about weights that are not trained."""

from __future__ import annotations

from fnmatch import fnmatchcase

from sslkit.rules import Facts, Rule
from sslkit_rules.options import listed, option


def _random(facts: Facts) -> str | None:
    frozen = option(facts, "train.freeze")
    from_timm = facts.initialised_by == "timm"
    if not frozen or (facts.initialised and not from_timm):
        return None
    if not from_timm and not option(facts, "backbone.pretrained"):
        names = [str(name) for name in frozen if not str(name).startswith("patch_embed")]
        return f"{listed(names)}: weights that are drawn from the seed, and stay so" if names else None
    stem = [name for name in ("conv1", "conv1.weight") if any(fnmatchcase(name, pattern) for pattern in frozen)]
    new_stem = option(facts, "backbone.stem") == "small_image" and stem
    return "conv1 of the small-image stem is drawn from the seed, pretrained or not, and stays so" if new_stem else None


frozen_random = Rule(
    what="Modules are frozen that were never trained.",
    severity="warning",
    cause="train.freeze without weights to begin with",
    fix="begin with the weights of a run, a file or timm, or with pretrained ones (backbone.pretrained = true), or "
    "freeze nothing (train.freeze)",
    source="Chen et al. 2021 (MoCo v3, arXiv 2104.02057), section 4.2: a ViT's patch projection may stay random, and "
    "is let pass here; of stages of a network that stay so we know no paper",
    key="train.freeze",
    before=_random,
)
