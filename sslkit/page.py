"""One HTML file that opens anywhere: no server, no network, no word taken for markup.

Text comes in as text and is escaped here or by whoever writes the markup. The file carries its scripts and styles
inside, and a policy by which the browser runs nothing but these scripts and fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from sslkit.errors import UserError
from sslkit.files import in_one_piece


@dataclass(frozen=True)
class Table:
    """Rows of text, each headed by its first cell; below it a text, and what its reader has to beware of."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    warnings: Sequence[str] = ()


def document(
    title: str, body: Iterable[str], *, data: str = "", scripts: Sequence[str] = (), styles: Sequence[str] = (),
    reload: int | None = None,
) -> str:  # fmt: skip
    """The whole file.

    Args:
        title: of the window, as text.
        body: markup, which stands in the order given.
        data: JSON without `<`, which the scripts find by the id `figures`.
        scripts: what the browser may run, and nothing else.
        styles: what the page looks like, besides the style that all pages have.
        reload: seconds after which the browser reads the file again; None for never.
    """
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        *([f'<meta http-equiv="refresh" content="{reload}">'] if reload else []),
        '<link rel="icon" href="data:,">',  # or a browser asks its server for one
        f"<title>{escape(title)}</title>\n<style>{''.join([asset('page.css'), *styles])}</style>\n</head>\n<body>",
        *body,
        *([f'<script type="application/json" id="figures">{data}</script>'] if data else []),
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ])  # fmt: skip


def asset(name: str) -> str:
    """A style or a script of the package."""
    return (files("sslkit") / "web" / name).read_text(encoding="utf-8")


def table(shown: Table) -> str:
    """A heading, and below it what the table holds."""
    heads = "".join(f'<th scope="col">{escape(header)}</th>' for header in shown.headers)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-head="{escape(header)}">{escape(cell)}</td>'
            for header, cell in zip(shown.headers[1:], row[1:], strict=True)
        )
        + "</tr>\n"
        for row in shown.rows
    )
    body = f"<div><table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n" if rows else ""
    text = f"<p>{escape(shown.text)}</p>\n" if shown.text else ""
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>\n' for warning in shown.warnings)
    return f"<h2>{escape(shown.title)}</h2>\n{body}{text}{warnings}"


def page_path(out: str | Path) -> Path:
    """Where a page is to be written.

    Raises:
        UserError: the name is not one of a page.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: should end in .html, since it is a page for a browser")
    return path


def save(path: Path, text: str) -> None:
    """Write a page in one piece, so that a browser never reads half of it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with in_one_piece(path) as staging:
            staging.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}; choose another place") from None


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
