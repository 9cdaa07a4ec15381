"""The report's plots: plotly figures as plain JSON for the page, and the same plots as PNG by matplotlib.

Both libraries are imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sims_ray.report.series import Line, base_distance, log_ticks, loss_series, needs_log, omega_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OMEGA = "\N{GREEK SMALL LETTER OMEGA}"
OMEGA_TITLE = f"guidance strength {OMEGA}"
KIMG_TITLE = "training images seen (kimg)"
LOSS_TITLE = "training loss"

# Colours that keep a contrast of 3:1 on white and on near-black; the page's script repaints GREY.
PALETTE = ("#2f7fe0", "#d9660f", "#12946b", "#c2509a", "#8466e0", "#998200")
CHOSEN = "#e0383e"
GREY = "#7c838d"
GRID = "rgba(124,131,141,0.25)"
DASHES = (  # of plotly, then of matplotlib
    ("solid", "circle", "-", "o"),
    ("dash", "square", "--", "s"),
    ("dot", "diamond", ":", "D"),
    ("dashdot", "triangle-up", "-.", "^"),
    ("10px,3px", "x", (0, (8, 2)), "X"),
)
HEIGHT_PX = 380
LEGEND_ROW_PX = 20
PNG_INCHES = (7.0, 4.0)
PNG_LEGEND_COLUMNS = 3
PNG_LEGEND_ROW_INCHES = 0.22
PNG_DPI = 150


def omega_figure(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Distance against omega as a plotly figure: a line per (n_s, B), the base dashed, the chosen point ringed."""
    import plotly.graph_objects as go

    lines = omega_series(summary["trials"])
    figure = go.Figure([_trace(line, "lines+markers") for line in lines])
    base, chosen = base_distance(summary["trials"]), summary["selected"]
    if base is not None:
        span = _omega_span(summary["trials"])
        dashed = {"color": GREY, "dash": "dash", "width": 1.5}
        figure.add_scatter(x=span, y=[base, base], mode="lines", name=_base_label(base), line=dashed, hoverinfo="skip")
    ring = {"symbol": "circle-open", "size": 18, "color": CHOSEN, "line": {"width": 3}}
    x, y = [chosen["omega"]], [chosen["distance"]]
    figure.add_scatter(x=x, y=y, mode="markers", name=_chosen_label(chosen), marker=ring, hoverinfo="skip")
    _style(figure, OMEGA_TITLE, _distance_title(chosen["metric"]), lines, extra_rows=2)
    return _plain(figure)


def loss_figure(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Training loss against images seen as a plotly figure; none if no run logged a loss."""
    import plotly.graph_objects as go

    lines = loss_series(summary["losses"])
    if not lines:
        return None
    figure = go.Figure([_trace(line, "lines") for line in lines])
    _style(figure, KIMG_TITLE, LOSS_TITLE, lines)
    return _plain(figure)


def omega_png(summary: Mapping[str, Any]) -> bytes:
    """The plot of `omega_figure` as PNG on white."""
    figure, axes = _axes()
    lines = omega_series(summary["trials"])
    _draw(axes, lines, markers=True)
    base, chosen = base_distance(summary["trials"]), summary["selected"]
    if base is not None:
        axes.axhline(base, color=GREY, linestyle="--", linewidth=1.2, label=_base_label(base))
    ring: dict[str, Any] = {
        "markersize": 13,
        "markerfacecolor": "none",
        "markeredgecolor": CHOSEN,
        "markeredgewidth": 2.2,
    }
    axes.plot([chosen["omega"]], [chosen["distance"]], "o", label=_chosen_label(chosen), **ring)
    return _png(figure, axes, lines, OMEGA_TITLE, _distance_title(chosen["metric"]))


def loss_png(summary: Mapping[str, Any]) -> bytes | None:
    """The plot of `loss_figure` as PNG on white; none if no run logged a loss."""
    lines = loss_series(summary["losses"])
    if not lines:
        return None
    figure, axes = _axes()
    _draw(axes, lines, markers=False)
    return _png(figure, axes, lines, KIMG_TITLE, LOSS_TITLE)


def _distance_title(metric: str) -> str:
    return f"{metric} (lower is better)"


def _base_label(base: float) -> str:
    return f"base ({base:.3g})"


def _chosen_label(chosen: Mapping[str, Any]) -> str:
    return f"chosen ({OMEGA} = {chosen['omega']:g})"


def _omega_span(trials: Sequence[Mapping[str, Any]]) -> list[float]:
    omegas = [float(trial["omega"]) for trial in trials]
    return [min(omegas), max(omegas)]


def _trace(line: Line, mode: str) -> Any:
    import plotly.graph_objects as go

    dash, symbol, _, _ = DASHES[line.dash % len(DASHES)]
    color = PALETTE[line.color % len(PALETTE)]
    return go.Scatter(
        x=list(line.x),
        y=list(line.y),
        mode=mode,
        name=html.escape(line.label),
        line={"color": color, "width": 2, "dash": dash},
        marker={"symbol": symbol, "size": 7},
        hovertemplate="%{x:.4~g}: %{y:.4~g}<extra>%{fullData.name}</extra>",
    )


def _style(figure: Any, x_title: str, y_title: str, lines: Sequence[Line], extra_rows: int = 0) -> None:
    """Transparent, mid-grey, legend below; the height grows with the legend so that phones keep the plot."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    figure.update_layout(
        template="none",
        height=HEIGHT_PX + LEGEND_ROW_PX * (len(lines) + extra_rows),
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hoverlabel={"namelength": -1},
        xaxis={**axis, "title": {"text": x_title}},
        yaxis={**axis, "title": {"text": html.escape(y_title)}},
    )
    if needs_log(lines):
        ticks = log_ticks(lines)
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _plain(figure: Any) -> dict[str, Any]:
    """The figure as JSON values only: NaN becomes null."""
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=PNG_INCHES, layout="constrained")
    return figure, figure.add_subplot()


def _draw(axes: Axes, lines: Sequence[Line], markers: bool) -> None:
    for line in lines:
        _, _, dash, marker = DASHES[line.dash % len(DASHES)]
        color = PALETTE[line.color % len(PALETTE)]
        shape = marker if markers else ""
        axes.plot(line.x, line.y, color=color, linestyle=dash, marker=shape, markersize=4.5, label=_literal(line.label))


def _literal(text: str) -> str:
    """Text that matplotlib's mathtext leaves as it is."""
    return text.replace("$", r"\$")


def _png(figure: Figure, axes: Axes, lines: Sequence[Line], x_title: str, y_title: str) -> bytes:
    axes.set_xlabel(x_title)
    axes.set_ylabel(_literal(y_title))
    if needs_log(lines):
        ticks = log_ticks(lines)
        axes.set_yscale("log")
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend_rows = math.ceil(len(axes.get_lines()) / PNG_LEGEND_COLUMNS)
    figure.set_figheight(PNG_INCHES[1] + PNG_LEGEND_ROW_INCHES * legend_rows)
    figure.legend(loc="outside lower center", ncols=PNG_LEGEND_COLUMNS, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI)
    return buffer.getvalue()
