"""The lines of the report's plots, computed once for the page (plotly) and for the PNGs (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DECADE = 10.0  # values that span more than this are drawn on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        label: name in the legend.
        x: positions, increasing.
        y: values; NaN where there is none.
        color: index into the palette.
        dash: index into the dash patterns and marker shapes.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int
    dash: int = 0


def base_distance(trials: Sequence[Mapping[str, Any]]) -> float | None:
    """The base's distance on the selection seeds: the trial at omega = 0; none if the sweep had no such trial."""
    return next((_value(t["distance"]) for t in trials if t["omega"] == 0), None)


def omega_series(trials: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Distance against omega: one line per (n_s, B), the base's point at omega = 0 on each.

    Budgets differ by colour, set sizes by dash and marker. A sweep of the base alone has no lines.
    """
    base = base_distance(trials)
    points: dict[tuple[int, float], dict[float, float]] = {}
    for trial in trials:
        if trial["omega"] != 0 and trial.get("space", "score") == "score":
            start = {} if base is None else {0.0: base}
            line = points.setdefault((trial["n_s"], trial["budget_kimg"]), start)
            line[float(trial["omega"])] = _value(trial["distance"])
    sizes = sorted({n_s for n_s, _ in points})
    budgets = sorted({budget for _, budget in points})
    return [
        Line(
            label=f"B = {budget:g} kimg, n\N{LATIN SUBSCRIPT SMALL LETTER S} = {n_s:,}",
            x=tuple(sorted(line)),
            y=tuple(line[omega] for omega in sorted(line)),
            color=budgets.index(budget),
            dash=sizes.index(n_s),
        )
        for (n_s, budget), line in sorted(points.items())
    ]


def loss_series(losses: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Line]:
    """Training loss against images seen in kimg: one line per training run that logged anything."""
    runs = [(name, records) for name, records in losses.items() if records]
    return [
        Line(
            label=name,
            x=tuple(r["nimg"] / 1000 for r in records),
            y=tuple(_value(r["loss"]) for r in records),
            color=i,
        )
        for i, (name, records) in enumerate(runs)
    ]


def needs_log(lines: Sequence[Line]) -> bool:
    """Whether the values are positive and span more than a decade."""
    values = [y for line in lines for y in line.y if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > DECADE * min(values)


def log_ticks(lines: Sequence[Line]) -> list[float]:
    """The 1-2-5 ticks of a logarithmic axis that holds the lines, one beyond either end."""
    values = [y for line in lines for y in line.y if math.isfinite(y)]
    decades = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    below = [tick for tick in ticks if tick <= min(values)][-1:]
    above = [tick for tick in ticks if tick >= max(values)][:1]
    return below + [tick for tick in ticks if min(values) < tick < max(values)] + above


def _value(number: float | None) -> float:
    return float("nan") if number is None else float(number)
