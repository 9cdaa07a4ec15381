"""What a plot shows, told once: the page draws it with plotly, the PNG is drawn by matplotlib, the CSV lists it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sims_ray.report.numbers import to_csv

DECADE = 10.0  # values that span more than this are drawn on a logarithmic axis
MOST_TICKS = 9  # a logarithmic axis with more than these has a tick per decade
GREY, CHOSEN = -1, -2  # colours beside the palette

# line: a line with markers; trace: a line alone, faint: thin and pale, for many; rule: a dashed level; steps: a front;
# points: markers alone; open: pale hollow markers, of what cannot be compared; ring: a ring around a point.
Look = Literal["line", "trace", "faint", "rule", "steps", "points", "open", "ring"]
PLACELESS: tuple[Look, ...] = ("rule", "steps", "ring")  # hovering over these would repeat what lies below


@dataclass(frozen=True)
class Line:
    """One line, or one set of points, of a plot.

    Attributes:
        label: name in the legend.
        x: positions.
        y: values; NaN where there is none.
        color: index into the palette, or GREY or CHOSEN.
        dash: index into the dash patterns and marker shapes.
        look: how it is drawn.
        errors: half the width of each value's interval; NaN where it is unknown, empty if all are.
        notes: what is said about each point when it is pointed at, beside its numbers.
        texts: what is written beside each point.
        legend: whether the legend names it; of several lines with one label, one is enough.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int
    dash: int = 0
    look: Look = "line"
    errors: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    legend: bool = True


@dataclass(frozen=True)
class Chart:
    """Lines over two axes.

    Attributes:
        name: stem of its files.
        option: what distinguishes it from the other plots of its panel.
        x_title, y_title: of the axes.
        lines: in the order in which they are drawn.
    """

    name: str
    option: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]

    @property
    def x_values(self) -> list[float]:
        """All positions."""
        return [x for line in self.lines for x in line.x]

    @property
    def y_values(self) -> list[float]:
        """All values."""
        return [y for line in self.lines for y in line.y]

    def csv(self) -> bytes:
        """A row per point, in the order of the lines."""
        header = ("line", self.x_title, self.y_title, "interval_half_width", "note")
        return to_csv(header, (row for line in self.lines for row in _rows(line)))


@dataclass(frozen=True)
class HeatMap:
    """Values over two lists of categories.

    Attributes:
        name: stem of its files.
        option: what distinguishes it from the other plots of its panel.
        x_title, y_title, z_title: of the axes and of the values.
        x, y: the categories.
        z: a row of values per y; NaN where there is none.
        stopped: (index in x, index in y, words) of cells that have no comparable value.
        chosen: (index in x, index in y) of the chosen cell, if it is in this map.
    """

    name: str
    option: str
    x_title: str
    y_title: str
    z_title: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    z: tuple[tuple[float, ...], ...]
    stopped: tuple[tuple[int, int, str], ...] = field(default=())
    chosen: tuple[int, int] | None = None

    @property
    def values(self) -> list[float]:
        """All values that there are."""
        return [value for row in self.z for value in row if math.isfinite(value)]

    def csv(self) -> bytes:
        """A row per cell that was tried."""
        words = {(i, j): text for i, j, text in self.stopped}
        cells = [(i, j) for j in range(len(self.y)) for i in range(len(self.x))]
        kept = [(i, j) for i, j in cells if math.isfinite(self.z[j][i]) or (i, j) in words]
        header = (self.y_title, self.x_title, self.z_title, "note")
        rows = ((self.y[j], self.x[i], _cell(self.z[j][i]), words.get((i, j))) for i, j in kept)
        return to_csv(header, rows)


Plot = Chart | HeatMap


@dataclass(frozen=True)
class Panel:
    """Plots that answer one question, shown one at a time.

    Attributes:
        id: in the page.
        tab: its name.
        question: what distinguishes its plots, like "set size"; unused where it has one.
        caption: what the plots show and what a number in them means.
        plots: one or more.
    """

    id: str
    tab: str
    question: str
    caption: str
    plots: tuple[Plot, ...]


def needs_log(values: Iterable[float]) -> bool:
    """Whether the finite values are positive and span more than a decade."""
    found = [value for value in values if math.isfinite(value)]
    return bool(found) and min(found) > 0 and max(found) > DECADE * min(found)


def log_ticks(values: Iterable[float]) -> list[float]:
    """The 1-2-5 ticks of a logarithmic axis that holds the values, one beyond either end; decades if these are many."""
    found = [value for value in values if math.isfinite(value)]
    decades = range(math.floor(math.log10(min(found))) - 1, math.ceil(math.log10(max(found))) + 2)
    ticks = _enclosing([float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)], found)
    return ticks if len(ticks) <= MOST_TICKS else _enclosing([float(f"1e{decade}") for decade in decades], found)


def tick_label(tick: float) -> str:
    """The words of a tick."""
    return f"{tick:,.0f}" if tick >= 1 else f"{tick:g}"


def _enclosing(ticks: Sequence[float], values: Sequence[float]) -> list[float]:
    below = [tick for tick in ticks if tick <= min(values)][-1:]
    above = [tick for tick in ticks if tick >= max(values)][:1]
    inside = [tick for tick in ticks if min(values) < tick < max(values)]
    return [*below, *inside, *(tick for tick in above if tick not in below)]


def _rows(line: Line) -> Iterable[tuple[str, float, float | None, float | None, str | None]]:
    for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        error = _cell(line.errors[i]) if line.errors else None
        note = line.notes[i] if line.notes else (line.texts[i] if line.texts else None)
        yield line.label, x, _cell(y), error, note


def _cell(value: float) -> float | None:
    return value if math.isfinite(value) else None
