"""`sslkit check` and `sslkit doctor`: look at a recipe before it trains, and at a run while it does or after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sslkit import doctor
from sslkit.build import choose_device
from sslkit.preparation import located, prepare
from sslkit.recipe import read_recipe
from sslkit.rules import Course
from sslkit.telling import tell


def check(source: str, overrides: Sequence[str] = (), *, strict: bool = False, as_json: bool = False) -> int:
    """Print what can be told of a recipe before it trains.

    Returns:
        The exit code: 0, 1 with warnings, 2 with errors; with `strict`, 2 with warnings too.

    Raises:
        UserError: the recipe cannot be built.
    """
    recipe = read_recipe(source, overrides)
    parts, known = prepare(recipe, source, overrides, choose_device("auto"), partial(tell, error=True))
    size = f"{known.total_steps} steps, {known.steps_per_epoch} an epoch"
    found = doctor.examine(Course(known), f"{recipe.name} ({parts.recipe.hash()}), {size}", accepted=known.accepted)
    found = replace(found, findings=tuple(located(found.findings, source, overrides)))
    tell(found.as_json() if as_json else found.text())
    return 2 if strict and found.exit_code else found.exit_code


def examine(run: str, *, as_json: bool = False) -> int:
    """Print what a run shows.

    Returns:
        The exit code: 0, 1 with warnings, 2 with errors.

    Raises:
        UserError: there is no run.
    """
    found = doctor.examine_run(Path(run))
    tell(found.as_json() if as_json else found.text())
    return found.exit_code
