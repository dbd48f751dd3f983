"""Where two recipes differ, component by component: for `sslkit diff`, and for a run that refuses a changed recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.text import Text

from sslkit.describe import as_toml
from sslkit.errors import UserError, printable
from sslkit.progress import PatientConsole
from sslkit.recipe import Recipe, parse_recipe, read_recipe
from sslkit.run_directory import refuse_strays
from sslkit.sources import read, shipped


@dataclass(frozen=True)
class Change:
    """An option that differs."""

    key: str
    """As `--set` takes it: `optimizer.lr.peak`, `observers.knn.k`. An element of a list has its number, from 0."""
    a: Any
    """Its value in A, defaults included; null where it is not set, or where A has no such option."""
    b: Any
    """Its value in B, likewise."""

    def __str__(self) -> str:
        return f"{self.key}: {as_toml(self.a)} -> {as_toml(self.b)}"


@dataclass(frozen=True)
class Slot:
    """A place of the recipe that differs."""

    slot: str
    """`optimizer`, `projector`, ..., or `seed` or `train`, which hold no component."""
    a: str | None
    """The name of A's component; null where the slot is empty or holds none."""
    b: str | None
    """The name of B's component, likewise."""
    changes: Sequence[Change]
    """The options that differ. Where the components do, the first is their `use`, and schedules are whole tables."""
    common: dict[str, Any]
    """Where the components differ: the options that both have, with the same value."""


@dataclass(frozen=True)
class Side:
    """One of the two recipes."""

    source: str
    """As it was given on the command line."""
    name: str
    """The recipe's `name`."""
    hash: str
    """Equal hashes: the recipes compute the same."""


@dataclass(frozen=True)
class Difference:
    """All of it, in the order of a recipe."""

    a: Side
    """The recipe that was given first."""
    b: Side
    """The other."""
    slots: Sequence[Slot]
    """The slots that differ in what is computed."""
    equal: Sequence[str]
    """The other slots."""
    incidental: Sequence[Change]
    """What changes nothing that is computed: `name`, observers, cadences, workers, paths."""


# ---------------------------------------------------------------- comparing


def differences(a: Recipe, b: Recipe) -> list[Change]:
    """The options that compute something and differ, in the order of a recipe."""
    return [change for slot in _slots(a.computing(), b.computing()) for change in slot.changes]


def compare(a: Recipe, b: Recipe, sources: tuple[str, str]) -> Difference:
    """Everything that differs; `sources` are the words under which the recipes were asked for."""
    slots = _slots(a.computing(), b.computing())
    computing = {change.key for slot in slots for change in slot.changes}
    everything = [change for slot in _slots(_all(a), _all(b)) for change in slot.changes]
    return Difference(
        a=Side(sources[0], a.name, a.hash()),
        b=Side(sources[1], b.name, b.hash()),
        slots=[slot for slot in slots if slot.changes],
        equal=[slot.slot for slot in slots if not slot.changes],
        incidental=[change for change in everything if change.key not in computing],
    )


def _all(recipe: Recipe) -> dict[str, Any]:
    """Every option, observers by name instead of in a list."""
    tables = recipe.tables()
    observers: dict[str, Any] = {}
    for table in tables.pop("observers"):
        twins = sum(other["use"] == table["use"] for other in observers.values())
        observers[f"{table['use']}_{twins + 1}" if twins else table["use"]] = table
    return tables | {"observers": observers}


def _slots(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Slot]:
    return [_slot(name, a.get(name), b.get(name)) for name in Recipe.model_fields if name in a or name in b]


def _slot(name: str, a: Any, b: Any) -> Slot:
    of_a, of_b = (table.get("use") if isinstance(table, dict) else None for table in (a, b))
    if of_a == of_b:
        return Slot(name, of_a, of_b, list(_changes(name, a, b)), {})
    a, b = a or {}, b or {}
    pairs = {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b])}
    return Slot(
        name,
        of_a,
        of_b,
        [Change(f"{name}.{key}", *pair) for key, pair in pairs.items() if not _same(*pair)],
        {key: pair[0] for key, pair in pairs.items() if _same(*pair)},
    )


def _changes(key: str, a: Any, b: Any) -> Iterator[Change]:
    """What differs below a key: option by option where both are tables of one component, else the whole value."""
    if isinstance(a, dict) and isinstance(b, dict) and a.get("use") == b.get("use"):
        for inner in dict.fromkeys([*a, *b]):
            yield from _changes(f"{key}.{inner}", a.get(inner), b.get(inner))
    elif isinstance(a, list) and isinstance(b, list) and all(isinstance(table, dict) for table in [*a, *b]):
        for number, (left, right) in enumerate(zip_longest(a, b)):
            yield from _changes(f"{key}.{number}", left, right)
    elif not _same(a, b):
        yield Change(key, a, b)


def _same(a: Any, b: Any) -> bool:
    """Equal as the recipe's hash sees it, which tells 1 from 1.0 and from true."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


# ---------------------------------------------------------------- showing


def show_diff(a: str, b: str, *, as_json: bool) -> None:
    """Print where two recipes or runs differ; in colour on a terminal.

    Raises:
        UserError: one of them cannot be read.
    """
    found = compare(_read(a), _read(b), (a, b))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    console = PatientConsole(highlight=False)
    for line in _lines(found):
        console.print(line, soft_wrap=True)


def _read(source: str) -> Recipe:
    """A recipe, or that of a run directory."""
    folder = Path(source)
    if not folder.is_dir() or source in shipped():
        recipe = read_recipe(source)
        if recipe.init_from is None:
            return recipe
        from sslkit.initialise import pinned  # torch takes seconds, and few recipes need it

        return pinned(recipe)
    refuse_strays(folder)
    lock = folder / "recipe.lock.toml"
    if not lock.is_file():
        raise UserError(f"{source}: is a folder without a recipe.lock.toml; give the directory of a run, or a recipe")
    return parse_recipe(read(lock), str(lock))


def _lines(found: Difference) -> Iterator[Text]:
    for side, sign, style in ((found.a, "-", "red"), (found.b, "+", "green")):
        source = "" if side.source == side.name else f"  {printable(side.source)}"
        yield Text.assemble((f"{sign} {side.name} ({side.hash})", style), (source, "dim"))
    yield Text()
    for slot in found.slots:
        yield from _slot_lines(slot)
    yield Text(f"the same: {', '.join(found.equal)}" if found.slots else "the same in all that is computed")
    if found.incidental:
        yield Text("different, but not in what is computed:", "dim")
        yield from (Text(f"    {change}", "dim") for change in found.incidental)


def _slot_lines(slot: Slot) -> Iterator[Text]:
    if slot.a == slot.b:
        if slot.changes[0].key == slot.slot:  # no table, such as the seed
            yield _arrow(slot.slot, *(as_toml(value) for value in (slot.changes[0].a, slot.changes[0].b)))
            return
        yield Text.assemble((slot.slot, "bold"), f": {slot.a}" if slot.a else "")
        for change in slot.changes:
            yield _arrow("    " + _within(slot, change), as_toml(change.a), as_toml(change.b))
        return
    yield _arrow(slot.slot, slot.a or "none", slot.b or "none", "bold")
    for sign, style, values in (("-", "red", "a"), ("+", "green", "b")):
        for change in slot.changes[1:]:
            if (value := getattr(change, values)) is not None:
                yield Text(f"  {sign} {_within(slot, change)} = {as_toml(value)}", style)
    for key, value in slot.common.items():
        yield Text(f"    {key} = {as_toml(value)}", "dim")


def _arrow(what: str, a: str, b: str, style: str = "") -> Text:
    return Text.assemble((what, style), ": ", (a, "red"), " -> ", (b, "green"))


def _within(slot: Slot, change: Change) -> str:
    return change.key.removeprefix(f"{slot.slot}.")
