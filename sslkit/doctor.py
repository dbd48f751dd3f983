"""What is known to go wrong, told before training: static findings over a recipe's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from sslkit.errors import UserError, did_you_mean

ERRORS = {
    "tau_above_one": "the target's tau is above 1 at some step",
    "tau_below_zero": "the target's tau is below 0 at some step",
    "tau_falls": "the target's tau falls from one step to the next",
}
"""Every finding that stops a run before it starts, by the id that `train.accept` takes."""

WARNINGS = {
    "ema_missing": "the target is the online network itself, and the projector's output is not normalised",
    "predictor_missing": "the loss relies on a predictor, and the predictor learns nothing",
    "tau_low": "the target's tau is below 0.5 at the start: the target is nearly the online network",
    "queue_never_full": "the loss's queue holds more rows than the run will push, so some stay random",
    "target_frozen": "the target's tau is 1 at every step: the target never moves",
}
"""Every finding that a run is warned of and goes on with, by the id that `train.accept` takes."""


@dataclass(frozen=True)
class Finding:
    """Something known to go wrong: its id, the key of the recipe that is to blame, and what was seen in words."""

    id: str
    key: tuple[str, ...]
    text: str

    @property
    def severity(self) -> Literal["error", "warning"]:
        """An error stops a run before it starts."""
        return "error" if self.id in ERRORS else "warning"


@dataclass(frozen=True)
class Facts:
    """What the rules look at: properties of the parts that a recipe built."""

    total_steps: int
    tau: Callable[[int], float | None]
    """How much of the target remains at the update after a step; None where there is no such number."""
    target: Literal["copy", "online", "none"]
    """`TargetModule.source`."""
    prevents_collapse: bool
    """`LossModule.prevents_collapse`."""
    wants_predictions: bool
    """Whether the loss takes predictions."""
    predictor_learns: bool
    """Whether the predictor has parameters."""
    projector_normalised: bool
    """Whether the projector ends in a normalisation layer."""
    queues: tuple[tuple[int, int], ...]
    """Of each queue of the loss, the rows it holds and those that the whole run pushes into it."""


def check_accepted(accepted: Iterable[str]) -> None:
    """Refuse ids that name no finding.

    Raises:
        UserError: for each such id.
    """
    known = [*ERRORS, *WARNINGS]
    wrong = [a for a in accepted if a not in known]
    if wrong:
        raise UserError(
            *(f"train.accept: {a!r} is no finding{did_you_mean(a, known)}; known: {', '.join(known)}" for a in wrong)
        )


def findings(facts: Facts) -> list[Finding]:
    """Everything that the parts of a recipe are known to fail with, the errors first."""
    found = [*tau_findings(facts.tau, facts.total_steps), *swap_findings(facts), *queue_findings(facts)]
    return sorted(found, key=lambda f: f.severity)


def tau_findings(tau: Callable[[int], float | None], total_steps: int) -> list[Finding]:
    """Look at tau at every update of the run: it must stay in [0, 1] and never fall.

    BYOL's tau rises to 1 (Grill et al. 2020, section 3.3). Above 1 the target moves away from the online network, and
    the gap between them is multiplied by every such tau.
    """
    found: dict[str, str] = {}
    before: float | None = None
    for step in range(total_steps):
        value = tau(step)
        if value is None:
            return []
        where = f"at step {step + 1} of {total_steps}"  # the update after `step` is update step + 1
        if value > 1:
            found.setdefault(
                "tau_above_one",
                f"tau is {value:.9g} {where}, above 1: the target would move away from the online network",
            )
        if value < 0:
            found.setdefault(
                "tau_below_zero", f"tau is {value:.9g} {where}, below 0: the target would overshoot the online network"
            )
        if before is not None and value < before:
            found.setdefault(
                "tau_falls",
                f"tau falls from {before:.9g} to {value:.9g} {where}: the target would speed up, not settle",
            )
        before = value
    return [Finding(name, ("target_updater", "tau"), text) for name, text in found.items()]


def queue_findings(facts: Facts) -> list[Finding]:
    """Queues that the run is too short to fill: what they hold at first is random, and nobody's image."""
    return [
        Finding(
            "queue_never_full", ("loss", "queue"),
            f"holds {rows} rows, and the whole run pushes {pushed}: the others stay random; set a smaller loss.queue",
        )
        for rows, pushed in facts.queues
        if rows > pushed
    ]  # fmt: skip


def swap_findings(facts: Facts) -> list[Finding]:
    """Parts that work in one method and are known to fail in another, where the loss itself does not prevent collapse.

    BYOL's ablations (Grill et al. 2020, table 5): with tau = 0, or without a predictor, nothing is learnt, and a
    target that never moves teaches little. SimSiam's (Chen & He 2021, tables 1 to 3): without a learning predictor it
    collapses; without an EMA target it needs BatchNorm on the projector's output.
    """
    if facts.prevents_collapse:
        return []
    found = []
    if facts.wants_predictions and not facts.predictor_learns:
        found.append(Finding(
            "predictor_missing", ("predictor",),
            "has nothing to learn, and without a predictor this loss is known to collapse, whatever the target (Grill "
            "et al. 2020, table 5b; Chen & He 2021, table 1); use a predictor such as 'mlp'",
        ))  # fmt: skip
    if facts.target == "online" and not facts.projector_normalised:
        found.append(Finding(
            "ema_missing", ("target_updater",),
            "the target is the online network itself, and heads made for an EMA target, such as BYOL's, are known to "
            "collapse or learn little without one (Grill et al. 2020, table 5a, tau = 0). SimSiam's heads and rates go "
            "with it: BatchNorm on the projector's output (projector.output_norm), a predictor that narrows, a "
            "constant rate for it; see the recipe simsiam_cifar10",
        ))  # fmt: skip
    first, last = facts.tau(0), facts.tau(facts.total_steps - 1)
    if first is not None and last is not None:
        if 0 <= first < 0.5:
            found.append(Finding(
                "tau_low", ("target_updater", "tau"),
                f"tau is {first:.9g} at the start: the target is nearly the online network, which is known to "
                f"collapse or to learn little (Grill et al. 2020, table 5a); if {first:.9g} is meant as the share of "
                f"the online network, set {1 - first:.9g}",
            ))  # fmt: skip
        if first == last == 1:
            found.append(Finding(
                "target_frozen", ("target_updater", "tau"),
                "tau is 1 at every step: the target stays at its random start, which teaches little (Grill et al. "
                "2020, table 5a); BYOL's tau rises from .99",
            ))  # fmt: skip
    return found
