"""Runs side by side: their models, the settings that they differ in, and one line of the search for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sims_ray.errors import SimsError
from sims_ray.report.chart import Chart, Line, Panel
from sims_ray.report.numbers import count, flatten, number, percent, short, to_csv
from sims_ray.report.panels import STRENGTHS, lower_is_better
from sims_ray.report.rendering import plot_files, render, write_files
from sims_ray.report.series import half_widths
from sims_ray.report.tables import Table
from sims_ray.report.trials import N_S, OMEGA, along_omega, place, trial_name, value
from sims_ray.storage.models import SCORE

PAGE = "compare.html"
HEADER = (
    "Run",
    "Model",
    "Distance",
    "Change from base",
    OMEGA,
    "B (kimg)",
    N_S,
    "Evaluations per image",
    "Real images",
)
COLUMNS = ("distance", "standard_error", "gain", "omega", "budget_kimg", "n_s", "evaluations_per_image")
Summaries = Mapping[str, Mapping[str, Any]]


def compare_runs(folder: Path, summaries: Summaries) -> Path:
    """Write `compare.html`, its plot as PNG and its tables as CSV into `folder`; returns the page's path.

    Args:
        folder: made if it does not exist.
        summaries: run name -> summary, as in `write_report`.

    Raises:
        SimsError: there are fewer than two runs, or they measured unequal distances.
    """
    check_comparable(summaries)
    panel, results, settings = runs_panel(summaries), runs_table(summaries), settings_table(summaries)
    files = plot_files([panel] if panel else [])
    files["compare.csv"] = to_csv(("run", "model", *COLUMNS), _exact(summaries))
    files["compare_settings.csv"] = to_csv(settings.header, settings.rows)
    values = {"verdict": lowest(summaries), "panel": panel, "results": results, "settings": settings}
    files[PAGE] = render("compare.html.j2", [panel] if panel else [], values)
    write_files(folder, files)
    return folder / PAGE


def check_comparable(summaries: Summaries) -> None:
    """Raise SimsError unless there are two runs or more, and all measured one distance in the same features."""
    if len(summaries) < 2:
        raise SimsError(f"{len(summaries)} run is nothing to compare; name two or more")
    for (one, a), (other, b) in pairwise(summaries.items()):
        if a["metric"] != b["metric"]:
            raise SimsError(
                f"{one} reports {a['metric']} and {other} reports {b['metric']}, which cannot be compared; "
                f"measure both in the same features on the same number of images"
            )
        mine, theirs = (dict(flatten(run["settings"].get("features", {}))) for run in (a, b))
        for name in mine.keys() & theirs.keys():
            if mine[name] != theirs[name]:
                raise SimsError(
                    f"features.{name} is {mine[name]} in {one} and {theirs[name]} in {other}, so their distances "
                    f"cannot be compared; measure both in the same features"
                )


def lowest(summaries: Summaries) -> str:
    """Which model of which run has the lowest distance, in one sentence."""
    run, row = min(_rows(summaries), key=lambda pair: value(pair[1]["distance"]))
    metric = next(iter(summaries.values()))["metric"]
    return f"{row['model']} of {run} has the lowest {metric}: {number(row['distance'], 3)}."


def runs_table(summaries: Summaries) -> Table:
    """The models of every run, each distance with its standard error where one is known."""
    rows = tuple(
        (
            run,
            row["model"],
            _distance(row),
            short(None) if row["model"] == "base" else percent(-row["gain"]),
            short(row["omega"]),
            short(row["budget_kimg"]),
            count(row["n_s"]),
            short(row["evaluations_per_image"]),
            count(summaries[run]["num_real"]),
        )
        for run, row in _rows(summaries)
    )
    best = [value(row["distance"]) for _, row in _rows(summaries)]
    caption = (
        f"{next(iter(summaries.values()))['metric']} on seeds that no search saw, mean \N{PLUS-MINUS SIGN} standard "
        f"error; lower is better. Distances to different real images cannot be compared."
    )
    return Table("Results", caption, HEADER, rows, best.index(min(best)), 2)


def settings_table(summaries: Summaries) -> Table:
    """The settings that are not the same in all runs, field by field."""
    flat = {run: dict(flatten(summary["settings"])) for run, summary in summaries.items()}
    names = dict.fromkeys(name for settings in flat.values() for name in settings)
    rows = [(name, *(_word(settings, name) for settings in flat.values())) for name in names]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    return Table("Settings that differ", "One row per setting", ("Setting", *flat), differing, None, 1 + len(flat))


def runs_panel(summaries: Summaries) -> Panel | None:
    """Distance against strength of each run's chosen budget and set size; none if the searches are not comparable."""
    metrics = {summary["selected"]["metric"] for summary in summaries.values()}
    if len(metrics) > 1:
        return None
    lines = tuple(_run_line(run, summary, rank) for rank, (run, summary) in enumerate(summaries.items()))
    chart = Chart("compare_fd_vs_omega", "", STRENGTHS[SCORE], lower_is_better(metrics.pop()), lines)
    caption = (
        "Each run at its chosen budget and set size, on its selection seeds; the base is at 0. "
        "Bars, where there are any, are 95 % intervals."
    )
    return Panel("compare", "Distance against strength", "", caption, (chart,))


def _run_line(run: str, summary: Mapping[str, Any], rank: int) -> Line:
    found: Sequence[Mapping[str, Any]] = along_omega(summary["trials"]).get(place(summary["selected"]), [])
    trials = [trial for trial in found if not trial.get("stopped")]
    x, y = (tuple(value(trial[name]) for trial in trials) for name in ("omega", "distance"))
    return Line(run, x, y, rank, rank, errors=half_widths(trials), notes=tuple(map(trial_name, trials)))


def _rows(summaries: Summaries) -> list[tuple[str, Mapping[str, Any]]]:
    return [(run, row) for run, summary in summaries.items() for row in summary["table"]]


def _exact(summaries: Summaries) -> list[list[Any]]:
    return [[run, row["model"], *(row.get(name) for name in COLUMNS)] for run, row in _rows(summaries)]


def _distance(row: Mapping[str, Any]) -> str:
    error = row.get("standard_error")
    return number(row["distance"]) + ("" if error is None else f" \N{PLUS-MINUS SIGN} {number(error, 2)}")


def _word(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if settings.get(name) is not None else ("null" if name in settings else short(None))
