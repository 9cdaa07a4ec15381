"""The plots that the report shows of a summary: which there are, what they are called and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sims_ray.report.chart import GREY, Chart, Line, Panel
from sims_ray.report.costs import cost_series, table_cost_series
from sims_ray.report.maps import heat_maps
from sims_ray.report.numbers import count, finite, number
from sims_ray.report.series import (
    base_distance,
    chosen_points,
    curve_series,
    loss_series,
    omega_series,
    precision_series,
    stopped_points,
)
from sims_ray.report.trials import METHODS, OMEGA, Trial, space, steps
from sims_ray.storage.models import SCORE, WEIGHT

STRENGTHS: dict[str, str] = {SCORE: f"guidance strength {OMEGA}", WEIGHT: "strength w of Neon"}
BOTH = f"strength: {OMEGA} of SIMS, w of Neon"
NFE = "network evaluations of one image"
WORKER_S = "seconds that workers spent on the trial"
KIMG = "training images seen (kimg)"
INTERVALS = "Bars are 95 % intervals (1.96 standard errors). "
OPEN = (
    "A pale open point was stopped early: its distance is of fewer images, so it cannot be compared with the others. "
)


def best_trials(summary: Mapping[str, Any]) -> dict[str, Trial]:
    """The best trial of each space; the selected one where the summary names no other."""
    return dict(summary.get("best") or {SCORE: summary["selected"]})


def panels(summary: Mapping[str, Any]) -> list[Panel]:
    """Every panel that the summary has values for, the distance against strength first."""
    found = (
        omega_panel(summary),
        map_panel(summary),
        cost_panel(summary),
        precision_panel(summary),
        curve_panel(summary),
    )
    return [panel for panel in found if panel is not None]


def omega_panel(summary: Mapping[str, Any]) -> Panel:
    """Distance against strength: a line per (n_s, B), the base dashed, the chosen point of each space ringed."""
    trials, best, selected = summary["trials"], best_trials(summary), summary["selected"]
    kinds = [
        kind for kind in METHODS if any(space(trial) == kind and trial["omega"] not in (0, -1) for trial in trials)
    ]
    charts = [_omega_chart(summary, trials, best, "fd_vs_omega", "all", BOTH if WEIGHT in kinds else STRENGTHS[SCORE])]
    if len(kinds) > 1:
        for kind in kinds:
            some = [trial for trial in trials if trial["omega"] in (0, -1) or space(trial) == kind]
            ring = {k: trial for k, trial in best.items() if k == kind}
            method = METHODS[kind]
            charts.append(_omega_chart(summary, some, ring, f"fd_vs_omega_{method.lower()}", method, STRENGTHS[kind]))
    caption = (
        f"Each point is {count(selected['nimg'])} images from the selection seeds, the same for every point. At 0 "
        f"every line is the base; at \N{MINUS SIGN}1 it is the auxiliary alone. "
        f"{_said(INTERVALS, _errors(charts))}{_said(OPEN, any(trial.get('stopped') for trial in trials))}"
        f"The ringed point is the lowest above 0 ({number(selected['distance'])}); it was measured again on fresh "
        f"seeds for the results."
    )
    return Panel("fd", "Strength", "Method", caption, tuple(charts))


def map_panel(summary: Mapping[str, Any]) -> Panel | None:
    """Heat maps of budget and strength; none if nothing was guided."""
    maps = heat_maps(summary["trials"], best_trials(summary), summary["selected"]["metric"])
    if not maps:
        return None
    caption = (
        "The distance of each combination on the selection seeds, lower is better; the ring is the chosen one. At "
        "strength 0 is the base, whatever the budget. An empty cell was not tried"
        + _said(", a cross was stopped early", any(one.stopped for one in maps))
        + ". Where a combination was tried with several intervals or numbers of steps, the lowest is shown."
    )
    return Panel("map", "Budget \N{MULTIPLICATION SIGN} strength", "Synthetic set", caption, tuple(maps))


def cost_panel(summary: Mapping[str, Any]) -> Panel | None:
    """Distance against what it costs, with the Pareto fronts; none if no cost is known."""
    trials, metric = summary["trials"], lower_is_better(summary["selected"]["metric"])
    views = (
        (
            "cost_models",
            "models of the results",
            NFE,
            lower_is_better(summary["metric"]),
            table_cost_series(summary["table"]),
        ),
        ("cost_trials", "trials, network evaluations", NFE, metric, cost_series(trials, "nfe")),
        ("cost_trials_seconds", "trials, worker seconds", WORKER_S, metric, cost_series(trials, "worker_s")),
    )
    charts = tuple(Chart(name, option, x, y, tuple(lines)) for name, option, x, y, lines in views if lines)
    if not charts:
        return None
    caption = (
        "Down is better, left is cheaper: nothing shown is both better and cheaper than a point on the dotted front. "
        "SIMS evaluates two networks per step, Neon one. Models of the results were measured on fresh seeds, trials "
        "on the selection seeds; the two have views of their own because their distances differ in images and seeds."
    )
    return Panel("cost", "Cost", "View", caption, charts)


def precision_panel(summary: Mapping[str, Any]) -> Panel | None:
    """Precision against recall along the strength; none if the trials have no such measures."""
    lines = precision_series(summary["trials"], best_trials(summary))
    if not lines:
        return None
    chart = Chart("precision_recall", "", "recall", "precision", tuple(lines))
    caption = (
        "Precision is the share of generated images that lie near real ones in features, recall the share of real "
        "images that lie near generated ones; 1 is best for both. The line follows the strength at the chosen budget "
        "and set size, each point named by its strength: guidance that buys precision with recall moves up and left."
    )
    return Panel("precision", "Precision and recall", "", caption, (chart,))


def curve_panel(summary: Mapping[str, Any]) -> Panel | None:
    """Distance against images of each trial; none if none was measured on the way."""
    lines = curve_series(summary["trials"], best_trials(summary))
    if not lines:
        return None
    chart = Chart("fd_vs_images", "", "images of the trial", _distance(summary["selected"]["metric"]), tuple(lines))
    caption = (
        "Each line is a trial, its distance taken at more and more images of the same seeds. Compare lines at the same "
        "number of images only: the distance of few images is biased upwards. "
        + _said(
            "A line that ends early at an open point was stopped there.",
            any(t.get("stopped") for t in summary["trials"]),
        )
    )
    return Panel("curves", "Images", "", caption, (chart,))


def loss_panel(summary: Mapping[str, Any]) -> Panel | None:
    """Training loss against images seen; none if no run logged a loss."""
    lines = loss_series(summary["losses"])
    if not lines:
        return None
    caption = (
        "The base learns from real images, the auxiliaries start at its weights and learn from its samples. Their "
        "losses are on different images, so compare a line with itself."
    )
    return Panel(
        "loss", "Training loss", "", caption, (Chart("training_loss", "", KIMG, "training loss", tuple(lines)),)
    )


def _omega_chart(
    summary: Mapping[str, Any], trials: Sequence[Trial], best: Mapping[str, Trial], name: str, option: str, x_title: str
) -> Chart:
    selected = summary["selected"]
    lines = [*omega_series(trials), *stopped_points(trials)]
    base = base_distance(trials, steps(selected))
    if base is not None:
        lines.append(_base_rule(base, trials))
    lines += chosen_points(best)
    return Chart(name, option, x_title, lower_is_better(selected["metric"]), tuple(lines))


def _base_rule(base: float, trials: Sequence[Trial]) -> Line:
    omegas = [float(trial["omega"]) for trial in trials]
    ends = min(omegas), max(omegas)
    return Line(f"base ({number(base, 3)})", ends, (base, base), GREY, look="rule")


def lower_is_better(metric: str) -> str:
    """Title of an axis of distances."""
    return f"{metric} (lower is better)"


def _distance(metric: str) -> str:
    """The metric without its number of images, for an axis over which that number changes."""
    return lower_is_better(metric.rpartition("@")[0] or metric)


def _errors(charts: Sequence[Chart]) -> bool:
    return any(finite(error) for chart in charts for line in chart.lines for error in line.errors)


def _said(words: str, wanted: bool) -> str:
    return words if wanted else ""
