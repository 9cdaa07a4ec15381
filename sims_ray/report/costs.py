"""Cost against distance: the points of trials and models, and their Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sims_ray.report.chart import GREY, Line
from sims_ray.report.series import half_widths, stopped_points, trial_points
from sims_ray.report.trials import METHODS, Trial, comparable, is_base, space, value

KINDS = ("base", "auxiliary", *METHODS.values())
FRONT = "Pareto front"


def cost_series(trials: Sequence[Trial], cost: str) -> list[Line]:
    """Distance against a cost of the trials: points by kind of model, the stopped ones open, and the others' front."""
    whole = [trial for trial in trials if comparable(trial) and trial.get(cost) is not None]
    lines = []
    for rank, kind in enumerate(KINDS):
        of_kind = [trial for trial in whole if _kind(trial) == kind]
        if of_kind:
            lines.append(trial_points(kind, of_kind, cost, rank, "points", rank))
    front = front_line((float(trial[cost]), float(trial["distance"])) for trial in whole)
    return [*lines, *stopped_points(trials, cost), *front]


def table_cost_series(table: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Distance against network evaluations of an image: the models of the results table, and their front."""
    lines = [
        Line(
            row["model"],
            (float(row["evaluations_per_image"]),),
            (value(row["distance"]),),
            rank,
            rank,
            "points",
            errors=half_widths([row]),
        )
        for rank, row in enumerate(table)
    ]
    return [*lines, *front_line((line.x[0], line.y[0]) for line in lines)]


def front_line(points: Iterable[tuple[float, float]]) -> list[Line]:
    """The Pareto front of (cost, distance): the points that none is below at the same cost or less."""
    front: list[tuple[float, float]] = []
    for cost, distance in sorted(point for point in points if math.isfinite(point[1])):
        if not front or distance < front[-1][1]:
            front.append((cost, distance))
    if len(front) < 2:
        return []
    costs, distances = zip(*front, strict=True)
    return [Line(FRONT, costs, distances, GREY, look="steps")]


def _kind(trial: Trial) -> str:
    if is_base(trial):
        return "base"
    return "auxiliary" if trial["omega"] == -1 else METHODS[space(trial)]
