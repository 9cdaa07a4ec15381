"""Trials of a sweep as the report sees them: which model each is, and which of them may be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sims_ray.report.numbers import count, finite, short
from sims_ray.storage.models import SCORE, WEIGHT

Trial = Mapping[str, Any]
SYMBOLS: dict[str, str] = {SCORE: "\N{GREEK SMALL LETTER OMEGA}", WEIGHT: "w"}
METHODS: dict[str, str] = {SCORE: "SIMS", WEIGHT: "Neon"}
OMEGA = SYMBOLS[SCORE]
N_S = "n\N{LATIN SUBSCRIPT SMALL LETTER S}"
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
Where = tuple[Any, ...]


def space(trial: Trial) -> str:
    """The space that the trial extrapolates in: "score" (SIMS) or "weight" (Neon)."""
    return str(trial.get("space") or SCORE)


def steps(trial: Trial) -> int | None:
    """Solver steps; None for the recipe's."""
    found: int | None = trial.get("num_steps")
    return found


def interval(trial: Trial) -> tuple[float, float]:
    """Guidance acts at noise levels above the first and up to the second."""
    high = trial.get("sigma_hi")
    return float(trial.get("sigma_lo") or 0.0), math.inf if high is None else float(high)


def trained(trial: Trial) -> Where:
    """The set size, the budget and the steps: what an auxiliary shares with the models that it guides."""
    return trial.get("n_s"), trial.get("budget_kimg"), steps(trial)


def place(trial: Trial) -> Where:
    """Everything but the strength: trials of one place make one line over it."""
    return (space(trial), *trained(trial), *interval(trial))


def model_of(trial: Trial) -> Where:
    """What tells a trial from every other: its place and its strength; of the base, its steps alone."""
    return (0.0, steps(trial)) if is_base(trial) else (float(trial["omega"]), *place(trial))


def is_base(trial: Trial) -> bool:
    """Whether it is the base: at strength 0 nothing guides."""
    return bool(trial["omega"] == 0)


def comparable(trial: Trial) -> bool:
    """Whether its distance is of all the images of a trial, and a number."""
    return not trial.get("stopped") and finite(trial["distance"])


def value(quantity: float | None) -> float:
    """A number that may be missing, as a float; NaN for none."""
    return math.nan if quantity is None else float(quantity)


def base_of(trials: Iterable[Trial], num_steps: int | None = None) -> Trial | None:
    """The base sampled in so many steps; none if the sweep had no such trial."""
    return next((trial for trial in trials if is_base(trial) and steps(trial) == num_steps), None)


def along_omega(trials: Sequence[Trial]) -> dict[Where, list[Trial]]:
    """The trials of each place by rising strength, with the base and the auxiliary on every line that they belong to.

    The auxiliary has no space and no interval, so the lines of SIMS, of Neon and of each interval share it; where
    nothing was guided by it, it has a line of its own.
    """
    guided = [trial for trial in trials if trial["omega"] not in (0, -1)]
    auxiliaries = [trial for trial in trials if trial["omega"] == -1]
    lines: dict[Where, dict[float, Trial]] = {place(trial): {} for trial in guided}
    lines |= {place(a): {} for a in auxiliaries if not any(trained(a) == where[1:4] for where in lines)}
    for where, line in lines.items():
        shared = [a for a in auxiliaries if trained(a) == where[1:4]]
        base = base_of(trials, where[3])
        own = [trial for trial in guided if place(trial) == where]
        line.update({float(trial["omega"]): trial for trial in (*([base] if base else []), *shared, *own)})
    ordered = sorted(lines, key=lambda where: tuple(-math.inf if part is None else part for part in where[1:]))
    ordered.sort(key=lambda where: str(where[0]))
    return {where: [lines[where][omega] for omega in sorted(lines[where])] for where in ordered}


def place_name(where: Where, among: Iterable[Where]) -> str:
    """A place for people: B and n_s always, the rest where the places differ in it."""
    kind, n_s, budget, num_steps, low, high = where
    others = list(among)
    words = [f"B = {short(budget)} kimg", f"{N_S} = {count(n_s)}"]
    if len({other[0] for other in others}) > 1:
        words.insert(0, METHODS[kind])
    if len({other[3] for other in others}) > 1:
        words.append("the recipe's steps" if num_steps is None else f"{num_steps} steps")
    if len({other[4:] for other in others if other[0] == kind}) > 1:
        words.append(_interval_name(low, high))
    return ", ".join(words)


def trial_name(trial: Trial) -> str:
    """A trial for people: all that it differs from the recipe in."""
    words = ["base"]
    if not is_base(trial):
        words = [f"{SYMBOLS[space(trial)]} = {short(trial['omega'])}"]
        words += [f"B = {short(trial.get('budget_kimg'))} kimg", f"{N_S} = {count(trial.get('n_s'))}"]
    if interval(trial) != (0.0, math.inf):
        words.append(_interval_name(*interval(trial)))
    if steps(trial) is not None:
        words.append(f"{steps(trial)} steps")
    return ", ".join(words)


def images_name(trial: Trial) -> str:
    """How many images a trial's distance is of, and whether it was ended there."""
    return f"{count(trial.get('nimg'))} images{', stopped early' if trial.get('stopped') else ''}"


def _interval_name(low: float, high: float) -> str:
    return f"{SIGMA} from {short(low)}" + ("" if math.isinf(high) else f" to {short(high)}")
