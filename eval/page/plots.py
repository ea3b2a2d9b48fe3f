"""The page's plots as inline SVG. Their colours are CSS variables, so that they follow light and dark mode.

They need matplotlib, from the extra mhconvert[plot].
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

from mhconvert import extras

# Placeholder colours that `_svg` replaces by CSS variables, which matplotlib does not support.
INK = {
    "#010203": "var(--text)",
    "#010204": "var(--quiet)",
    "#010205": "var(--line)",
    "#010206": "var(--ground)",
}
TEXT, QUIET, LINE, GROUND = INK
SERIES = {f"#02030{n}": f"var(--series-{n})" for n in range(6)}
MARKERS = "osD^vP"
NAME_LENGTH = 40  # characters of a model's name in a plot


@dataclass(frozen=True)
class Point:
    """A model in the plot of perplexity against the KV budget.

    Attributes:
        kept: KV cache as a fraction of the donor's.
        ratio: perplexity over the donor's.
        joined: whether the point is on its method's line; true for a converted model that was not trained.
    """

    name: str
    method: str
    kept: float
    ratio: float
    joined: bool


def available() -> bool:
    """Whether matplotlib is installed."""
    return extras.is_installed("matplotlib")


def layers(series: Sequence[tuple[str, Sequence[float | None]]], y: str, label: str) -> str:
    """SVG of a value by layer on a logarithmic axis; zeros are gaps.

    Args:
        series: (name, values by layer), one line each.
        y, label: of the axis, and of the whole for those who do not see it.
    """
    axes = _axes("layer", y)
    for index, (_, values) in enumerate(series):
        drawn = [value if _positive(value) else math.nan for value in values]
        axes.plot(drawn, label=str(index), **_line_style(index))
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend = axes.figure.legend(
        loc="outside lower left", frameon=False, fontsize=9.5, labelcolor=TEXT, ncols=2
    )
    # Set afterwards: matplotlib leaves out a label that starts with "_" and reads "$" as mathematics.
    for text in legend.get_texts():
        text.set_text(_short(series[int(text.get_text())][0]))
        text.set_parse_math(False)
    return _svg(axes, label)


def budget(points: Sequence[Point], text: str) -> str:
    """SVG of the perplexity ratio on `text` against the KV budget; the donor is at (100 %, 1).

    Each method has a line from the donor through its converted models. Points that are not finite are left out.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    axes = _axes("KV cache kept, % of the donor's", f"perplexity on {_short(text)}, times the donor's")
    finite = sorted((point for point in points if _positive(point.ratio)), key=lambda point: -point.kept)
    axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    colours = dict(zip(sorted({point.method for point in finite}), cycle(SERIES), strict=False))
    for method, colour in colours.items():
        line = [(100.0, 1.0)]
        line += [
            (100 * point.kept, point.ratio) for point in finite if point.method == method and point.joined
        ]
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.4, zorder=1)
    for point in finite:
        _draw_point(axes, point, colours[point.method])
    axes.plot([100], [1], marker="o", color=TEXT)
    axes.annotate(
        "donor", (100, 1), (0, -13), textcoords="offset points", ha="center", color=QUIET, fontsize=9.5
    )
    ratios = [1.0, *(point.ratio for point in finite)]
    if max(ratios) > 2 * min(ratios):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.06, y=0.16)
    return _svg(axes, "Perplexity against the KV cache kept")


def _draw_point(axes: Any, point: Point, colour: str) -> None:
    """Draw the point and its label, to the left of it for a point near the right edge."""
    at = (100 * point.kept, point.ratio)
    axes.plot(*at, marker="o", color=colour, markerfacecolor=colour if point.joined else GROUND)
    right = point.kept > 0.6
    axes.annotate(
        f"{_short(point.name)}  × {point.ratio:.3g}",
        at,
        (-7 if right else 7, 7),
        textcoords="offset points",
        ha="right" if right else "left",
        color=TEXT,
        fontsize=9.5,
        parse_math=False,
        bbox={"facecolor": GROUND, "edgecolor": "none", "alpha": 0.85, "pad": 1},
    )


def _axes(x: str, y: str) -> Any:
    """Axes in the page's style; `y` is the title at the top left."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5.8, 3.5), layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(which="both", color=QUIET, labelcolor=TEXT, labelsize=9.5)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=TEXT, fontsize=10)
    axes.set_title(y, color=TEXT, fontsize=10, loc="left", parse_math=False)
    return axes


def _line_style(index: int) -> dict[str, Any]:
    """The style of the series with this index, as arguments of `plot`."""
    return {
        "color": list(SERIES)[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if index < len(SERIES) else "--",
        "linewidth": 1.4,
        "markersize": 3.5,
    }


def _svg(axes: Any, label: str) -> str:
    """The figure as an SVG element for HTML: reproducible, without metadata and without unused ids."""
    import matplotlib

    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        axes.figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in (INK | SERIES).items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
