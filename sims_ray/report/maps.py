"""Heat maps of the distance over budget and strength, one per set size and space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sims_ray.report.chart import HeatMap
from sims_ray.report.numbers import count, short
from sims_ray.report.trials import (
    METHODS,
    N_S,
    SYMBOLS,
    Trial,
    along_omega,
    comparable,
    images_name,
    is_base,
    space,
)

BUDGET_TITLE = "budget B (kimg)"


def heat_maps(trials: Sequence[Trial], best: Mapping[str, Trial], metric: str) -> list[HeatMap]:
    """A map per (space, n_s) that anything was guided in: budgets upwards, strengths to the right.

    A cell that was tried with several intervals or steps shows the lowest distance; at strength 0 is the base.
    """
    groups: dict[tuple[str, int], list[Trial]] = {}
    for where, line in along_omega(trials).items():
        groups.setdefault((where[0], where[1]), []).extend({**trial, "budget_kimg": where[2]} for trial in line)
    spaces = {kind for kind, _ in groups}
    several = len(spaces) > 1
    maps = [_heat_map(kind, n_s, cells, best.get(kind), metric, several) for (kind, n_s), cells in groups.items()]
    return sorted(maps, key=lambda one: one.chosen is None)  # what was chosen is shown first


def _heat_map(kind: str, n_s: int, cells: Sequence[Trial], chosen: Trial | None, metric: str, several: bool) -> HeatMap:
    omegas = sorted({float(cell["omega"]) for cell in cells})
    budgets = sorted({cell["budget_kimg"] for cell in cells})
    lowest, stopped = _cells(cells)
    ring = None
    if chosen is not None and space(chosen) == kind and chosen.get("n_s") == n_s:
        ring = (omegas.index(float(chosen["omega"])), budgets.index(chosen.get("budget_kimg")))
    method = f"{METHODS[kind]}, " if several else ""
    return HeatMap(
        name=f"heat_map_{METHODS[kind].lower()}_{n_s}",
        option=f"{method}{N_S} = {count(n_s)}",
        x_title=f"strength {SYMBOLS[kind]}",
        y_title=BUDGET_TITLE,
        z_title=metric,
        x=tuple(short(omega) for omega in omegas),
        y=tuple(short(budget) for budget in budgets),
        z=tuple(tuple(lowest.get((omega, budget), math.nan) for omega in omegas) for budget in budgets),
        stopped=tuple((omegas.index(o), budgets.index(b), words) for (o, b), words in stopped.items()),
        chosen=ring,
    )


def _cells(cells: Sequence[Trial]) -> tuple[dict[tuple[float, float], float], dict[tuple[float, float], str]]:
    """The lowest comparable distance of each (strength, budget), and what is said of those that have none."""
    lowest: dict[tuple[float, float], float] = {}
    stopped: dict[tuple[float, float], str] = {}
    for cell in cells:
        where = float(cell["omega"]), cell["budget_kimg"]
        if comparable(cell):
            lowest[where] = min(lowest.get(where, math.inf), float(cell["distance"]))
        elif not is_base(cell):
            stopped[where] = images_name(cell)
    return lowest, {where: words for where, words in stopped.items() if where not in lowest}
