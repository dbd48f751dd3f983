"""Deliberately wrong components: each fails one check of `sslkit.testing`, which has to say what to change.

`right.py` has a component of each kind that passes everything; the others are those with one fault each.
"""

from __future__ import annotations

from dataclasses import dataclass

from sslkit.api import Component


@dataclass(frozen=True)
class Case:
    """A wrong component, the check that finds it out, and words of what it says."""

    component: Component
    check: str
    says: str
