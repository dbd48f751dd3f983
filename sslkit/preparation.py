"""From a recipe to parts that were tried out, and what is to be said of them before training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console

from sslkit import doctor, initialise
from sslkit.build import Parts, build
from sslkit.errors import UserError
from sslkit.facts import gather
from sslkit.progress import say
from sslkit.recipe import Recipe
from sslkit.rules import Facts, Finding
from sslkit.sources import place
from sslkit.words import spoken


def prepare(
    recipe: Recipe,
    source: str | None,
    overrides: Sequence[str],
    device: torch.device,
    tell: Callable[[str], None],
    *,
    processes: int = 1,
    fork: bool = False,
    resuming: bool = False,
) -> tuple[Parts, Facts]:
    """Build the parts of a recipe, which was read from `source` if that is not None, and try them out.

    Args:
        recipe, source, overrides, device: What to build, and where it is from.
        tell: Told what is worth a line.
        fork: `init_from` is the run that is forked: of its weights those are taken that fit.
        resuming: The run has a checkpoint of its own, and where its first weights were from does not matter any more.

    Raises:
        UserError: they do not go together, or not with the machine; with the line of the recipe.
    """  # fmt: skip
    doctor.check_accepted(recipe.train.accept)
    with placed(source, overrides):
        start = None if resuming else initialise.find(recipe, tell, fork=fork)
        parts = build(recipe, device, tell, processes=processes, start=start)
    if start is not None:
        for line in start.told():
            tell(line)
        parts.recipe, parts.initialised = start.settled(recipe), start.facts()
    return parts, gather(parts)


@contextmanager
def placed(source: str | None, overrides: Sequence[str]) -> Iterator[None]:
    """Put `recipe.toml:7: ` before what the parts of a recipe object to, where a line begins with a key or a slot."""
    try:
        yield
    except UserError as error:
        if source is None:
            raise
        lines = []
        for line in error.lines:
            named = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)*)(?:: | '| is )", line)
            keys = named[1].split(".") if named else []
            if keys and keys[0] in Recipe.model_fields:
                line = f"{place(source, overrides, *keys)}: {line}"
            lines.append(line)
        raise UserError(*lines) from error.__cause__


def tell_findings(
    known: Facts, source: str | None, overrides: Sequence[str], console: Console, *, strict: bool = False
) -> None:
    """Before training: warn of what is known to go wrong, and stop on what is sure to.

    Findings that the recipe accepts by id are left out.

    Raises:
        UserError: one line for each finding that is an error, or with `strict` a warning.
    """
    refused = []
    for line in doctor.rules()[1]:
        say(console, f"warning: a health rule is broken and is not asked: {line}")
    for finding in located(doctor.before(known), source, overrides):
        if finding.id in known.accepted or finding.severity == "info":
            continue
        at = ": ".join(filter(None, [finding.where, finding.key]))
        line = f"{at or source or known.name}: {finding.sentence}"
        accept = spoken().accept.format(id=finding.id)
        if finding.severity == "error" or strict:
            refused.append(f"{line} (to train all the same: {accept})")
        else:
            say(console, f"warning: {line} (to leave this out: {accept})")
    if refused:
        raise UserError(*refused)


def located(findings: Sequence[Finding], source: str | None, overrides: Sequence[str]) -> list[Finding]:
    """The findings with the recipe's file and line that set what is to blame, if it was read from one."""
    if source is None:
        return list(findings)
    return [replace(f, where=place(source, overrides, *f.key.split("."))) if f.key else f for f in findings]


def view_pixels(parts: Parts) -> float:
    """Pixels of all views of the whole run."""
    run = parts.run
    return float(run.total_steps) * run.batch_size * sum(view.size**2 for view in run.views)
