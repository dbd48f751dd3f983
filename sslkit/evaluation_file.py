"""`evaluation.json`: what `sslkit evaluate` measured of a run, for whoever writes it and whoever shows it. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sslkit.errors import UserError

FILE = "evaluation.json"
SCHEMA = 1
FLOORS = {"random": "the random network", "initialised": "the weights it began with", "pixels": "raw pixels"}
"""Figures that stand beside a record's `top1`, in words."""


def read(run: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records, and whether these are all that the file has: it may be damaged, or a stranger's. None without it.

    Raises:
        UserError: another version of sslkit wrote it.
        OSError: it cannot be read.
    """
    path = run / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [], True
    except (ValueError, RecursionError):
        return [], False
    if not isinstance(found, dict) or "schema" not in found:
        return [], False
    if found["schema"] != SCHEMA:
        raise UserError(f"{path}: has the schema {found['schema']!r}, and this version of sslkit knows {SCHEMA}; use "
                        "the version that wrote it, or move it out of the way")  # fmt: skip
    records = found.get("records")
    if not isinstance(records, list):
        return [], False
    sound = [record for record in records if isinstance(record, dict) and isinstance(record.get("protocol"), str)]
    return sound, len(sound) == len(records)


def shown(run: Path) -> tuple[list[dict[str, Any]], str]:
    """The records for a page, and in words why some are missing; empty where none are."""
    try:
        records, sound = read(run)
    except (UserError, OSError) as error:
        return [], f"{FILE} cannot be read by this version of sslkit" if isinstance(error, UserError) else (
            f"{FILE} cannot be read: {error.strerror or error}"
        )
    return records, "" if sound else f"{FILE} is damaged, and a part of it is left out"
