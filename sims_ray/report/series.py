"""The lines of the report's plots, computed from the values of a summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sims_ray.report.chart import CHOSEN, GREY, Line, Look
from sims_ray.report.numbers import finite, short
from sims_ray.report.trials import (
    METHODS,
    SYMBOLS,
    Trial,
    along_omega,
    base_of,
    comparable,
    images_name,
    is_base,
    model_of,
    place,
    place_name,
    space,
    trial_name,
    value,
)

NORMAL_95 = 1.959964  # half of a 95 % interval in standard errors
STOPPED = "stopped early, of fewer images"


def base_distance(trials: Sequence[Trial], num_steps: int | None = None) -> float | None:
    """The base's distance on the selection seeds, sampled in so many steps; none if the sweep had no such trial."""
    base = base_of(trials, num_steps)
    return None if base is None else value(base["distance"])


def omega_series(trials: Sequence[Trial]) -> list[Line]:
    """Distance against strength: one line per place, the base's point at 0 on each.

    Budgets differ by colour, set sizes by dash and marker; Neon goes on where the colours and dashes of SIMS end.
    Trials that were stopped early are on no line: their distances are of fewer images.
    """
    lines = along_omega(trials)
    budgets = ranks((where[0], where[2]) for where in lines)
    dashes = ranks((where[0], where[1], *where[3:]) for where in lines)
    found = []
    for where, line in lines.items():
        whole = [trial for trial in line if not trial.get("stopped")]
        if any(not is_base(trial) for trial in whole):
            color, dash = budgets[where[0], where[2]], dashes[where[0], where[1], *where[3:]]
            found.append(_strengths(place_name(where, lines), whole, color, dash))
    return found


def stopped_points(trials: Sequence[Trial], x: str = "omega") -> list[Line]:
    """The trials that were ended early, as points that no line joins."""
    stopped = [trial for trial in trials if trial.get("stopped") and trial.get(x) is not None]
    return [trial_points(STOPPED, stopped, x, GREY, "open")] if stopped else []


def chosen_points(best: Mapping[str, Trial]) -> list[Line]:
    """A ring around the chosen trial of each space."""
    return [
        Line(
            _ring_label(kind, trial, best),
            (float(trial["omega"]),),
            (value(trial["distance"]),),
            CHOSEN,
            look="ring",
        )
        for kind, trial in best.items()
    ]


def loss_series(losses: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Line]:
    """Training loss against images seen in kimg: one line per training run that logged anything."""
    runs = [(name, records) for name, records in losses.items() if records]
    return [
        Line(name, tuple(r["nimg"] / 1000 for r in rows), tuple(value(r["loss"]) for r in rows), i, look="trace")
        for i, (name, rows) in enumerate(runs)
    ]


def curve_series(trials: Sequence[Trial], best: Mapping[str, Trial]) -> list[Line]:
    """Distance against images: one line per trial with more than one distance, an open point where it was stopped."""
    curves = [trial for trial in trials if len(trial.get("curve") or ()) > 1]
    if not curves:
        return []
    chosen = {model_of(trial) for trial in best.values()}
    budgets = ranks(trial.get("budget_kimg") for trial in curves if not is_base(trial))
    on_top = sorted(curves, key=lambda trial: (is_base(trial), model_of(trial) in chosen))
    lines = [_curve(trial, budgets, model_of(trial) in chosen) for trial in on_top]
    return [*_named_once(lines), *stopped_points(trials, "nimg")]


def precision_series(trials: Sequence[Trial], best: Mapping[str, Trial]) -> list[Line]:
    """Precision against recall along the strengths of the chosen place of each space, each point with its strength."""
    lines = along_omega(trials)
    found = []
    for rank, (kind, trial) in enumerate(best.items()):
        points = [t for t in lines.get(place(trial), ()) if comparable(t) and _measured(t)]
        if len(points) > 1:
            found.append(_precisions(points, f"{METHODS[kind]}, {place_name(place(trial), [place(trial)])}", rank))
            ring = _precisions([t for t in points if t["omega"] == trial["omega"]], _ring_label(kind, trial, best), 0)
            found.append(replace(ring, color=CHOSEN, look="ring", texts=()))
    return found


def half_widths(records: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Half of the 95 % interval of each distance; empty if no standard error is known."""
    errors = tuple(NORMAL_95 * value(record.get("standard_error")) for record in records)
    return errors if any(math.isfinite(error) for error in errors) else ()


def trial_points(label: str, trials: Sequence[Trial], x: str, color: int, look: Look, dash: int = 0) -> Line:
    """Trials as points of distance against one of their values."""
    return Line(
        label,
        tuple(float(trial[x]) for trial in trials),
        tuple(value(trial["distance"]) for trial in trials),
        color,
        dash,
        look,
        errors=() if look == "open" else half_widths(trials),
        notes=tuple(f"{trial_name(trial)}; {images_name(trial)}" for trial in trials),
    )


def ranks(values: Iterable[Any]) -> dict[Any, int]:
    """The place of each value among the different ones, in rising order; none comes first."""
    different = set(values)
    return {found: i for i, found in enumerate(sorted(different, key=_none_first))}


def _none_first(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(_none_first(part) for part in found)
    return (found is not None, found)


def _strengths(label: str, trials: Sequence[Trial], color: int, dash: int) -> Line:
    return Line(
        label,
        tuple(float(trial["omega"]) for trial in trials),
        tuple(value(trial["distance"]) for trial in trials),
        color,
        dash,
        errors=half_widths(trials),
        notes=tuple(images_name(trial) for trial in trials),
    )


def _curve(trial: Trial, budgets: Mapping[Any, int], chosen: bool) -> Line:
    x = tuple(float(point["nimg"]) for point in trial["curve"])
    y = tuple(value(point["distance"]) for point in trial["curve"])
    notes = (trial_name(trial),) * len(x)
    if chosen:
        return Line(f"chosen ({trial_name(trial)})", x, y, CHOSEN, notes=notes)
    if is_base(trial):
        return Line(trial_name(trial), x, y, GREY, 1, notes=notes)
    budget = trial.get("budget_kimg")
    return Line(f"B = {short(budget)} kimg", x, y, budgets[budget], look="faint", notes=notes)


def _precisions(trials: Sequence[Trial], label: str, rank: int) -> Line:
    return Line(
        label,
        tuple(float(trial["measures"]["recall"]) for trial in trials),
        tuple(float(trial["measures"]["precision"]) for trial in trials),
        rank,
        rank,
        notes=tuple(trial_name(trial) for trial in trials),
        texts=tuple(f"{SYMBOLS[space(trial)]}={short(trial['omega'])}" for trial in trials),
    )


def _measured(trial: Trial) -> bool:
    measures = trial.get("measures") or {}
    return finite(measures.get("precision")) and finite(measures.get("recall"))


def _ring_label(kind: str, trial: Trial, best: Mapping[str, Trial]) -> str:
    method = f"{METHODS[kind]}, " if len(best) > 1 else ""
    return f"chosen ({method}{SYMBOLS[kind]} = {short(trial['omega'])})"


def _named_once(lines: Iterable[Line]) -> list[Line]:
    """The lines, of each label only the first in the legend."""
    named: set[str] = set()
    found = []
    for line in lines:
        found.append(replace(line, legend=line.label not in named))
        named.add(line.label)
    return found
