"""Rules about the optimizer: what it has, at which rates, and what it decays."""

from __future__ import annotations

from sslkit.rules import Facts, Rule, Seen
from sslkit_rules.options import listed, number, option, used, values

ADAM = ("adam", "adamw", "nadam", "radam")
ADAM_HIGH = 5e-3
"""Five times what papers that train with Adam take (LeJEPA's .002 is the highest here but for the quickstart's .005,
on a network of three layers)."""
SGD_HIGH = 1.0
"""Of SGD's rate for 256 images: ten times Goyal's .1, thirty times MoCo's .03."""
LARS_LOW, LARS_HIGH = 5e-5, 0.2
"""Of lr * eta for 256 images, by how much of its length a weight moves in one step, momentum aside. BYOL and SimCLR
have .0002 and .0003 (lr .2 and .3, eta .001), solo-learn's CIFAR recipes up to .02."""
DECAY_HIGH, ADAMW_DECAY_HIGH = 5e-3, 0.5
"""Ten times SimSiam's 5e-4, the largest of papers with coupled decay; DINO's AdamW ends at .4."""
UNSTABLE = (
    "not_finite", "gradient_spike", "loss_rise", "loss_at_chance", "loss_not_falling", "collapse",
    "dimensional_collapse", "partial_collapse", "knn_not_improving", "knn_falling", "rate_oscillation")  # fmt: skip
"""What a wrong learning rate brings about."""
PREDICTOR_LOW = 0.5
"""Of the backbone's rate: SimSiam's and FastSiam's predictors have at least the same."""


def _unoptimised(facts: Facts) -> str | None:
    if not facts.unoptimised:
        return None
    return f"the optimizer has none of these {len(facts.unoptimised)}: {listed(facts.unoptimised)}"


predictor_untrained = Rule(
    what="Trainable parameters are missing from the optimizer.",
    severity="error",
    cause="an optimizer that was given the backbone's parameters alone; a predictor that stays random collapses or "
    "learns nothing",
    fix="give the optimizer every parameter of backbone, projector, predictor and loss, or freeze those meant to stay: "
    "requires_grad_(False)",
    source="Chen & He 2021 (SimSiam, arXiv 2011.10566), table 1b: a fixed random predictor does not converge",
    key="optimizer.use",
    before=_unoptimised,
    explains=(
        "no_gradient",
        "loss_at_chance",
        "loss_not_falling",
        "collapse",
        "dimensional_collapse",
        "cosine_high",
        "knn_not_improving",
        "knn_falling",
    ),
)


def _rate_zero(facts: Facts) -> Seen | None:
    for part, rate in (facts.lr or {}).items():
        if rate.most == rate.least == 0:
            key = f"optimizer.groups.{part}.lr"
            return Seen(
                f"the {part}'s learning rate is 0 at each of {rate.steps} steps",
                key=key if option(facts, key) is not None else "optimizer.lr",
            )
    return None


rate_zero = Rule(
    what="A part of the model never learns: its learning rate is 0.",
    severity="error",
    cause="a rate that was scaled or rounded to nothing",
    fix="set the rate (optimizer.lr), or leave that part to the rate of the others (no optimizer.groups for it)",
    source="Chen & He 2021 (SimSiam, arXiv 2011.10566), table 1b, for a predictor that stays random",
    key="optimizer.lr",
    before=_rate_zero,
    explains=("loss_not_falling", "knn_not_improving"),
)


def _predictor_slow(facts: Facts) -> str | None:
    rates = facts.lr or {}
    if facts.prevents_collapse is not False or not {"backbone", "predictor"} <= rates.keys():
        return None
    backbone, predictor = rates["backbone"], rates["predictor"]
    if not 0 < predictor.most < PREDICTOR_LOW * backbone.most:
        return None
    return f"the predictor's learning rate is at most {predictor.most:.3g}, the backbone's {backbone.most:.3g}"


predictor_rate_low = Rule(
    what="The predictor learns more slowly than the backbone.",
    severity="warning",
    cause="a rate of its own that is lower than the rest's",
    fix="give the predictor the rate of the rest (no optimizer.groups.predictor.lr), or the backbone's highest rate, "
    "constant as in SimSiam",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), table 21: without a slow target it takes a predictor that is "
    "near its optimum, with a rate above the rest's; Chen & He 2021 (SimSiam, arXiv 2011.10566), table 1c",
    key="optimizer.groups.predictor.lr",
    before=_predictor_slow,
    explains=(
        "collapse",
        "dimensional_collapse",
        "cosine_high",
        "knn_not_improving",
        "knn_falling",
        "rate_oscillation",
    ),
)


def _decayed(facts: Facts) -> Seen | None:
    if not facts.decayed_biases:
        return None
    if facts.optimizer == "lars":
        return Seen("bias and normalisation parameters take part in LARS's adaptation and in weight decay")
    whose = f"the weight decay of {facts.optimizer or 'the optimizer'}"
    usual = ", as in SimSiam and MoCo" * (facts.optimizer == "sgd")
    return Seen(f"bias and normalisation parameters take part in {whose}{usual}", severity="info")


decay_on_biases = Rule(
    what="Bias and normalisation parameters are decayed.",
    severity="warning",
    cause="one parameter group for all",
    fix="put them into a parameter group without decay and adaptation (optimizer.exclude_bias_and_norm = true)",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.3, and Chen et al. 2020 (SimCLR, arXiv 2002.05709), "
    "appendix B: both leave them out of LARS's adaptation and decay; with plain SGD, SimSiam and MoCo do not",
    key="optimizer.exclude_bias_and_norm",
    before=_decayed,
)


def _peak(facts: Facts) -> float | None:
    """The highest learning rate of any part."""
    return max((rate.most for rate in (facts.lr or {}).values()), default=None)


def _adam(facts: Facts) -> Seen | None:
    peak = _peak(facts)
    if facts.optimizer not in ADAM or peak is None or peak <= ADAM_HIGH * (1 + 1e-9):
        return None
    lent = "a rate made for LARS or SGD: Adam's steps are as long as its rate, whatever the gradient"
    return Seen(f"the learning rate of {facts.optimizer} rises to {peak:.3g}", cause=lent if peak >= 0.02 else None)


adam_rate_high = Rule(
    what="The learning rate is too high for Adam.",
    severity="warning",
    cause="a rate from another method or a larger batch",
    fix="a learning rate from 3e-4 to 1e-3, with a warm-up (optimizer.lr = { use = 'warmup_cosine', peak = 0.001, "
    "warmup_epochs = 1 })",
    source="byol-pytorch issues 39 and 44; the limit of .005 is five times what papers take",
    key="optimizer.lr",
    before=_adam,
    explains=UNSTABLE,
)


def _sgd(facts: Facts) -> str | None:
    peak, batch = _peak(facts), facts.batch_size
    if facts.optimizer != "sgd" or peak is None or not batch:
        return None
    usual = peak * 256 / batch
    if usual <= SGD_HIGH * (1 + 1e-9):
        return None
    return f"the learning rate of sgd rises to {peak:.3g} with batches of {batch}: {usual:.3g} for 256 images"


sgd_rate_high = Rule(
    what="The learning rate is too high for SGD.",
    severity="warning",
    cause="a rate made for LARS, or scaled by the batch size twice",
    fix="a learning rate between .03 and .3 for 256 images, in proportion to the batch (optimizer.lr, "
    "optimizer.lr_reference_batch = 256)",
    source="Goyal et al. 2017 (arXiv 1706.02677), section 2.1: .1 for 256 images; He et al. 2020 (MoCo, arXiv "
    "1911.05722), section 4: .03; Chen & He 2021 (SimSiam, arXiv 2011.10566), section 3: .05",
    key="optimizer.lr",
    before=_sgd,
    explains=UNSTABLE,
)


def _lars(facts: Facts) -> Seen | None:
    peak, batch, eta = _peak(facts), facts.batch_size, number(facts, "optimizer.eta")
    if facts.optimizer != "lars" or peak is None or not peak > 0 or not batch or eta is None:
        return None
    moved = peak * eta * 256 / batch
    text = f"lr {peak:.3g} times eta {eta:g} with batches of {batch} moves a weight by {peak * eta:.2g} of its length"
    if moved < LARS_LOW:
        return Seen(f"{text}; papers have .0002 or more for 256 images", cause="a rate made for Adam or SGD")
    if peak * eta > LARS_HIGH:
        return Seen(f"{text} in a step; papers have .02 or less", cause="an eta left out of the product")
    return None


lars_rate = Rule(
    what="The product of LARS's learning rate and eta is far from what papers have.",
    severity="warning",
    cause="a rate that belongs to another eta",
    fix="BYOL: a learning rate of .2 for 256 images with an eta of .001 (optimizer.lr, optimizer.eta); on CIFAR-10 .3 "
    "to 1 with .02",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.3; Chen et al. 2020 (SimCLR, arXiv 2002.05709), "
    "section 2.2; solo-learn's CIFAR recipes; the limits are a quarter of the least and ten times the most",
    key="optimizer.lr",
    before=_lars,
    explains=UNSTABLE,
)


def _decay(facts: Facts) -> str | Seen | None:
    name = facts.optimizer or used(facts, "optimizer")
    decay = max(values(option(facts, "optimizer.weight_decay")), default=0.0)
    if name == "adamw" and decay > ADAMW_DECAY_HIGH:
        return Seen(f"weight decay is {decay:g} with adamw; papers have .4 or less", cause="")
    if name in ("sgd", "lars", "adam") and decay > DECAY_HIGH:
        return f"weight decay is {decay:g} with {name}; papers have 5e-4 or less"
    return None


decay_high = Rule(
    what="The weight decay is far above what papers have.",
    severity="warning",
    cause="a decay made for AdamW, which multiplies it by the learning rate alone",
    fix="a weight decay (optimizer.weight_decay) between 1e-6 and 5e-4 for SGD, LARS and Adam; .04 to .4 for AdamW",
    source="Chen & He 2021 (SimSiam, arXiv 2011.10566), appendix D: 5e-4; Caron et al. 2021 (DINO, arXiv 2104.14294), "
    "section 3.2: AdamW, .04 to .4; the limits are ten times the one and above the other",
    key="optimizer.weight_decay",
    before=_decay,
    explains=("collapse", "dimensional_collapse", "knn_not_improving"),
)
