"""One HTML file of tables and curves that opens anywhere: no server, no network, no word taken for markup.

The one place that draws curves for a browser. Text comes in as text and is escaped here. The page carries plotly.js
inside, and a policy by which the browser runs nothing but the two scripts that this module wrote and fetches nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that stay apart for colour-blind readers (Okabe & Ito 2008; Wong 2011, Nature Methods 8:441), without their
black and yellow, which one of the two backgrounds would swallow."""
DASHES = ("", "7px,3px", "2px,2px", "9px,3px,2px,3px")
"""Strokes: once every colour is taken, the next ones come dashed."""
FEW = 50
"""Up to this many points each is marked, so that a single one is seen."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `name` says whose, and is the same in all charts; a value that is no number is a gap."""

    name: str
    steps: Sequence[int]
    epochs: Sequence[float]
    values: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """Curves of one quantity, with what it is in a sentence, and what its reader has to beware of."""

    title: str
    meaning: str
    curves: Sequence[Curve]
    warning: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text, each headed by its first cell; below it a text, and what its reader has to beware of."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    warnings: Sequence[str] = ()


def page(title: str, tables: Sequence[Table], charts: Sequence[Chart]) -> str:
    """The whole file: tables, then charts over a common x axis, which a reader counts in epochs or in steps.

    A name has one colour in all charts, and its button shows or hides it in all of them.
    """
    from plotly.offline import get_plotlyjs

    names = list(dict.fromkeys(curve.name for chart in charts for curve in chart.curves))
    scripts = [get_plotlyjs(), _SCRIPT] if charts else []
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    figures = ",".join(_figure(chart, names) for chart in charts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',  # or a browser asks its server for one
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
        *(_table(table) for table in tables),
        *_section(charts, names),
        *([f'<script type="application/json" id="figures">[{figures}]</script>'] if charts else []),
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ])  # fmt: skip


def stroke(number: int) -> tuple[str, str]:
    """Colour and dashes of the curves with the given number; 24 are all different."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _figure(chart: Chart, names: Sequence[str]) -> str:
    """A chart as plotly's JSON. plotly takes names for markup, so they are escaped; its JSON holds no `<`."""
    import plotly.graph_objects as go

    traces = []
    for curve in chart.curves:
        number = names.index(curve.name)
        colour, dashes = stroke(number)
        traces.append(go.Scatter(
            name=escape(curve.name), meta=number, x=list(curve.epochs), customdata=list(curve.steps),
            y=[_short(value) for value in curve.values], mode="lines+markers" if len(curve.steps) <= FEW else "lines",
            line={"color": colour, "dash": dashes or "solid", "width": 2}, marker={"size": 5},
            hovertemplate="%{y:.5~g}",
        ))  # fmt: skip
    return str(go.Figure(traces, {"template": "none"}).to_json())


def _short(value: float | None) -> float | None:
    """Eight digits are more than a screen shows, and half of what a float spells out."""
    return None if value is None else float(f"{value:.8g}")


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(header)}</th>' for header in table.headers)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-head="{escape(header)}">{escape(cell)}</td>'
            for header, cell in zip(table.headers[1:], row[1:], strict=True)
        )
        + "</tr>\n"
        for row in table.rows
    )
    body = f"<div><table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n" if rows else ""
    text = f"<p>{escape(table.text)}</p>\n" if table.text else ""
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>\n' for warning in table.warnings)
    return f"<h2>{escape(table.title)}</h2>\n{body}{text}{warnings}"


def _section(charts: Sequence[Chart], names: Sequence[str]) -> list[str]:
    if not charts:
        return []
    buttons = []
    for number, name in enumerate(names):
        colour, dashes = stroke(number)
        line = f'<line x2="28" y1="4" y2="4" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes or "none"}"/>'
        buttons.append(
            f'<button type="button" aria-pressed="true" data-curve="{number}">'
            f'<svg width="28" height="8" aria-hidden="true">{line}</svg>{escape(name)}</button>'
        )
    figures = []
    for number, chart in enumerate(charts):
        warning = f'<p class="warning">{escape(chart.warning)}</p>' if chart.warning else ""
        figures.append(
            f'<figure><figcaption><h3 id="title-{number}">{escape(chart.title)}</h3><p>{escape(chart.meaning)}</p>'
            f"{warning}</figcaption>\n"
            f'<div id="chart-{number}" role="img" aria-labelledby="title-{number}"></div></figure>'
        )
    return [
        "<h2>Curves</h2>\n<noscript>The curves are drawn by the browser, with JavaScript, which is off.</noscript>",
        '<section>\n<div class="bar"><div role="group" aria-label="Curves that are shown">',
        *buttons,
        '</div><label>over <select id="over"><option>epochs</option><option>steps</option></select></label></div>',
        '<div class="charts">',
        *figures,
        "</div>\n</section>",
    ]


_STYLE = """
:root { --paper: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #dfe3e8; --warning: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #30363d; --warning: #e3b341; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
div:has(> table) { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
  max-width: 18rem; overflow-wrap: break-word; }
tbody th { position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); font-weight: 500; }
.warning { border-left: 3px solid var(--warning); padding-left: .6rem; margin: .6rem 0; max-width: 60rem; }
.bar { position: sticky; top: 0; z-index: 9; background: var(--paper); border-bottom: 1px solid var(--line);
  padding: .5rem 0; display: flex; gap: .5rem 1rem; align-items: center; max-height: 35vh; overflow-y: auto; }
.bar > div { display: flex; flex-wrap: wrap; gap: .4rem; flex: 1; }
button, select { font: inherit; font-size: .9rem; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: .4rem; padding: .2rem .6rem; text-align: left; }
option { background: var(--paper); }
button { cursor: pointer; } button svg { margin-right: .5rem; vertical-align: middle; }
button[aria-pressed=false] { color: var(--soft); text-decoration: line-through; }
button[aria-pressed=false] svg { opacity: .25; }
label { white-space: nowrap; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.charts figure { margin: 1rem 0 0; min-width: 0; display: flex; flex-direction: column; }
figcaption { flex: 1; } figcaption p { margin: .2rem 0; color: var(--soft); font-size: .9rem; }
figure > div { height: 18rem; }
@media (max-width: 40rem) {  /* a row becomes a card, a cell a line of it */
  table, tbody, tr, tbody th, td { display: block; }
  thead { display: none; }
  th, td { max-width: none; overflow-wrap: anywhere; }
  tbody th { position: static; border: 0; padding-bottom: 0; }
  tr { border-bottom: 1px solid var(--line); padding-bottom: .4rem; }
  td { border: 0; padding: .1rem 0; display: flex; gap: 1rem; }
  td::before { content: attr(data-head); color: var(--soft); flex: 0 0 8rem; }
}
"""

_SCRIPT = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = figures.map((_, i) => document.getElementById("chart-" + i));
const coordinates = {
  epochs: figures.map(figure => figure.data.map(trace => trace.x)),
  steps: figures.map(figure => figure.data.map(trace => trace.customdata)),
};
const touch = matchMedia("(pointer: coarse)").matches;  // there a finger on a chart scrolls the page

function xAxis(over) {
  const end = coordinates[over].flat(2).reduce((a, b) => Math.max(a, b), 0) || 1;
  return {
    title: {text: over, standoff: 8}, fixedrange: touch, hoverformat: over === "steps" ? "d" : ".2~f",
    unifiedhovertitle: {text: over + " %{x}"}, autorange: true,
    autorangeoptions: {minallowed: -0.01 * end, maxallowed: 1.01 * end},  // the same in every chart
  };
}

function template() {
  const style = getComputedStyle(document.documentElement);
  const [paper, ink, soft, line] = ["paper", "ink", "soft", "line"].map(name => style.getPropertyValue("--" + name));
  const axis = {gridcolor: line, linecolor: line, zeroline: false, tickcolor: line, automargin: true,
    color: soft, exponentformat: "e", spikecolor: soft, spikethickness: 1};
  return {layout: {
    paper_bgcolor: paper, plot_bgcolor: paper, font: {color: ink, family: "system-ui, sans-serif"},
    hoverlabel: {bgcolor: paper, bordercolor: line, font: {color: ink}, namelength: -1}, xaxis: axis, yaxis: axis,
  }};
}

const drawn = figures.map((figure, i) => Plotly.newPlot(plots[i], figure.data, {
  template: template(), xaxis: xAxis("epochs"), yaxis: {fixedrange: touch}, showlegend: false,
  hovermode: "x unified", dragmode: touch ? false : "zoom", margin: {l: 56, r: 16, t: 8, b: 40},
}, {responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]]}));

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const plot of plots) Plotly.relayout(plot, {template: template()});
});

for (const button of document.querySelectorAll("button[data-curve]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", shown);
    for (const plot of plots) {
      const traces = plot.data.flatMap((trace, i) => trace.meta === Number(button.dataset.curve) ? [i] : []);
      if (traces.length) Plotly.restyle(plot, {visible: shown}, traces);
    }
  });
}

const over = document.getElementById("over");
over.value = "epochs";  // a browser that comes back to the page would keep the other choice
over.addEventListener("change", () => {
  plots.forEach((plot, i) => Plotly.update(plot, {x: coordinates[over.value][i]}, {xaxis: xAxis(over.value)}));
});

let following = false;  // a zoom in one chart is a zoom in all, once
Promise.all(drawn).then(() => plots.forEach(plot => plot.on("plotly_relayout", async change => {
  const range = "xaxis.range[0]" in change ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : null;
  if (following || !(range || change["xaxis.autorange"])) return;
  following = true;
  const moved = range ? {"xaxis.range": range} : {"xaxis.autorange": true};
  await Promise.all(plots.filter(other => other !== plot).map(other => Plotly.relayout(other, moved)));
  following = false;
})));
"""
