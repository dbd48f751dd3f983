"""From a folder of images to a recipe that fits them and this machine: look, choose, measure, check, write."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sslkit import doctor, registry, telling
from sslkit.api import DataInfo, DataSource
from sslkit.build import choose_device
from sslkit.data import cache_folder
from sslkit.errors import UserError
from sslkit.looking import Look, Unclassed
from sslkit.preparation import prepare
from sslkit.progress import PatientConsole, say
from sslkit.recipe import read_recipe
from sslkit.rules import Course, Finding
from sslkit.suggesting.choices import ENOUGH_EPOCHS, Found, Machine, Wanted, choose
from sslkit.suggesting.described import described
from sslkit.suggesting.lines import Choices, power_of_two
from sslkit.suggesting.machine import machine_of, speed
from sslkit.suggesting.methods import Method, method_named
from sslkit.suggesting.writing import written

LOOKED_AT = 20_000
"""Files that are decoded unless told otherwise."""
LEAST = 4
"""Images below which there is nothing to train on."""
SETS = ("test", "val")
"""Folders of images that are hardly there to be trained on."""


def init(
    folder: str,
    *,
    out: str | None = None,
    name: str | None = None,
    method: str = "byol",
    size: int | None = None,
    hours: float = 1.0,
    device: str = "auto",
    look: int = 0,
    as_json: bool = False,
) -> None:
    """What the command does; its options are in `sslkit.cli_use`.

    Raises:
        UserError: there are no images, the recipe is there already, or it could not be built.
    """
    console = PatientConsole(stderr=as_json, highlight=False)
    if not math.isfinite(hours):
        raise UserError(f"--hours: should be a number of hours, not {hours}")
    donor = method_named(method)
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: {'is no folder' if root.exists() else 'is not there'}; give a folder of images")
    _check_text(root.resolve())
    # After the file, where there is one: two recipes of one folder have a run directory each.
    named = name or _name_of(Path(out).stem if out else root.resolve().name)
    path = Path(out or f"{named}.toml")
    if path.exists():
        raise UserError(f"{path}: is there already and was left alone; give another path with -o")
    tell = partial(say, console)
    machine = machine_of(choose_device(device))
    seen, mixed = _look(root, look, tell)
    if seen.files < LEAST:
        raise UserError(f"{folder}: {seen.files} images are nothing to train on; give a folder with more")
    if not seen.heights:
        bad = seen.unreadable[0]
        raise UserError(f"{folder}: none of the {seen.looked_at} files looked at can be read, as {bad['path']}: "
                        f"{bad['problem']}")  # fmt: skip
    wanted = Wanted(root.resolve().as_posix(), named, hours, size, mixed)
    for title, text in described(seen).items():
        tell(f"{title + ':':15} {text}")
    made, text, findings = _decide(seen, machine, wanted, donor, tell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path}: is there already and was left alone; give another path with -o") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    for note in made.notes:
        tell(f"note: {note}")
    for finding in findings:
        if finding.severity != "info":
            tell(f"{'ERROR' if finding.severity == 'error' else 'warning'}: {finding.sentence}")
    _tell(path, seen, made, machine, findings, as_json, console)


def _tell(
    path: Path,
    seen: Look,
    made: Choices,
    machine: Machine,
    findings: list[Finding],
    as_json: bool,
    console: PatientConsole,
) -> None:
    if as_json:
        chosen = [{"key": line.key, "value": line.value, "why": line.why} for line in made.lines]
        told = {
            "recipe": str(path), "look": asdict(seen), "machine": asdict(machine), "choices": chosen,
            "notes": made.notes, "findings": [asdict(finding) for finding in findings],
        }  # fmt: skip
        telling.tell(_outlined(told))
        return
    given = path if re.search(r"[/\\]", str(path)) else f"./{path}"
    say(console, f"wrote {path}, in which each line says why. Look at its views, then train:")
    say(console, f"  sslkit views {given} -o {made.value('name')}.png")
    say(console, f"  sslkit train {given}")


def _outlined(value: Any, levels: int = 2) -> str:
    """JSON with a line for each entry of the outer levels, and what is inside these in one: sides of a thousand images
    are no outline."""
    if isinstance(value, dict) and value and levels:
        lines = [f"{json.dumps(key)}: {_outlined(inner, levels - 1)}" for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value) and levels:
        lines = [_outlined(inner, 0) for inner in value]
    else:
        return json.dumps(value, default=str)
    start, end = "{}" if isinstance(value, dict) else "[]"
    indent = " " * (3 - levels)
    return start + ",".join(f"\n{indent}{line}" for line in lines) + f"\n{indent[1:]}{end}"


def _check_text(folder: Path) -> None:
    """Refuse a name that no recipe can hold."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"{folder}: is no UTF-8 text, as the text of a recipe has to be; rename the folder") from None


def _name_of(text: str) -> str:
    """A recipe's name after that of a folder or a file."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100]
    return name or "images"


def _look(root: Path, asked: int, tell: Callable[[str], None]) -> tuple[Look, bool]:
    """What the folder has, as the data source that will read it sees it, and whether folders in it mean nothing."""
    source: Callable[..., DataSource] = registry.load("data_source", "folder")
    info = DataInfo(seed=0, cache=cache_folder(), say=tell)
    try:
        return source(root=str(root), size=LEAST).look(info, asked or LOOKED_AT), False
    except UserError as error:
        if not isinstance(error, Unclassed) or not error.folder.samefile(root):
            if (root / "train").is_dir():
                way = f"`sslkit init {root / 'train'}` takes the images in train/ alone"
                raise UserError(*error.lines, way) from None
            raise
        if held := next((name for name in SETS if (root / name).is_dir()), None):  # all would be trained on
            raise UserError(*error.lines, f"is {held}/ there to test on? Then put the others into train/") from None
        tell(f"{error.what}: folders can be no classes then, and no labels are read. Move every image into a folder of "
             "its class to have them")  # fmt: skip
        return source(root=str(root), size=LEAST, classes="none").look(info, asked or LOOKED_AT), True


def _decide(
    seen: Look, machine: Machine, wanted: Wanted, method: Method, tell: Callable[[str], None]
) -> tuple[Choices, str, list[Finding]]:
    """Choose, measure what was chosen, and choose anew by what it takes; the cheaper network where it takes too long.

    What is written was built and tried out.
    """
    frugal = False
    while True:
        made = choose(seen, machine, wanted, method, frugal=frugal)
        found = _measured(made, machine)
        made = choose(seen, machine, wanted, method, found, frugal=frugal)
        cheaper = choose(seen, machine, wanted, method, found, frugal=True)
        if frugal or made.affordable >= ENOUGH_EPOCHS or _network(cheaper) == _network(made):
            break
        tell(f"trains {1 / found.seconds_per_image:,.0f} images/s, {made.affordable:.1f} epochs in the time that there "
             "is: a cheaper network is tried")  # fmt: skip
        frugal = True
    text = written(made, _head(wanted, method, machine))
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "recipe.toml")
        file.write_text(text, encoding="utf-8")
        _, known = prepare(read_recipe(str(file)), None, (), torch.device(machine.device), lambda _: None)
    return made, text, list(doctor.examine(Course(known), wanted.name, accepted=known.accepted).findings)


def _network(made: Choices) -> tuple[Any, ...]:
    return tuple(made.value(key) for key in ("backbone.model", "backbone.stem", "view_generator.size"))


def _head(wanted: Wanted, method: Method, machine: Machine) -> str:
    place = "a GPU" if machine.device == "cuda" else f"{machine.cores} CPU cores"
    return (
        f"{method.name} on the images in {Path(wanted.root).name}, {wanted.hours:g} h on {place}; written by "
        f"`sslkit init` after {method.recipe}, which names the papers. Where a comment is a recipe's name alone, the "
        "value is that recipe's."
    )


def _measured(made: Choices, machine: Machine) -> Found:
    """What training takes with these choices, in batches that fit."""
    batch = int(made.value("train.batch_size"))
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "recipe.toml")
        file.write_text(written(made, "measured"), encoding="utf-8")
        while True:
            few = min(batch, 64) if machine.device == "cpu" else batch
            try:
                seconds, fits = speed(str(file), few, machine)
            except torch.cuda.OutOfMemoryError:
                fits = False
            if fits or batch <= 2:
                break
            batch = power_of_two(batch / 2)
    return Found(seconds / few, batch if batch < made.value("train.batch_size") else None)
