"""Rules about what single methods need: DINO's temperatures, its last layer and its tau, and the branch to evaluate."""

from __future__ import annotations

from sslkit.rules import Facts, Rule, Seen
from sslkit_rules.options import number, option, used, values

UNSTABLE = 0.07
"""The teacher's temperature above which DINO's authors call training unstable."""
SMALL_BATCHES, THEIR_TAU = 256, 0.9995
"""What DINO's authors recommend tau to start at, for batches of this size."""
LONG = 20_000
"""Steps of a run in which a tau of .9995 leaves the random start behind: ten times its memory of 2,000 steps."""
ONLINE_IS_KEPT = ("cosine", "nnbyol", "moco", "moco_v3", "ressl", "tico")
"""Losses with a moving average whose papers keep the online network."""

MAIN = "main_dino.py of the authors' code"


def _teacher(facts: Facts) -> str | None:
    if used(facts, "loss") != "dino":
        return None
    teacher = values(option(facts, "loss.teacher_temperature"))
    student = values(option(facts, "loss.student_temperature"))
    if teacher and student and max(teacher) >= min(student):
        return f"the teacher's temperature is up to {max(teacher):g}, the student's {min(student):g}: nothing sharpens"
    if teacher and max(teacher) > UNSTABLE:
        return f"the teacher's temperature is up to {max(teacher):g}, above {UNSTABLE:g}"
    if teacher and teacher[0] >= UNSTABLE:
        return f"the teacher's temperature is {teacher[0]:g} from the start, without a warm-up"
    return None


dino_teacher_temperature = Rule(
    what="DINO's teacher is too warm.",
    severity="warning",
    cause="a temperature for the end of the run at its beginning, or the student's",
    fix="a teacher's temperature of .04, or up to .07 after a warm-up (loss.teacher_temperature = { use = "
    "'piecewise', points = [[0.0, 0.04], [0.1, 0.07]] })",
    source=f"{MAIN}: unstable above .07 in most experiments; Caron et al. 2021 (DINO, arXiv 2104.14294), section 5.3: "
    "without sharpening the output becomes uniform",
    key="loss.teacher_temperature",
    before=_teacher,
    explains=("prototype_collapse", "loss_at_chance", "knn_not_improving", "knn_falling"),
)


def _last_layer(facts: Facts) -> str | None:
    if used(facts, "loss") != "dino" or number(facts, "projector.freeze_last_layer_epochs") != 0:
        return None
    return "projector.freeze_last_layer_epochs is 0: the last layer moves from the first step on"


dino_last_layer = Rule(
    what="DINO's last layer is not kept still in the first epoch.",
    severity="warning",
    cause="freeze_last_layer_epochs = 0",
    fix="freeze the projector's last layer for the first epoch (projector.freeze_last_layer_epochs = 1)",
    source=f"{MAIN}: keeping the output layer fixed in the first epoch helps training",
    key="projector.freeze_last_layer_epochs",
    before=_last_layer,
)


def _dino_tau(facts: Facts) -> str | None:
    tau, batch = facts.tau, facts.batch_size
    if used(facts, "loss") != "dino" or tau is None or batch is None or batch > SMALL_BATCHES:
        return None
    if tau.steps < LONG or tau.start >= THEIR_TAU - 1e-9:
        return None
    return f"tau starts at {tau.start:.9g} with batches of {batch}, over {tau.steps} steps"


dino_tau = Rule(
    what="DINO's tau is low for small batches.",
    severity="warning",
    cause="the default of .996, which is for batches of 1024",
    fix="a tau from .9995 to 1 (target_updater.tau = { use = 'cosine', start = 0.9995, end = 1.0 })",
    source=f"{MAIN}: a higher value for small batches, .9995 for 256",
    key="target_updater.tau",
    before=_dino_tau,
)


def _branch(facts: Facts) -> Seen | None:
    loss = used(facts, "loss")
    if facts.target != "copy" or loss is None:
        return None
    if loss == "dino" and facts.evaluated == "online":
        return Seen(
            "features of the online network are measured, and DINO keeps the target",
            fix="measure and keep the target (target_updater.evaluate = 'target')",
        )
    if loss in ONLINE_IS_KEPT and facts.evaluated == "target":
        return Seen(f"features of the target are measured, and methods with loss {loss!r} keep the online network")
    return None


wrong_branch_evaluated = Rule(
    what="The branch that is measured is not the one that the method keeps.",
    severity="warning",
    cause="target_updater.evaluate of another method",
    fix="measure and keep the online network (target_updater.evaluate = 'online')",
    source="Grill et al. 2020 (BYOL, arXiv 2006.07733), section 3.1: the online encoder is kept; Caron et al. 2021 "
    "(DINO, arXiv 2104.14294), section 5.2: the teacher is better throughout; lightly issue 1471",
    key="target_updater.evaluate",
    before=_branch,
)
