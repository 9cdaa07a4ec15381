"""What came out of a run, in sentences that the results table bears out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sims_ray.errors import SimsError
from sims_ray.report.numbers import finite, number, percent, short

Row = Mapping[str, Any]
BASE, SIMS, NEON = "base", "SIMS", "Neon"
MATCHED = {
    "base, matched evaluations": "at as many network evaluations per image",
    "base, matched training": "trained on for as many real images",
}


def verdict(summary: Mapping[str, Any]) -> str:
    """What came out, in one sentence.

    Raises:
        SimsError: the table has no base or no SIMS row.
    """
    base, sims = row_of(summary, BASE), row_of(summary, SIMS)
    change = f"from {number(base['distance'], 3)} to {number(sims['distance'], 3)} ({percent(-sims['gain'])})"
    if clear(base, sims) is False:
        why = "the interval of their difference holds 0" if _interval(sims) else "the blocks overlap"
        return f"SIMS makes no clear difference: {summary['metric']} goes {change} and {why}."
    if sims["gain"] > 0:
        return f"SIMS lowers {summary['metric']} {change}, without one more real image."
    return f"SIMS does not help here: {summary['metric']} goes {change}; lower is better."


def evidence(summary: Mapping[str, Any]) -> str:
    """How far the verdict can be trusted and what it costs, in two sentences."""
    base, sims = row_of(summary, BASE), row_of(summary, SIMS)
    cost = (
        f"One image costs {short(sims['evaluations_per_image'])} network evaluations with SIMS "
        f"and {short(base['evaluations_per_image'])} with the base."
    )
    if (found := _interval(sims)) is not None:
        low, high, confidence = found
        return (
            f"On the same seeds SIMS differs from the base by {number(sims['difference']['mean'], 3)}, with a "
            f"{confidence:.0%} interval from {number(low, 3)} to {number(high, 3)} over {len(sims['blocks'])} "
            f"blocks of seeds. {cost}"
        )
    apart = separated(base, sims)
    if apart is None:
        return f"It was measured on one block of seeds, so its spread is unknown. {cost}"
    if not apart:
        return f"Where the blocks of two models overlap, their difference may be chance. {cost}"
    side = "below" if sims["distance"] < base["distance"] else "above"
    return f"Each of the {len(sims['blocks'])} SIMS blocks lies {side} every base block. {cost}"


def comparisons(summary: Mapping[str, Any]) -> list[str]:
    """The models that the guided ones are to be held against, and what selection flattered, a sentence each."""
    found = list(_matched(summary))
    for name in (SIMS, NEON):
        row = next((row for row in summary["table"] if row["model"] == name), None)
        if row is not None and finite(row.get("gain_selection")):
            flattered = row["gain_selection"] > row["gain"]
            found.append(
                f"{name} changes the base's distance by {percent(-row['gain_selection'])} on the seeds that it was "
                f"selected on and by {percent(-row['gain'])} on fresh seeds: selection "
                f"{'flattered it by the difference' if flattered else 'did not flatter it'}."
            )
    return found


def clear(base: Row, other: Row) -> bool | None:
    """Whether the two differ beyond chance: by the paired interval, else by their blocks; none if neither can tell."""
    found = _interval(other)
    if found is None:
        return separated(base, other)
    low, high, _ = found
    return low > 0 or high < 0


def separated(one: Row, other: Row) -> bool | None:
    """Whether the two rows' blocks do not overlap; none if either has fewer than two blocks."""
    a, b = one["blocks"], other["blocks"]
    if min(len(a), len(b)) < 2:
        return None
    return bool(max(a) < min(b) or max(b) < min(a))


def row_of(summary: Mapping[str, Any], model: str) -> Row:
    """The row of a model in the results.

    Raises:
        SimsError: there is none.
    """
    for row in summary["table"]:
        if row["model"] == model:
            found: Row = row
            return found
    raise SimsError(f"the results have no row for {model!r}, so there is nothing to compare; measure that model first")


def _matched(summary: Mapping[str, Any]) -> Iterator[str]:
    sims = row_of(summary, SIMS)
    for row in summary["table"]:
        if row["model"] in MATCHED:
            side = "below" if sims["distance"] < row["distance"] else "not below"
            yield (
                f"The base {MATCHED[row['model']]} reaches {number(row['distance'], 3)} ({percent(-row['gain'])} from "
                f"the base); SIMS, at {number(sims['distance'], 3)}, is {side} it."
            )


def _interval(row: Row) -> tuple[float, float, float] | None:
    difference = row.get("difference") or {}
    low, high = difference.get("low"), difference.get("high")
    if low is None or high is None or not finite(low) or not finite(high):
        return None
    return float(low), float(high), float(difference.get("confidence") or 0.95)
