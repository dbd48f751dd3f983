"""Curves, spectra and maps for a browser, and the page that lays the curves of several runs over each other.

The one place that draws for a browser. plotly.js takes names for markup, so they are escaped for it as for the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from sslkit.page import Table, asset, document, table

__all__ = ["Chart", "Curve", "Drawings", "Level", "Map", "Mark", "Spectrum", "Table", "page", "stroke", "thinned"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that stay apart for colour-blind readers (Okabe & Ito 2008; Wong 2011, Nature Methods 8:441), without their
black and yellow, which one of the two backgrounds would swallow."""
DASHES = ("", "7px,3px", "2px,2px", "9px,3px,2px,3px")
"""Strokes: once every colour is taken, the next ones come dashed."""
SYMBOLS = {
    "circle": "M1 5a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "triangle-up": "M5 1L9 9H1Z", "square": "M1.5 1.5H8.5V8.5H1.5Z",
    "diamond": "M5 0L10 5L5 10L0 5Z",
}  # fmt: skip
"""Marks of a map, with their outlines: once every colour is taken, the next ones have another form."""
FEW = 50
"""Up to this many points each is marked, so that a single one is seen."""
MANY = 2000
"""Of longer curves, at most this many points are drawn."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `name` says whose, and is the same in all charts; a value that is no number is a gap."""

    name: str
    steps: Sequence[int]
    epochs: Sequence[float]
    values: Sequence[float | None]
    band: Sequence[tuple[float, float] | None] = ()
    """Lower and upper edge of what is shaded around each point; empty for a curve without a band."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a vertical line with a few letters above it."""

    step: int
    epoch: float
    text: str
    severity: Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Level:
    """A value to read a curve against: a horizontal dotted line in the colour of the chart's curve of that number."""

    value: float
    curve: int


@dataclass(frozen=True)
class Chart:
    """Curves of one quantity, with what it is in a sentence, and what its reader has to beware of."""

    title: str
    meaning: str
    curves: Sequence[Curve]
    warning: str = ""
    marks: Sequence[Mark] = ()
    levels: Sequence[Level] = ()
    log: bool = False


@dataclass(frozen=True)
class Spectrum:
    """Values in falling order, drawn over their position on a logarithmic scale."""

    title: str
    meaning: str
    values: Sequence[float]


@dataclass(frozen=True)
class Map:
    """Points in the plane in one or several layouts, grouped by name; a group has the same points in every layout."""

    title: str
    meaning: str
    groups: Sequence[str]
    """The group of each point; empty for points without groups."""
    layouts: Mapping[str, Sequence[Sequence[float]]]
    """`(x, y)` of each point, by the layout's name; the first one is shown at first."""


def page(title: str, tables: Sequence[Table], charts: Sequence[Chart]) -> str:
    """A whole file: tables, then charts over a common x axis, which a reader counts in epochs or in steps.

    A name has one colour in all charts, and its button shows or hides it in all of them.
    """
    names = list(dict.fromkeys(curve.name for chart in charts for curve in chart.curves))
    drawn = Drawings()
    figures = [drawn.chart(chart, names) for chart in charts]
    body = [f"<h1>{escape(title)}</h1>", *map(table, tables)]
    if charts:
        buttons = [f'<button type="button" aria-pressed="true" data-curve="{number}">{_line(number)}{escape(name)}'
                   "</button>" for number, name in enumerate(names)]  # fmt: skip
        group = "\n".join(['<div role="group" aria-label="Curves that are shown">', *buttons, "</div>"])
        body += ["<h2>Curves</h2>", drawn.section(figures, group)]
    return document(title, body, data=drawn.data, scripts=drawn.scripts)


def stroke(number: int) -> tuple[str, str]:
    """Colour and dashes of the curves with the given number; 24 are all different."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def mark(number: int) -> tuple[str, str]:
    """Colour and form of the points of the group with the given number; 24 are all different."""
    return COLOURS[number % len(COLOURS)], list(SYMBOLS)[number // len(COLOURS) % len(SYMBOLS)]


def thinned(curve: Curve, limit: int = MANY) -> Curve:
    """A curve of at most `limit` points that looks the same: of every stretch the lowest and the highest point.

    A gap stays a gap, and the first and the last point stay.
    """
    number = len(curve.values)
    if number <= limit:
        return curve
    inner, kept = number - 2, {0, number - 1}
    stretches = (limit - 2) // 3
    for stretch in range(stretches):
        places = range(1 + stretch * inner // stretches, 1 + (stretch + 1) * inner // stretches)
        values = {place: value for place in places if (value := _short(curve.values[place])) is not None}
        if values:
            kept |= {min(values, key=values.__getitem__), max(values, key=values.__getitem__)}
        if len(values) < len(places):
            kept.add(next(place for place in places if place not in values))
    order = sorted(kept)
    return Curve(
        curve.name, [curve.steps[i] for i in order], [curve.epochs[i] for i in order],
        [curve.values[i] for i in order], [curve.band[i] for i in order] if curve.band else (),
    )  # fmt: skip


@dataclass
class Drawings:
    """The drawings of a page: each is asked for its markup, and then they give data and scripts for all of them.

    `epochs` says whether curves can be drawn over epochs; over steps they always can.
    """

    epochs: bool = True
    _figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def data(self) -> str:
        """JSON in which there is no `<`, for `page.document`; empty where nothing was drawn."""
        if not self._figures:
            return ""
        return json.dumps(self._figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

    @property
    def scripts(self) -> list[str]:
        """plotly.js and what calls it, where anything was drawn."""
        if not self._figures:
            return []
        from plotly.offline import get_plotlyjs

        return [get_plotlyjs(), asset("charts.js")]

    def section(self, figures: Sequence[str], group: str = "<div></div>") -> str:
        """Charts over a common x axis, below a bar that stays in sight: markup of its own, and what x counts."""
        over = "".join(f"<option>{unit}</option>" for unit in (["epochs", "steps"] if self.epochs else ["steps"]))
        return "\n".join([
            "<noscript>The curves are drawn by the browser, with JavaScript, which is off.</noscript>",
            '<section>\n<div class="bar">',
            group,
            f'<label>over <select id="over">{over}</select></label></div>',
            '<div class="charts">',
            *figures,
            "</div>\n</section>",
        ])  # fmt: skip

    def chart(self, chart: Chart, names: Sequence[str] | None = None) -> str:
        """Markup of a chart. `names` give each curve its number where the page has a button for each name; without
        them the chart has buttons of its own, with the newest value of each curve."""
        traces, buttons, drawn = [], [], []
        curves = [thinned(curve) for curve in chart.curves]
        numbers = [place if names is None else names.index(curve.name) for place, curve in enumerate(curves)]
        bands = [_band(curve, number) for curve, number in zip(curves, numbers, strict=True) if any(curve.band)]
        for place, (curve, number) in enumerate(zip(curves, numbers, strict=True), len(bands)):
            colour, dashes = stroke(number)
            width = 2 if names else 1.5 if len(curve.steps) <= MANY // 4 else 1
            values = [_short(value) for value in curve.values]
            traces.append({
                "type": "scatter", "name": escape(curve.name), "meta": number, "x": list(curve.epochs),
                "customdata": list(curve.steps), "y": values,
                "mode": "lines+markers" if len(curve.steps) <= FEW else "lines",
                "line": {"color": colour, "dash": dashes or "solid", "width": width}, "marker": {"size": 5},
                "hovertemplate": "%{y:.5~g}",
            })  # fmt: skip
            drawn += [value for value in values if value is not None]
            newest = next((value for value in reversed(values) if value is not None), None)
            buttons.append(self._button(place, _line(number), curve.name, "" if newest is None else f"{newest:.4g}"))
        if names is None and drawn and min(drawn) > 0 and (chart.log or max(drawn) > 10 * min(drawn)):
            buttons.append(f'<button type="button" aria-pressed="{str(chart.log).lower()}" '
                           f'data-log="{len(self._figures)}">log</button>')  # fmt: skip
        return self._figure(
            chart.title, chart.meaning, buttons if names is None else [], chart.warning, kind="curves",
            data=[*bands, *traces],  # below the lines
            log=chart.log, marks=[[m.step, m.epoch, escape(m.text), m.severity] for m in chart.marks],
            levels=[[level.value, stroke(level.curve)[0]] for level in chart.levels],
        )  # fmt: skip

    def spectrum(self, spectrum: Spectrum) -> str:
        """Markup of a spectrum."""
        values = [_short(value) if value > 0 else None for value in spectrum.values]
        trace = {
            "type": "scatter", "name": "value", "x": list(range(1, len(values) + 1)), "y": values,
            "mode": "lines+markers" if len(values) <= FEW else "lines", "line": {"color": COLOURS[0], "width": 2},
            "marker": {"size": 5}, "hovertemplate": "%{y:.3~g}",
        }  # fmt: skip
        return self._figure(spectrum.title, spectrum.meaning, [], kind="spectrum", data=[trace], log=True)

    def map(self, shown: Map, most: int = 24) -> str:
        """Markup of a map; beyond `most` groups, the smaller ones are drawn as one."""
        groups = list(shown.groups) or [""] * max((len(points) for points in shown.layouts.values()), default=0)
        names = sorted(set(groups), key=lambda name: (-groups.count(name), name))
        names, others = (names[: most - 1], names[most - 1 :]) if len(names) > most else (names, [])
        members = {name: [i for i, group in enumerate(groups) if group == name] for name in sorted(names)}
        if others:
            rest = set(others)
            members[f"{len(others)} others"] = [i for i, group in enumerate(groups) if group in rest]
        traces, buttons = [], []
        for number, (name, places) in enumerate(members.items()):
            colour, symbol = mark(number)
            traces.append({
                "type": "scatter", "name": escape(name), "mode": "markers",
                "text": [escape(groups[place]) for place in places],
                "marker": {"size": 7, "color": colour, "symbol": symbol, "opacity": 0.8},
                "hovertemplate": "%{text}<extra></extra>" if shown.groups else "<extra></extra>",
                "layouts": {
                    layout: [[_short(points[place][axis]) for place in places] for axis in (0, 1)]
                    for layout, points in shown.layouts.items()
                },
            })  # fmt: skip
            picture = (f'<svg width="10" height="10" aria-hidden="true"><path d="{SYMBOLS[symbol]}" fill="{colour}"/>'
                       "</svg>")  # fmt: skip
            buttons.append(self._button(number, picture, name, str(len(places))))
        layouts = list(shown.layouts)
        if len(layouts) > 1:
            chosen = "".join(f"<option>{escape(name)}</option>" for name in layouts)
            buttons.append(f'<label>by <select data-layout="{len(self._figures)}">{chosen}</select></label>')
        title, meaning = shown.title, shown.meaning
        return self._figure(title, meaning, buttons if shown.groups else buttons[1:], kind="map", data=traces)

    def _button(self, trace: int, picture: str, name: str, value: str) -> str:
        return (f'<button type="button" aria-pressed="true" data-chart="{len(self._figures)}" data-trace="{trace}">'
                f"{picture}{escape(name)} <b>{escape(value)}</b></button>")  # fmt: skip

    def _figure(self, title: str, meaning: str, buttons: Sequence[str], warning: str = "", **figure: Any) -> str:
        number = len(self._figures)
        self._figures.append(figure)
        warned = f'<p class="warning">{escape(warning)}</p>' if warning else ""
        legend = f'<div class="legend">{"".join(buttons)}</div>' if buttons else ""
        return (
            f'<figure class="{figure["kind"]}"><figcaption><h3 id="title-{number}">{escape(title)}</h3>'
            f"<p>{escape(meaning)}</p>{warned}{legend}</figcaption>\n"
            f'<div id="chart-{number}" role="img" aria-labelledby="title-{number}"></div></figure>'
        )


def _band(curve: Curve, number: int) -> dict[str, Any]:
    """The trace that shades a curve's band: out along the lower edge and back along the upper one, between gaps."""
    drawn: list[tuple[float | None, int | None, float | None]] = []
    stretch: list[int] = []
    for place in range(len(curve.band) + 1):
        if place < len(curve.band) and curve.band[place] is not None:
            stretch.append(place)
        elif stretch:
            for edge, places in ((0, stretch), (1, stretch[::-1])):
                for point in places:
                    edges = curve.band[point]
                    assert edges is not None
                    drawn.append((curve.epochs[point], curve.steps[point], _short(edges[edge])))
            drawn.append((None, None, None))
            stretch = []
    red, green, blue = (int(stroke(number)[0][i : i + 2], 16) for i in (1, 3, 5))
    return {
        "type": "scatter", "name": escape(curve.name), "meta": number, "x": [x for x, _, _ in drawn],
        "customdata": [step for _, step, _ in drawn], "y": [y for _, _, y in drawn], "mode": "lines", "fill": "toself",
        "fillcolor": f"rgba({red}, {green}, {blue}, 0.2)", "line": {"width": 0}, "hoverinfo": "skip",
    }  # fmt: skip


def _line(number: int) -> str:
    colour, dashes = stroke(number)
    line = f'<line x2="28" y1="4" y2="4" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes or "none"}"/>'
    return f'<svg width="28" height="8" aria-hidden="true">{line}</svg>'


def _short(value: float | None) -> float | None:
    """Eight digits are more than a screen shows, and half of what a float spells out; None if it is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.8g}")
