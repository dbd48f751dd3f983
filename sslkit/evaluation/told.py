"""Figures as `evaluation.json` has them, as a table, and as a line of Markdown."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sslkit import evaluation_file
from sslkit.errors import UserError, printable
from sslkit.evaluation_file import FILE, FLOORS, SCHEMA
from sslkit.files import in_one_piece
from sslkit.run_directory import cannot_lock, refuse_strays

FOLDER = "evaluation"
LARGE_ERROR = 0.015
"""Standard error of a top-1 from which on it is told."""
SAME = ("protocol", "options", "branch", "data", "device")
"""Keys of a record that say, with the digest of the weights, what was measured: a newer one with the same takes an
older one's place. What stands beside the figure follows from them, and stays where the newer one has none."""
PATIENCE = 60.0
"""Seconds to wait for another evaluation of the same run, which holds the file for milliseconds."""


@dataclass(frozen=True)
class Evaluation:
    """What came of evaluating one run."""

    run: Path
    name: str
    """The recipe's."""
    seed: int
    """The recipe's."""
    records: Sequence[Mapping[str, Any]]
    """One for each protocol, as `evaluation.json` has them: docs/reference/evaluation.md."""

    def top1(self, protocol: str) -> float:
        """The trained network's accuracy by the first protocol of this name, 0..1.

        Raises:
            KeyError: it was not measured.
        """
        for record in self.records:
            if record["protocol"] == protocol:
                return float(record["top1"])
        raise KeyError(protocol)

    def text(self) -> str:
        """The table that `sslkit evaluate` prints."""
        return table([self])

    def markdown(self) -> str:
        """One line, a row of a table."""
        return markdown([self])


# ---------------------------------------------------------------- in the run's directory


def prepare(run: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Make the folder for features, so that a run that cannot be written to is known before anything is computed.

    Raises:
        UserError: it cannot, a link in its place leads elsewhere, or a newer version of sslkit wrote `evaluation.json`.
    """
    folder = run / FOLDER
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link that may lead out of the run's directory; remove the link")
    try:
        folder.mkdir(exist_ok=True)
        refuse_strays(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        with held(run):
            _older(run / FILE, say)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: cannot be written: {error.strerror or error}; evaluate a copy of the run") from None


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Alone among the evaluations of a run, for as long as something is written: what is written has one name.

    Raises:
        UserError: another one does not end.
    """
    lock = run / FOLDER / ".lock"
    try:
        mine = None if cannot_lock(lock) else FileLock(lock, timeout=PATIENCE).acquire()
    except Timeout:
        raise UserError(f"{run}: another evaluation of it has been writing for {PATIENCE:.0f} seconds; see whether it "
                        "hangs, and evaluate again") from None  # fmt: skip
    with mine or contextlib.nullcontext():
        yield


def keep(run: Path, records: Iterable[Mapping[str, Any]], say: Callable[[str], None] = lambda text: None) -> None:
    """Put records into `evaluation.json`, in place of older ones of the same thing.

    Raises:
        UserError: it cannot be written, or a newer version of sslkit wrote it.
    """
    path = run / FILE
    try:
        with held(run):
            merged: dict[str, Mapping[str, Any]] = {_key(record): record for record in _older(path, say)}
            for record in records:
                older = merged.get(_key(record), {})
                beside = {name: older[name] for name in FLOORS if name in older and name not in record}
                merged[_key(record)] = {**record, **beside}
            _write(path, list(merged.values()))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _older(path: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What is there; a file of which a part cannot be read is moved aside, so that nothing in it is lost."""
    records, sound = evaluation_file.read(path.parent)
    if not sound:
        beside, number = path.with_name(f"{path.name}.damaged"), 1
        while beside.exists() or beside.is_symlink():
            number += 1
            beside = path.with_name(f"{path.name}.damaged-{number}")
        path.rename(beside)
        say(f"{path}: is damaged; it is kept as {beside.name}, and a new one is begun")
        if records:
            _write(path, records)
    return records


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with in_one_piece(path) as staging:
        staging.write_text(json.dumps({"schema": SCHEMA, "records": records}, indent=1) + "\n", encoding="utf-8")


def _key(record: Mapping[str, Any]) -> str:
    weights = record.get("checkpoint")
    digest = weights.get("weights") if isinstance(weights, dict) else weights
    return json.dumps([digest, {key: record.get(key) for key in SAME}], sort_keys=True)


# ---------------------------------------------------------------- for people


def table(found: Sequence[Evaluation]) -> str:
    """Rows for each run, and below them mean and sample standard deviation over runs."""
    floors = [name for name in FLOORS if any(name in record for one in found for record in one.records)]
    heads = ["run", "protocol", "top-1", *floors, "chosen", "seconds"]
    rows = []
    for one in found:
        rows += [
            [one.run.name, str(r["title"]), _figure(r["top1"], r["spread"]), *(_floor(r, name) for name in floors),
             _chosen(r), f"{r['seconds']:.1f}"]
            for r in one.records
        ]  # fmt: skip
    for record, top1, spread in over_runs(found):
        means = [_over(found, record, name) for name in floors]
        rows.append([f"{len(found)} runs", str(record["title"]), _figure(top1, spread), *means, "", ""])
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in (heads, *rows)]  # fmt: skip
    return "\n".join(map(printable, lines))


def warnings(found: Sequence[Evaluation]) -> list[str]:
    """What a reader of the table should not overlook: figures below their floors, and few test images."""
    lines = []
    for rows in zip(*(one.records for one in found), strict=True):
        top1 = statistics.fmean(float(record["top1"]) for record in rows)
        floors = {name: [r[name] for r in rows if isinstance(r.get(name), int | float)] for name in FLOORS}
        means = {name: statistics.fmean(values) for name, values in floors.items() if len(values) == len(rows)}
        above = [f"{FLOORS[name]} ({mean:.4f})" for name, mean in means.items() if top1 <= mean]
        if above:
            mean = f" in the mean over {len(rows)} runs" if len(rows) > 1 else ""
            lines.append(
                f"{rows[0]['title']}: not above {' and '.join(above)}{mean}; by this measure the features are worth no "
                "more"
            )
    tests = found[0].records[0]["data"]["test"] if found[0].records else 0
    errors = [math.sqrt(r["top1"] * (1 - r["top1"]) / tests) for one in found for r in one.records] if tests else []
    if errors and max(errors) > LARGE_ERROR:
        lines.append(f"{tests:,} test images are few: the standard error of such a top-1 is {max(errors):.3f}, beside "
                     "any spread over seeds")  # fmt: skip
    return lines


def over_runs(found: Sequence[Evaluation]) -> list[tuple[Mapping[str, Any], float, float]]:
    """For each protocol its record of the first run, and mean and sample standard deviation over the runs."""
    if len(found) < 2:
        return []
    return [
        (record, statistics.fmean(tops), statistics.stdev(tops))
        for number, record in enumerate(found[0].records)
        for tops in [[float(one.records[number]["top1"]) for one in found]]
    ]


def markdown(found: Sequence[Evaluation]) -> str:
    """A line: name, weights, and each protocol with its options, figure and floors."""
    first = found[0]
    weights = first.records[0]["checkpoint"]
    what = f"step {weights['step']}, {first.records[0]['branch']}"
    means = {id(record): (top1, spread) for record, top1, spread in over_runs(found)}
    cells = []
    for record in first.records:
        top1, spread = means.get(id(record), (record["top1"], record["spread"]))
        floors = ", ".join(f"{name} {_over(found, record, name)}" for name in FLOORS if name in record)
        cells.append(f"{record['title']} {_figure(top1, spread)}" + (f" ({floors})" if floors else ""))
    name = f"{first.name}, {len(found)} runs" if len(found) > 1 else first.name
    return printable("| " + " | ".join(part.replace("|", "\\|") for part in (name, what, *cells)) + " |")


def _figure(top1: float, spread: float | None) -> str:
    return f"{top1:.4f}" + ("" if spread is None else f" +- {spread:.4f}")


def _floor(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _over(found: Sequence[Evaluation], record: Mapping[str, Any], name: str) -> str:
    number = next(i for i, one in enumerate(found[0].records) if one is record)
    values = [float(one.records[number][name]) for one in found if name in one.records[number]]
    return f"{statistics.fmean(values):.4f}" if len(values) == len(found) else ""


def _chosen(record: Mapping[str, Any]) -> str:
    """The choice of each seed, without what it was made by."""
    told = dict.fromkeys(
        f"{name} {value:g}" for one in record["chosen"] for name, value in one.items() if name in ("C", "lr")
    )
    return ", ".join(told)
