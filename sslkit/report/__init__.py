"""A run as one page for a browser: the verdict first, then figures, curves, features, and what was run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslkit import evaluation_file
from sslkit.charts import Drawings
from sslkit.errors import UserError, did_you_mean
from sslkit.page import asset, document, page_path, save
from sslkit.recorded import ABSENT, Run, read_run
from sslkit.report import curves
from sslkit.report.evaluated import evaluated
from sslkit.report.features import features, missing, views
from sslkit.rules import first_network
from sslkit.run_directory import died, read_json, refuse_strays
from sslkit.telling import tell

if TYPE_CHECKING:
    from sslkit.doctor import Examination
    from sslkit.rules import Finding, Severity

FILES = ("metrics.jsonl", "recipe.lock.toml", "facts.json", "status.json")
"""One of these makes a directory a run."""
SEVERITIES: tuple[Severity, ...] = ("error", "warning")
SIGNS = {"error": "✕", "warning": "!", "info": "i", "healthy": "✓"}
WORDS = {"error": "Error", "warning": "Warning", "info": "Note"}


def show(run: str | Path, out: str | Path | None = None, watch: float | None = None) -> None:
    """Write the page and say where it is; with `watch`, again every so many seconds while the run goes on.

    Raises:
        UserError: there is no run, or `out` is no place for a page.
    """
    directory = Path(run)
    path = write(directory, None if out is None else Path(out), reload=None if watch is None else _every(watch))
    tell(f"{path}: open it in a browser")
    if watch is None or not _running(directory):
        return
    tell(f"written again every {_every(watch)} s while the run goes on; Ctrl-C ends this, not the run")
    try:
        before = _changed(directory)
        while _running(directory):
            time.sleep(watch)
            if (now := _changed(directory)) != before:
                before = now
                write(directory, path, reload=_every(watch))
    except KeyboardInterrupt:
        tell("")
    finally:
        write(directory, path)  # nobody writes it any more: it must not read itself again


def write(run_dir: Path, out: Path | None = None, *, reload: int | None = None) -> Path:
    """Write the page of a run directory to `out`, by default `report.html` in it.

    Args:
        run_dir: what sslkit or `sslkit.watch` wrote, however much of it is there.
        out: where the page goes.
        reload: seconds after which a browser reads the page again, if the run is going on.

    Raises:
        UserError: there is no run, or the page cannot be written.
    """
    path = run_dir / "report.html" if out is None else page_path(out)
    if not any((run_dir / name).is_file() for name in FILES):
        runs = sorted({found.parent.name for name in FILES[:2] for found in run_dir.parent.glob(f"*/{name}")})
        what = "is no run directory" if run_dir.is_dir() else "is a file" if run_dir.exists() else "is not there"
        raise UserError(f"{run_dir}: {what}{did_you_mean(run_dir.name, runs)}; give a run directory such as runs/NAME")
    refuse_strays(run_dir)
    save(path, text(run_dir, reload=reload if _running(run_dir) else None))
    return path


def text(run_dir: Path, *, reload: int | None = None) -> str:
    """The page itself."""
    run = read_run(run_dir, run_dir.resolve().name)
    facts = read_json(run_dir / "facts.json")
    name = (run.recipe.name if run.recipe else str(facts.get("name") or "")) or run.name
    examined = _examined(run_dir)
    findings = () if isinstance(examined, str) else examined.findings
    drawings = Drawings(epochs=run.counts_epochs)
    charts = [drawings.chart(chart) for chart in curves.charts(run, findings)]
    drawn = [drawings.section(charts)] if charts else [missing("No metrics yet.")]
    body = [
        *_header(run, name, facts, reload),
        *_verdict(run, examined),
        "<h2>Figures</h2>",
        *_figures(run),
        "<h2>Evaluation</h2>",
        *evaluated(*evaluation_file.shown(run_dir), run.data),
        "<h2>Curves</h2>",
        *drawn,
        "<h2>Features</h2>",
        *features(read_json(run_dir / "snapshot.json"), drawings),
        "<h2>Views</h2>",
        *views(run_dir),
        "<h2>What was run</h2>",
        *_recipe(run, run_dir),
        *_provenance(read_json(run_dir / "env.json")),
    ]
    return document(
        f"{name}: report", body, data=drawings.data, scripts=drawings.scripts, styles=[asset("report.css")],
        reload=reload,
    )  # fmt: skip


def _every(seconds: float) -> int:
    """Whole seconds, which is what a browser counts in."""
    return max(1, math.ceil(seconds))


def _running(directory: Path) -> bool:
    status = read_json(directory / "status.json")
    return status.get("status") == "running" and not died(status)


def _changed(directory: Path) -> list[tuple[int, int]]:
    """Changes whenever one of the files does that the page is made from."""
    paths = [directory / name for name in (*FILES, "snapshot.json", "views.png", "evaluation.json")]
    return [(found.st_mtime_ns, found.st_size) for path in paths if path.is_file() for found in [path.stat()]]


# ---------------------------------------------------------------- the verdict


def _examined(run_dir: Path) -> Examination | str:
    """What the doctor says, or why it says nothing: a page without a verdict is still worth having."""
    from sslkit import doctor

    try:
        return doctor.examine_run(run_dir)
    except UserError as error:
        return error.lines[0]
    except Exception as error:
        return f"the doctor failed: {type(error).__name__}: {error}"


def _header(run: Run, name: str, facts: Mapping[str, Any], reload: int | None) -> list[str]:
    status, total = (
        "died without a word" if died(run.status) else run.status.get("status"),
        run.status.get("of") or facts.get("total_steps"),
    )
    reached = max([record["step"] for record in run.records], default=0)
    reached = max(reached, run.status["step"]) if isinstance(run.status.get("step"), int) else reached
    words = [run.name] if run.name != name else []
    words.append(f"step {reached:,}" + (f" of {total:,}" if isinstance(total, int) else ""))
    if run.counts_epochs and run.records:
        words.append(f"epoch {curves.epoch_of(run, reached):.3g}")
    words.append(f"read on {datetime.now(UTC):%Y-%m-%d at %H:%M:%S} UTC")
    if reload:
        words.append(f"reads itself again every {reload} s")
    parts = []
    if run.recipe:
        tables = run.recipe.computing()
        used = {slot: table["use"] for slot, table in tables.items() if isinstance(table, dict) and "use" in table}
        parts = [f"{slot.replace('_', ' ')} <b>{escape(str(used[slot]))}</b>" for slot in used]
        parts.append(f"seed <b>{run.recipe.seed}</b>")
    pill = f'<span class="pill">{escape(str(status))}</span>' if status else ""
    return [
        f"<header><h1>{escape(name)} {pill}</h1>",
        f'<p class="soft">{" · ".join(map(escape, words))}</p>',
        f'<p class="soft">{" · ".join(parts)}</p>' if parts else "",
        "</header>",
    ]


def _verdict(run: Run, examined: Examination | str) -> list[str]:
    if isinstance(examined, str):
        return [f'<section class="verdict" data-tone="info"><p>No verdict: {escape(examined)}</p></section>']
    worst = next((kind for kind in SEVERITIES if examined.count(kind)), "healthy")
    counts = [
        f"{number} {noun}{'s' * (number != 1)}"
        for noun, number in (("error", examined.count("error")), ("warning", examined.count("warning")),
                             ("note", examined.count("info")))
        if number
    ]  # fmt: skip
    named = curves.numbered(examined.findings)
    ids = {finding.id: name for name, finding in named.items()}
    grave = [_finding(run, name, finding, ids) for name, finding in named.items() if finding.severity != "info"]
    light = [_finding(run, name, finding, ids) for name, finding in named.items() if finding.severity == "info"]
    notes = [*light, *(f'<p class="note">{escape(note)}</p>' for note in examined.notes)]
    said = examined.verdict
    return [
        f'<section class="verdict" data-tone="{worst}"><p><span class="sign" aria-hidden="true">{SIGNS[worst]}</span>'
        f"<span><strong>{escape(said[:1].upper() + said[1:])}</strong>",
        f"<small>{', '.join(counts) or 'Nothing found'}</small></span></p></section>",
        *(['<section class="findings">', *grave, "</section>"] if grave else []),
        *(['<details><summary>Notes</summary><div class="findings">', *notes, "</div></details>"] if notes else []),
    ]


def _finding(run: Run, name: str, finding: Finding, ids: Mapping[str, str]) -> str:
    because = ", ".join(ids.get(id, id) for id in finding.because)
    when = ""
    if finding.step is not None:
        when = f"step {finding.step:,}"
        if run.counts_epochs and run.records:
            when += f", epoch {curves.epoch_of(run, finding.step):.3g}"
    rows = [
        ("Seen", finding.evidence), ("When", when), ("Follows from", because),
        ("Likely cause", "" if because else finding.cause), ("Fix", finding.fix), ("Option", finding.key),
        ("Source", finding.source), ("Id", finding.id),
    ]  # fmt: skip
    listed = "".join(
        f'<dt>{title}</dt><dd class="{title.split()[-1].lower()}">{escape(said)}</dd>' for title, said in rows if said
    )
    return (
        f'<article data-tone="{finding.severity}"><h3><span class="tag">{SIGNS[finding.severity]} '
        f"{WORDS[finding.severity]} {name}</span> {escape(finding.what)}</h3><dl>{listed}</dl></article>"
    )


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """A number worth knowing: what it is, what it began with and is now, and what it was measured with."""

    title: str
    value: str
    text: str = ""


def _figures(run: Run) -> list[str]:
    found, absent = [], []
    for title, key, figure, why in (
        ("kNN top-1", "knn_top1", _knn, "needs labelled test images and observer.knn"),
        ("Linear probe top-1", "probe_top1", _probe, "needs labelled test images and observer.probe"),
        ("Loss", "loss", _loss, ""),
        ("Effective rank", "effective_rank", _rank, "needs observer.health and a whole epoch"),
        ("Spread (std √d)", "std_sqrt_d", _spread, "needs observer.health"),
        ("LiDAR", "lidar", _lidar, "measured at the end of a run"),
        ("Images per second", "images_per_second", _speed, ""),
    ):
        points = run.points(key)
        if points:
            found.append(figure(title, points, run))
        else:
            absent.append(f"{title} ({why})" if why else title)
    tiles = [
        f"<div><h3>{escape(f.title)}</h3><p>{escape(f.value)}</p><small>{escape(f.text)}</small></div>" for f in found
    ]
    return [
        *(['<div class="figures">', *tiles, "</div>"] if tiles else []),
        *([missing(f"Not recorded: {', '.join(absent)}.")] if absent else []),
    ]


Points = Sequence[tuple[int, float]]


def _newest(run: Run, *keys: str) -> list[float | None]:
    """The newest value of each key."""
    found = [run.points(key) for key in keys]
    return [points[-1][1] if points else None for points in found]


def _from_to(points: Points) -> str:
    """The figure before training and the newest one; neither stands in for the other."""
    (begun, first), (reached, last) = points[0], points[-1]
    return f"{first:.4f} → {last:.4f}" if begun == 0 and reached else f"{last:.4f}"


def _accuracy(title: str, points: Points, images: float | None, protocol: str, first: str) -> Figure:
    (begun, _), (reached, last) = points[0], points[-1]
    words = []
    if begun == 0:
        words.append(f"{first} → now" if reached else f"{first}, before training")
    if images:
        words.append(f"± {math.sqrt(last * (1 - last) / images):.4f} standard error of {images:,.0f} images")
    best_step, best = max(points, key=lambda point: point[1])
    if best > last:
        words.append(f"best {best:.4f} at step {best_step:,}")
    return Figure(title, _from_to(points), "; ".join([*words, *([protocol] if protocol else [])]))


def _knn(title: str, points: Points, run: Run) -> Figure:
    k, temperature, bank, queries = _newest(run, "knn_k", "knn_temperature", "knn_bank", "knn_queries")
    known = k is not None and temperature is not None and bank is not None
    protocol = f"k {k:g}, T {temperature:g}, bank {bank:,.0f}" if known else ""
    return _accuracy(title, points, queries, protocol, first_network(read_json(run.place / "facts.json")))


def _probe(title: str, points: Points, run: Run) -> Figure:
    [training] = _newest(run, "probe_train_top1")
    said = "trained beside the run, which never feels it" + (f"; {training:.4f} on training views" if training else "")
    return _accuracy(title, points, None, said, "untrained probe (chance)")


def _loss(title: str, points: Points, run: Run) -> Figure:
    least_step, least = min(points, key=lambda point: point[1])
    words = f"first → newest; lowest {least:.4g} at step {least_step:,}; cannot rank runs"
    return Figure(title, f"{points[0][1]:.4g} → {points[-1][1]:.4g}", words)


def _rank(title: str, points: Points, run: Run) -> Figure:
    share, rankme, alpha = _newest(run, "effective_rank_share", "rankme", "alpha_req")
    last = points[-1][1]
    words = [
        "of backbone features of training views, centred",
        *([f"{share:.0%} of what is possible"] if share is not None else []),
        *([f"RankMe {rankme:.1f}"] if rankme is not None else []),
        *([f"alpha-ReQ {alpha:.2f}"] if alpha is not None else []),
    ]
    return Figure(title, f"{last:.1f}" + (f" of {last / share:.0f}" if share else ""), "; ".join(words))


def _spread(title: str, points: Points, run: Run) -> Figure:
    lowest = min(value for _, value in points)
    return Figure(title, f"{points[-1][1]:.3f}", f"1: spread over the sphere, 0: collapse; lowest {lowest:.3f}")


def _lidar(title: str, points: Points, run: Run) -> Figure:
    images, number = _newest(run, "lidar_images", "lidar_views")
    known = images is not None and number is not None
    words = f"of {images:,.0f} images, {number:.0f} views of each" if known else ""
    return Figure(title, f"{points[-1][1]:.1f}", words)


def _speed(title: str, points: Points, run: Run) -> Figure:
    waits = [value for _, value in run.points("data_wait")]
    words = f"median; {statistics.median(waits):.0%} of the time waiting for data" if waits else "median"
    return Figure(title, f"{statistics.median(value for _, value in points):,.0f}", words)


# ---------------------------------------------------------------- what was run


def _recipe(run: Run, run_dir: Path) -> list[str]:
    try:
        lock = (run_dir / "recipe.lock.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [missing("No recipe: the directory has no recipe.lock.toml, as where another program trains.")]
    problem = [missing(run.problem)] if run.problem else []
    summary = f"Recipe <small>{escape(run.recipe.hash())}</small>" if run.recipe else "Recipe"
    return [*problem, f"<details><summary>{summary}</summary><pre>{escape(lock)}</pre></details>"]


def _provenance(env: Mapping[str, Any]) -> list[str]:
    if not env:
        return [missing("No provenance: the directory has no env.json.")]
    rows = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_told(value))}</dd>" for key, value in env.items()
    )
    return [f'<details><summary>Provenance</summary><dl class="facts">{rows}</dl></details>']


def _told(value: object) -> str:
    """A value of `env.json` as text: a command as one line, tables as `name value` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        plain = all(isinstance(inner, str) for inner in value)
        return " ".join(map(str, value)) if plain else "\n".join(map(_told, value))
    return ABSENT if value is None else str(value)
