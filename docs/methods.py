"""The page on methods, from the recipes, docs/methods.toml (papers, published figures) and what was measured here."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sslkit import registry
from sslkit.recipe import Recipe, read_recipe

HERE = Path(__file__).parent
MEASURED = HERE.parent / "benchmarks" / "methods.json"
"""Written by benchmarks/methods.py alone: figures are never copied by hand."""

Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def methods() -> list[dict[str, Any]]:
    """What docs/methods.toml knows of each method, in its order."""
    found: list[dict[str, Any]] = tomllib.loads((HERE / "methods.toml").read_text(encoding="utf-8"))["method"]
    return found


def measured() -> list[dict[str, Any]]:
    """What benchmarks/methods.py measured: one record for each recipe, setting and seed."""
    found: list[dict[str, Any]] = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else []
    return found


def stale() -> list[str]:
    """Records whose recipe, with the overrides that they were measured with, is another one by now."""
    return [
        f"{record['recipe']} ({record['setting']}, seed {record['seed']})"
        for record in measured()
        if read_recipe(record["recipe"], record["overrides"]).hash() != record["hash"]
    ]


def methods_page(table: Table) -> list[str]:
    """The generated page, part by part."""
    known = methods()
    recipes = {m["recipe"]: read_recipe(m["recipe"]) for m in known}
    return [
        "# Methods",
        "A method is a recipe. Each of these comes with sslkit (`sslkit recipes` lists them, `sslkit copy` writes one "
        "to a file of yours); the numbers in a recipe say in comments where they come from. `sslkit diff "
        "byol_cifar10 simsiam_cifar10` shows how two of them differ, component by component.",
        table(
            ("Method", "Recipe", "Loss", "Target", "Predictor", "Views", "Paper"),
            [_parts(m, recipes[m["recipe"]]) for m in known],
        ),
        "## Published figures on CIFAR-10",
        "Other projects' own figures, for ResNet-18, in per cent, with the epochs and batch that they give. A linear "
        "probe and kNN do not compare, nor do two kNN protocols.",
        *_published(known, table),
        "## Measured here",
        "Measured with these recipes by `python benchmarks/methods.py`, which writes them to "
        "`benchmarks/methods.json`; empty where nothing was measured. It shows that a method learns. It does not rank "
        "methods: the runs are short, and their optimizer is one for all.",
        table(
            ("Method", "kNN: random network", "kNN: trained", "Seed", "Recipe", "Commit", "Setting"), _measured(known)
        ),
        *_settings(table),
    ]


def _parts(method: dict[str, Any], recipe: Recipe) -> tuple[str, ...]:
    def name(part: Any) -> str:
        return f"`{registry.name_of(type(part))}`" if part is not None else "none"

    paper = method["paper"]
    if "arxiv" in method:
        paper += f", [{method['arxiv']}](https://arxiv.org/abs/{method['arxiv']})"
    else:
        paper += f", [doi](https://doi.org/{method['doi']})"
    return (
        method["name"],
        f"`{method['recipe']}`",
        name(recipe.loss),
        name(recipe.target_updater),
        name(recipe.predictor),
        name(recipe.view_generator),
        paper,
    )


def _published(known: Sequence[dict[str, Any]], table: Table) -> list[str]:
    """A column for each source, length and batch; what sets a figure apart from its column is a note."""
    columns: dict[tuple[str, int, int | None], str] = {}
    metrics: dict[str, str] = {}
    for figure in (f for m in known for f in m.get("published", [])):
        source = figure["source"].partition("; ")[0]
        metrics.setdefault(source, figure["metric"])
        column = _column(figure)
        epochs = f"{figure['epochs']} epoch{'s' * (figure['epochs'] != 1)}"
        columns[column] = ", ".join([source.split()[0], epochs, *([f"batch {column[2]}"] if column[2] else [])])
    rows = []
    for method in known:
        figures = method.get("published", [])
        by_column = {_column(f): str(f["figure"]) for f in figures}
        notes = dict.fromkeys(_note(f, metrics) for f in figures)
        rows.append((method["name"], *(by_column.get(c, "") for c in columns), "; ".join(filter(None, notes))))
    legend = "\n".join(f"- {source.split()[0]}: {metric} ({source})" for source, metric in metrics.items())
    return [table(("Method", *columns.values(), "Note"), rows), legend]


def _column(figure: dict[str, Any]) -> tuple[str, int, int | None]:
    source = figure["source"].partition("; ")[0]
    return source, figure["epochs"], None if source.startswith("EMP-SSL") else figure["batch_size"]


def _note(figure: dict[str, Any], metrics: dict[str, str]) -> str:
    """What sets a figure apart from others of its source."""
    source, _, note = figure["source"].partition("; ")
    other = figure["metric"] if figure["metric"] != metrics[source] else ""
    return ", ".join(filter(None, [f"{source.split()[0]}: {note}" if note else "", other]))


def _measured(known: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for method in known:
        records = [r for r in measured() if r["recipe"] == method["recipe"]]
        rows += [
            (
                method["name"], f"{r['knn_random']:.4f}", f"{r['knn']:.4f}", str(r["seed"]), f"`{r['hash']}`",
                f"`{r['commit'][:7]}`", r["setting"],
            )
            for r in records
        ] or [(method["name"], *[""] * 6)]  # fmt: skip
    return rows


def _settings(table: Table) -> list[str]:
    """What the measured column's settings were, in full."""
    first = {r["setting"]: r for r in reversed(measured())}
    if not first:
        return []
    rows = [
        (name, r["meaning"], f"k {r['knn_k']}, T {r['knn_temperature']:g}, bank {r['knn_bank']}, {r['knn_queries']} "
         "queries, eval mode, cosine", r["hardware"], r["versions"])
        for name, r in sorted(first.items())
    ]  # fmt: skip
    return [
        "## Settings of the measurements",
        "The random network's figure is kNN at step 0, by the same protocol. The hash is that of the recipe with the "
        "setting's overrides; `benchmarks/methods.json` lists these for each run.",
        table(("Setting", "Meaning", "kNN protocol", "Hardware", "Versions"), rows),
    ]
