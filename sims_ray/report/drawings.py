"""The report's plots as PNG on white, by matplotlib.

matplotlib is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sims_ray.report.chart import CHOSEN, GREY, Chart, HeatMap, Line, Plot, log_ticks, needs_log, tick_label
from sims_ray.report.numbers import number
from sims_ray.report.plots import COLORS, PALE, color_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = (("-", "o"), ("--", "s"), (":", "D"), ("-.", "^"), ((0, (8, 2)), "X"))
MAP_COLORS = "viridis"
INCHES = (7.0, 4.0)
MAP_ROW_INCHES = 0.45
LEGEND_COLUMNS = 3
LEGEND_ROW_INCHES = 0.22
DPI = 150
DARK_BELOW = 0.45  # share of the colour scale that white text is readable on


def draw_png(plot: Plot) -> bytes:
    """The plot as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    if isinstance(plot, HeatMap):
        figure.set_figheight(1.6 + MAP_ROW_INCHES * len(plot.y))
        _draw_map(figure, axes, plot)
    else:
        _draw_chart(figure, axes, plot)
    axes.set_xlabel(_literal(plot.x_title))
    axes.set_ylabel(_literal(plot.y_title))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _draw_chart(figure: Figure, axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        _draw(axes, line)
    for axis, values in ((axes.xaxis, chart.x_values), (axes.yaxis, chart.y_values)):
        if needs_log(values):
            ticks = log_ticks(values)
            axes.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_ticks(ticks, [tick_label(tick) for tick in ticks])
            axis.set_ticks([], minor=True)
    axes.grid(alpha=0.3)
    rows = math.ceil(sum(line.legend for line in chart.lines) / LEGEND_COLUMNS)
    figure.set_figheight(INCHES[1] + LEGEND_ROW_INCHES * rows)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=8)


def _draw(axes: Axes, line: Line) -> None:
    dash, marker = DASHES[line.dash % len(DASHES)]
    styles: dict[str, dict[str, Any]] = {
        "line": {"linestyle": dash, "marker": marker, "markersize": 4.5},
        "trace": {"linestyle": dash},
        "faint": {"marker": "o", "markersize": 2.5, "linewidth": 0.8, "alpha": PALE},
        "rule": {"linestyle": "--", "linewidth": 1.2},
        "steps": {"linestyle": ":", "linewidth": 1.2, "drawstyle": "steps-post"},
        "points": {"linestyle": "", "marker": marker, "markersize": 6},
        "open": {"linestyle": "", "marker": "o", "markersize": 5, "markerfacecolor": "none", "alpha": PALE},
        "ring": {"linestyle": "", "marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2.2},
    }
    style = styles[line.look]
    label = _literal(line.label) if line.legend else "_nolegend_"
    errors = [0.0 if math.isnan(error) else error for error in line.errors] or None
    axes.errorbar(line.x, line.y, errors, color=color_of(line), label=label, capsize=2, elinewidth=0.9, **style)
    for x, y, text in zip(line.x, line.y, line.texts, strict=False):
        axes.annotate(_literal(text), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)


def _draw_map(figure: Figure, axes: Axes, plot: HeatMap) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = np.ma.masked_invalid(np.array(plot.z, dtype=np.float64))
    norm = LogNorm() if needs_log(plot.values) else Normalize()
    image = axes.imshow(values, cmap=MAP_COLORS, norm=norm, origin="lower", aspect="auto")
    figure.colorbar(image, ax=axes, label=_literal(plot.z_title))
    axes.set_xticks(range(len(plot.x)), [_literal(name) for name in plot.x])
    axes.set_yticks(range(len(plot.y)), [_literal(name) for name in plot.y])
    for (j, i), value in np.ndenumerate(values.filled(np.nan)):
        if math.isfinite(value):
            color = "white" if float(norm(value)) < DARK_BELOW else "black"
            axes.text(i, j, number(float(value), 3), ha="center", va="center", fontsize=8, color=color)
    for i, j, _ in plot.stopped:
        axes.plot(i, j, "x", color=COLORS[GREY])
    if plot.chosen is not None:
        ring = {"markersize": 24, "markerfacecolor": "none", "markeredgecolor": COLORS[CHOSEN], "markeredgewidth": 2.2}
        axes.plot(*plot.chosen, "o", **ring)  # type: ignore[arg-type]


def _literal(text: str) -> str:
    """Text that matplotlib's mathtext leaves as it is."""
    return text.replace("$", r"\$")
