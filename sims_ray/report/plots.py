"""The report's plots as plotly figures in plain JSON, which the page draws.

plotly is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from sims_ray.report.chart import CHOSEN, GREY, PLACELESS, Chart, HeatMap, Line, Plot, log_ticks, needs_log, tick_label
from sims_ray.report.numbers import number

# Colours that keep a contrast of 3:1 on white and on near-black; the page's script repaints text and grid.
PALETTE = ("#2f7fe0", "#d9660f", "#12946b", "#c2509a", "#8466e0", "#998200")
COLORS = {GREY: "#7c838d", CHOSEN: "#e0383e"}
GRID = "rgba(124,131,141,0.25)"
DASHES = (("solid", "circle"), ("dash", "square"), ("dot", "diamond"), ("dashdot", "triangle-up"), ("10px,3px", "x"))
SCALE = "Viridis"
PALE = 0.6
HEIGHT_PX = 380
ROW_PX = 34  # of a heat map
MARGIN = {"l": 56, "r": 12, "t": 16, "b": 48}


def plotly_figure(plot: Plot) -> dict[str, Any]:
    """The plot as plotly's `data` and `layout`, in JSON values: NaN is null. `layout.meta.legend` counts its names."""
    import plotly.graph_objects as go

    if isinstance(plot, HeatMap):
        figure = go.Figure(_heat_traces(plot))
        _style(figure, plot, HEIGHT_PX - 140 + ROW_PX * len(plot.y), 0)
        figure.update_xaxes(type="category", showgrid=False)
        figure.update_yaxes(type="category", showgrid=False)
    else:
        figure = go.Figure([_trace(line) for line in plot.lines])
        _style(figure, plot, HEIGHT_PX, sum(line.legend for line in plot.lines))
        _scale(figure, plot)
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def color_of(line: Line) -> str:
    """The colour of a line."""
    return COLORS.get(line.color) or PALETTE[line.color % len(PALETTE)]


def _trace(line: Line) -> Any:
    import plotly.graph_objects as go

    dash, symbol = DASHES[line.dash % len(DASHES)]
    styles: dict[str, dict[str, Any]] = {
        "line": {"mode": "lines+markers", "line": {"width": 2, "dash": dash}, "marker": {"symbol": symbol, "size": 7}},
        "trace": {"mode": "lines", "line": {"width": 2, "dash": dash}},
        "faint": {"mode": "lines+markers", "line": {"width": 1.2}, "marker": {"size": 4}, "opacity": PALE},
        "rule": {"mode": "lines", "line": {"width": 1.5, "dash": "dash"}},
        "steps": {"mode": "lines", "line": {"width": 1.5, "dash": "dot", "shape": "hv"}},
        "points": {"mode": "markers", "marker": {"symbol": symbol, "size": 9}},
        "open": {"mode": "markers", "marker": {"symbol": "circle-open", "size": 8}, "opacity": PALE},
        "ring": {"mode": "markers", "marker": {"symbol": "circle-open", "size": 18, "line": {"width": 3}}},
    }
    style = styles[line.look]
    color = color_of(line)
    for part in ("line", "marker"):
        style[part] = {**style.get(part, {}), "color": color}
    if line.texts:
        style |= {
            "mode": style["mode"] + "+text",
            "text": _escaped(line.texts),
            "textposition": ("top center", "bottom center")[line.dash % 2],
        }
    if line.errors:
        bars = [None if math.isnan(error) else error for error in line.errors]
        style["error_y"] = {"type": "data", "array": bars, "color": color, "thickness": 1.2, "width": 3}
    if line.look in PLACELESS:
        style["hoverinfo"] = "skip"
    return go.Scatter(
        x=list(line.x),
        y=list(line.y),
        name=html.escape(line.label),
        showlegend=line.legend,
        hovertext=_escaped(line.notes) or None,
        hovertemplate=None if line.look in PLACELESS else _hover(line),
        **style,
    )


def _hover(line: Line) -> str:
    interval = " \N{PLUS-MINUS SIGN} %{error_y.array:.2~g}" if any(map(math.isfinite, line.errors)) else ""
    note = "<br>%{hovertext}" if line.notes else ""
    return f"%{{x:.4~g}}: %{{y:.4~g}}{interval}{note}<extra>%{{fullData.name}}</extra>"


def _heat_traces(plot: HeatMap) -> list[Any]:
    import plotly.graph_objects as go

    x, y = _escaped(plot.x), _escaped(plot.y)
    logarithmic = needs_log(plot.values)
    bar: dict[str, Any] = {"title": {"text": html.escape(plot.z_title), "side": "right"}, "thickness": 14}
    if logarithmic:
        ticks = log_ticks(plot.values)
        bar |= {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [tick_label(tick) for tick in ticks]}
    traces = [
        go.Heatmap(
            x=x,
            y=y,
            z=[[math.log10(value) if logarithmic else value for value in row] for row in plot.z],
            text=[[number(value, 3) if math.isfinite(value) else "" for value in row] for row in plot.z],
            texttemplate="%{text}",
            colorscale=SCALE,
            colorbar=bar,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            hovertemplate="strength %{x}, B = %{y} kimg: %{text}<extra></extra>",
        )
    ]
    if plot.stopped:
        marker = {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": COLORS[GREY]}}
        words, where = _escaped([text for *_, text in plot.stopped]), "strength %{x}, B = %{y} kimg"
        at = {"x": [x[i] for i, _, _ in plot.stopped], "y": [y[j] for _, j, _ in plot.stopped]}
        hover = f"{where}: %{{hovertext}}<extra></extra>"
        traces.append(go.Scatter(**at, mode="markers", marker=marker, hovertext=words, hovertemplate=hover))
    if plot.chosen is not None:
        marker = {"symbol": "circle-open", "size": 34, "color": COLORS[CHOSEN], "line": {"width": 3}}
        i, j = plot.chosen
        traces.append(go.Scatter(x=[x[i]], y=[y[j]], mode="markers", marker=marker, hoverinfo="skip"))
    return traces


def _style(figure: Any, plot: Plot, height_px: int, names: int) -> None:
    """Transparent, grey, the legend below; the page's script adds the legend's height, which depends on the width."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    figure.update_layout(
        template="none",
        height=height_px,
        margin=MARGIN,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": COLORS[GREY], "family": "system-ui, sans-serif", "size": 13},
        showlegend=names > 0,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hoverlabel={"namelength": -1},
        meta={"legend": names},
        xaxis={**axis, "title": {"text": html.escape(plot.x_title)}},
        yaxis={**axis, "title": {"text": html.escape(plot.y_title)}},
    )


def _scale(figure: Any, chart: Chart) -> None:
    for update, values in ((figure.update_xaxes, chart.x_values), (figure.update_yaxes, chart.y_values)):
        if needs_log(values):
            ticks = log_ticks(values)
            update(type="log", tickvals=ticks, ticktext=[tick_label(tick) for tick in ticks])


def _escaped(texts: Sequence[str]) -> list[str]:
    return [html.escape(text) for text in texts]
