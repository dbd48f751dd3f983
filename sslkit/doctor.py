"""What is known to go wrong, told before training: static findings over a recipe's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sslkit.errors import UserError, did_you_mean

FINDINGS = {
    "tau_above_one": "the target's tau is above 1 at some step",
    "tau_below_zero": "the target's tau is below 0 at some step",
    "tau_falls": "the target's tau falls from one step to the next",
}
"""Every finding that would stop a run before it starts, by the id that `train.accept` takes."""


@dataclass(frozen=True)
class Finding:
    """Something known to go wrong: its id, and what was seen in words, with figures."""

    id: str
    text: str


def check_accepted(accepted: Iterable[str]) -> None:
    """Refuse ids that name no finding.

    Raises:
        UserError: for each such id.
    """
    wrong = [a for a in accepted if a not in FINDINGS]
    if wrong:
        raise UserError(
            *(
                f"train.accept: {a!r} is no finding{did_you_mean(a, FINDINGS)}; known: {', '.join(FINDINGS)}"
                for a in wrong
            )
        )


def tau_findings(tau: Callable[[int], float | None], total_steps: int) -> list[Finding]:
    """Look at tau at every update of the run: it must stay in [0, 1] and never fall.

    BYOL's tau rises to 1 (Grill et al. 2020, section 3.3). Above 1 the target moves away from the online network, and
    the gap between them is multiplied by every such tau.
    """
    found: dict[str, Finding] = {}
    before: float | None = None
    for step in range(total_steps):
        value = tau(step)
        if value is None:
            return []
        where = f"at step {step + 1} of {total_steps}"  # the update after `step` is update step + 1
        if value > 1 and "tau_above_one" not in found:
            found["tau_above_one"] = Finding(
                "tau_above_one",
                f"tau is {value:.9g} {where}, above 1: the target would move away from the online network",
            )
        if value < 0 and "tau_below_zero" not in found:
            found["tau_below_zero"] = Finding(
                "tau_below_zero", f"tau is {value:.9g} {where}, below 0: the target would overshoot the online network"
            )
        if before is not None and value < before and "tau_falls" not in found:
            found["tau_falls"] = Finding(
                "tau_falls",
                f"tau falls from {before:.9g} to {value:.9g} {where}: the target would speed up, not settle",
            )
        before = value
    return list(found.values())
