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
        "## Figures on CIFAR-10",
        "Published figures are other projects' own, with the epochs and the protocol that they give; a linear probe "
        "and kNN do not compare, nor do two kNN protocols. The last column is what was measured with these recipes, by "
        "`python benchmarks/methods.py`, and is empty where nothing was. It shows that a method learns. It does not "
        "rank methods: the runs are short, and their optimizer is one for all.",
        table(
            ("Method", "Published", "Measured here"),
            [(m["name"], "<br>".join(map(_published, m.get("published", []))), _measured(m["recipe"])) for m in known],
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


def _published(figure: dict[str, Any]) -> str:
    batch = f", batch {figure['batch_size']}" if "batch_size" in figure else ""
    epochs = f"{figure['epochs']} epoch{'s' * (figure['epochs'] != 1)}"
    return f"{figure['figure']:g} {figure['metric']}, {figure['backbone']}, {epochs}{batch} ({figure['source']})"


def _measured(recipe: str) -> str:
    lines = []
    for setting in dict.fromkeys(r["setting"] for r in measured()):
        records = [r for r in measured() if (r["recipe"], r["setting"]) == (recipe, setting)]
        if records:
            figures = ", ".join(f"{r['knn']:.4f}" for r in records)
            seeds = ", ".join(str(r["seed"]) for r in records)
            first = records[0]
            lines.append(
                f"{figures} kNN, from {first['knn_random']:.4f} (seed{'s' * (len(records) > 1)} {seeds}; {setting}; "
                f"recipe {first['hash']}, commit {first['commit'][:7]})"
            )
    return "<br>".join(lines)


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
        "\"From\" is the random network's kNN at step 0, by the same protocol. The recipe's hash is that of the recipe "
        "with the setting's overrides; `benchmarks/methods.json` lists these for each run.",
        table(("Setting", "Meaning", "kNN protocol", "Hardware", "Versions"), rows),
    ]
