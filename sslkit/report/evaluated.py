"""What `sslkit evaluate` measured, as a table of a report. It comes from a file, and is not taken on trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sslkit.evaluation_file import FLOORS
from sslkit.report.features import missing


def evaluated(records: Sequence[Mapping[str, Any]], problem: str = "", fingerprint: str | None = None) -> list[str]:
    """Markup of the records of `evaluation.json`; where there are none, a word of how to get them.

    Args:
        records: What the file has.
        problem: Why some are missing.
        fingerprint: Of the run's own data.
    """
    floors = [name for name in FLOORS if any(_accuracy(record.get(name)) for record in records)]
    rows = [row for record in records if (row := _row(record, floors, fingerprint))]
    told = [missing(f"{problem}.")] if problem else []
    if not rows:
        return told or [missing("Not evaluated: `sslkit evaluate` measures kNN, linear classifiers and fine-tuning.")]
    columns = ("Protocol", "Top-1", *floors, "Chosen", "Weights", "Data")
    heads = "".join(f'<th scope="col">{head}</th>' for head in columns)
    return [
        *told,
        f"<div><table><thead><tr>{heads}</tr></thead>\n<tbody>",
        *rows,
        "</tbody></table></div>",
        '<p class="soft">On test images, after every choice was made on training images. random: the network of step '
        "0; pixels: the images themselves. evaluation.json has all that a figure depends on.</p>",
    ]


def _row(record: Mapping[str, Any], floors: list[str], fingerprint: str | None) -> str:
    top1 = _accuracy(record.get("top1"))
    if not top1:
        return ""
    spread = _accuracy(record.get("spread"))
    weights = record.get("checkpoint")
    step = weights.get("step") if isinstance(weights, dict) else None
    which = " (best by kNN on test images)" if isinstance(weights, dict) and weights.get("which") == "best" else ""
    cells = [
        ("Top-1", top1 + (f" ± {spread}" if spread else "")),
        *((name, _accuracy(record.get(name))) for name in floors),
        ("Chosen", _chosen(record.get("chosen"))),
        ("Weights", f"step {step:,}, {record.get('branch')}{which}" if isinstance(step, int) else ""),
        ("Data", _data(record, fingerprint)),
    ]
    told = "".join(f'<td data-head="{head}">{escape(cell)}</td>' for head, cell in cells)
    return f'<tr><th scope="row">{escape(str(record.get("title")))}</th>{told}</tr>'


def _data(record: Mapping[str, Any], fingerprint: str | None) -> str:
    """How many images, and whether they are others than the run's."""
    data, overrides = record.get("data"), record.get("overrides")
    if not isinstance(data, dict):
        return ""
    parts = [f"{data[key]:,} {words}" for key, words in (("train", "training"), ("test", "test"))
             if isinstance(data.get(key), int)]  # fmt: skip
    if fingerprint is not None and data.get("fingerprint") != fingerprint:
        texts = [text for text in overrides if isinstance(text, str)] if isinstance(overrides, list) else []
        parts.append(" ".join(["other data than the run's", *texts]))
    return ", ".join(parts)


def _accuracy(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return f"{value:.4f}" if number else ""


def _chosen(found: object) -> str:
    told = [
        f"{name} {one[name]:g}"
        for one in (found if isinstance(found, list) else [])
        for name in ("C", "lr")
        if isinstance(one, dict) and isinstance(one.get(name), float)
    ]
    return ", ".join(dict.fromkeys(told))
