"""Sphinx reads this: `python -m sphinx -W --keep-going -b html docs docs/_build`."""

from __future__ import annotations

project = "sslkit"
author = "The sslkit authors"
copyright = author

extensions = ["myst_parser"]
exclude_patterns = ["_build", "examples"]
root_doc = "index"
nitpicky = True

myst_heading_anchors = 3
"""Headings down to this level can be linked to as `page.md#heading`."""

html_theme = "furo"
html_title = "sslkit"
html_show_copyright = False
html_copy_source = False
