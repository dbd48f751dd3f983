"""Rules about weights that are not trained."""

from __future__ import annotations

from fnmatch import fnmatchcase

from sslkit.rules import Facts, Rule
from sslkit_rules.options import listed, option


def _random(facts: Facts) -> str | None:
    frozen = option(facts, "train.freeze")
    if not frozen or facts.initialised:
        return None
    if not option(facts, "backbone.pretrained"):
        names = [str(name) for name in frozen if not str(name).startswith("patch_embed")]
        return f"{listed(names)}: weights that are drawn from the seed, and stay so" if names else None
    new_stem = option(facts, "backbone.stem") == "small_image" and any(fnmatchcase("conv1", name) for name in frozen)
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
