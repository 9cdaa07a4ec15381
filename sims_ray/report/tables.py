"""The tables of the page, in words, and the same tables as CSV, in exact numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sims_ray.report.numbers import count, finite, number, percent, short, signed, to_csv
from sims_ray.report.trials import METHODS, N_S, OMEGA, SYMBOLS, interval, is_base, space
from sims_ray.storage.models import WEIGHT

Record = Mapping[str, Any]
Words = Callable[[Any], str]
TABLE_COLUMNS = ("model", "omega", "budget_kimg", "n_s", "distance", "spread", "gain", "evaluations_per_image")
TABLE_MORE = (
    "space",
    "num_steps",
    "sigma_lo",
    "sigma_hi",
    "extra_kimg",
    "minimum",
    "standard_error",
    "gain_selection",
    "n_images",
)
TRIAL_COLUMNS = ("omega", "budget_kimg", "n_s", "metric", "distance", "nimg")
TRIAL_MORE = ("space", "num_steps", "sigma_lo", "sigma_hi", "standard_error", "nfe", "worker_s", "stopped")
INFINITY = "\N{INFINITY}"
DIFFERENCE = ("mean", "low", "high", "confidence")
MEASURES = {
    "precision": "share of generated images near real ones, higher is better",
    "recall": "share of real images near generated ones, higher is better",
    "density": "how many real neighbourhoods a generated image lies in, relative to chance",
    "coverage": "share of real images with a generated one in their neighbourhood, higher is better",
    "kid": "kernel distance, lower is better",
}


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: what it is, for those who hear it.
        caption: what its numbers mean.
        header: of each column.
        rows: cells as words; the first `labels` of a row are text, the others numbers.
        best: index of the row to stress, if any.
        labels: how many columns are text.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int | None = None
    labels: int = 1


def make_table(
    name: str, caption: str, columns: Sequence[tuple[str, Callable[[Record], str | None]]], records: Sequence[Record]
) -> Table:
    """A table of records, without the columns that no record has a value for; the best is that of least `distance`."""
    cells = {title: [words(record) for record in records] for title, words in columns}
    kept = [title for title, column in cells.items() if any(cell is not None for cell in column)]
    rows = tuple(tuple(cells[title][i] or short(None) for title in kept) for i in range(len(records)))
    distances = [record["distance"] for record in records]
    known = [distance for distance in distances if finite(distance)]
    return Table(name, caption, tuple(kept), rows, distances.index(min(known)) if known else None)


def results_table(summary: Record) -> Table:
    """The compared models on fresh seeds: distances, differences to the base, matched comparisons, selection's gain."""
    rows, several, metric = summary["table"], summary["blocks"] > 1, summary["metric"]
    spread = f"mean \N{PLUS-MINUS SIGN} standard deviation over {summary['blocks']} blocks" if several else "one block"
    differences = [row["difference"] for row in rows if _interval_of(row) is not None]
    paired = (
        f" Difference: to the base on the same seeds, with its {differences[0].get('confidence') or 0.95:.0%} interval."
        if differences
        else ""
    )
    selection = (
        " On selection seeds: the change on the seeds that the model was selected on."
        if any(finite(row.get("gain_selection")) for row in rows)
        else ""
    )
    columns: list[tuple[str, Callable[[Record], str | None]]] = [
        ("Model", lambda row: row["model"]),
        (metric, lambda row: _spread(row) if several else number(row["distance"])),
        ("Difference to base", lambda row: _interval_of(row)),
        ("Change from base", lambda row: None if row["model"] == "base" else percent(-row["gain"])),
        ("On selection seeds", lambda row: _negated_percent(row.get("gain_selection"))),
        *_coordinates(rows),
        ("Trained on (kimg)", _word("extra_kimg", short)),
        ("Evaluations per image", lambda row: short(row["evaluations_per_image"])),
        ("Images", lambda row: f"{len(row['blocks'])} \N{MULTIPLICATION SIGN} {count(_images(row, summary))}"),
    ]
    caption = (
        f"{metric}, lower is better: {spread} of {count(summary['n_images'])} images from seeds the search never saw, "
        f"against {count(summary['num_real'])} real images.{paired}{selection}"
    )
    return make_table("Results", caption, columns, rows)


def blocks_table(summary: Record) -> Table:
    """What each model came to on each block, and its other measures."""
    rows, blocks = summary["table"], max(len(row["blocks"]) for row in summary["table"])

    def block(i: int) -> Callable[[Record], str | None]:
        return lambda row: number(row["blocks"][i]) if i < len(row["blocks"]) else None

    columns: list[tuple[str, Callable[[Record], str | None]]] = [
        ("Model", lambda row: row["model"]),
        *((f"Block {i + 1}", block(i)) for i in range(blocks)),
        ("Minimum", _word("minimum", number)),
        ("Standard error", _word("standard_error", lambda error: number(error, 2))),
        *_measure_columns(),
    ]
    return make_table("Blocks and other measures", _measures_caption(summary["metric"], rows), columns, rows)


def trials_table(summary: Record) -> Table:
    """All trials on the selection seeds, lowest first; those stopped early after the others."""
    trials = sorted(summary["trials"], key=_by_distance)
    metric, stopped = summary["selected"]["metric"], any(trial.get("stopped") for trial in trials)
    columns: list[tuple[str, Callable[[Record], str | None]]] = [
        *_coordinates(trials),
        ("Distance", lambda trial: number(trial["distance"])),
        ("Standard error", _word("standard_error", lambda error: number(error, 2))),
        ("Images", _word("nimg", count)),
        ("Evaluations per image", _word("nfe", short)),
        ("Worker seconds", _word("worker_s", lambda duration: number(duration, 3))),
        ("Stopped early", lambda trial: ("yes" if trial.get("stopped") else "no") if stopped else None),
        *_measure_columns(),
    ]
    last = "; the trials that were stopped early, of fewer images, come last" if stopped else ""
    caption = f"{metric} on the selection seeds, lowest first{last}."
    return make_table("All trials", caption, columns, trials)


def table_csv(table: Sequence[Record]) -> bytes:
    """The results with every number in full; columns that are new go after the old ones."""
    blocks = max((len(row["blocks"]) for row in table), default=0)
    header = [*TABLE_COLUMNS, *(f"block_{i + 1}" for i in range(blocks)), *TABLE_MORE]
    header += [f"difference_{part}" for part in DIFFERENCE] + list(MEASURES)
    return to_csv(header, [_row_values(row, blocks) for row in table])


def trials_csv(trials: Sequence[Record]) -> bytes:
    """All trials with every number in full."""
    names = (*TRIAL_COLUMNS, *TRIAL_MORE)
    rows = ([*(trial.get(name) for name in names), *_measures(trial)] for trial in trials)
    return to_csv((*names, *MEASURES), rows)


def _row_values(row: Record, blocks: int) -> list[Any]:
    difference, found = row.get("difference") or {}, list(row["blocks"])
    return [
        *(row.get(name) for name in TABLE_COLUMNS),
        *found,
        *[None] * (blocks - len(found)),
        *(row.get(name) for name in TABLE_MORE),
        *(difference.get(part) for part in DIFFERENCE),
        *_measures(row),
    ]


def _measures(record: Record) -> list[Any]:
    measures = record.get("measures") or {}
    return [measures.get(name) for name in MEASURES]


def _measure_columns() -> list[tuple[str, Callable[[Record], str | None]]]:
    def column(name: str) -> Callable[[Record], str | None]:
        return lambda record: _number((record.get("measures") or {}).get(name))

    return [("KID" if name == "kid" else name.capitalize(), column(name)) for name in MEASURES]


def _measures_caption(metric: str, rows: Sequence[Record]) -> str:
    known = [name for name in MEASURES if any((row.get("measures") or {}).get(name) is not None for row in rows)]
    said = "; ".join(f"{'KID' if name == 'kid' else name}: {MEASURES[name]}" for name in known)
    return f"{metric} of each block of seeds, the same seeds for every model." + (
        f" {said[0].upper()}{said[1:]}." if said else ""
    )


def _coordinates(records: Sequence[Record]) -> list[tuple[str, Callable[[Record], str | None]]]:
    """Strength, B and n_s always have a column; the method, the interval and the steps where any record has one."""
    neon = any(space(record) == WEIGHT for record in records) and "model" not in records[0]
    strength = f"{OMEGA} or {SYMBOLS[WEIGHT]}" if any(space(record) == WEIGHT for record in records) else OMEGA
    return [
        *([("Method", lambda record: "base" if is_base(record) else METHODS[space(record)])] if neon else []),
        (strength, lambda record: short(record["omega"])),
        ("B (kimg)", lambda record: short(record["budget_kimg"])),
        (N_S, lambda record: count(record["n_s"])),
        ("\N{GREEK SMALL LETTER SIGMA} interval", _interval_words),
        ("Steps", _word("num_steps", short)),
    ]


def _interval_words(record: Record) -> str | None:
    low, high = interval(record)
    if low == 0 and math.isinf(high):
        return None
    return f"{short(low)} to {INFINITY if math.isinf(high) else short(high)}"


def _word(name: str, words: Words) -> Callable[[Record], str | None]:
    return lambda record: None if record.get(name) is None else words(record[name])


def _number(value: float | None) -> str | None:
    return number(value, 3) if finite(value) else None


def _spread(row: Record) -> str:
    if len(row["blocks"]) < 2 or row.get("spread") is None:
        return number(row["distance"])
    return f"{number(row['distance'])} \N{PLUS-MINUS SIGN} {number(row['spread'], 2)}"


def _interval_of(row: Record) -> str | None:
    difference = row.get("difference") or {}
    if row["model"] == "base" or not finite(difference.get("low")) or not finite(difference.get("high")):
        return None
    return f"{signed(difference['mean'])} ({signed(difference['low'])} to {signed(difference['high'])})"


def _negated_percent(share: float | None) -> str | None:
    return percent(-share) if share is not None and math.isfinite(share) else None


def _images(row: Record, summary: Record) -> int:
    return int(row.get("n_images") or summary["n_images"])


def _by_distance(trial: Record) -> tuple[bool, float]:
    """Sort key that puts stopped trials last, and a trial without a finite distance behind its like."""
    distance = trial["distance"]
    return bool(trial.get("stopped")), float(distance) if finite(distance) else math.inf
