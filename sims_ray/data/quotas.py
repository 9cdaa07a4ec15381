"""Quotas by attribute: which of the candidates, in the order of their seeds, make a set with given shares.

Slot t of the set belongs to an attribute by the shares alone, and takes the next unused candidate with that
attribute. So the set is a pure function of the candidates and the shares: a larger set begins with the smaller one,
and every prefix has the shares as exactly as whole numbers allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims_ray.data.samples import Samples, concatenate
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError

SUM_TOLERANCE = 1e-6
PATIENCE_NIMG = 100_000
WINDOW_ROWS = 2048  # of a table that are in memory while rows are picked from them
MARGIN = 2.0  # standard deviations by which a round is larger than its expected need
GROWTH = 4  # times what was seen that a round may add: from few images a rate is not known well


@dataclass(frozen=True)
class Selection:
    """The rows of a set, as far as there are candidates for them.

    Attributes:
        rows: for each slot the number of its candidate, int64; shorter than the set where candidates are missing.
        missing: further candidates that the set needs, by attribute; empty if it is full.
    """

    rows: NDArray[np.int64]
    missing: dict[int, int]


def slots(shares: Mapping[int, float], start: int, stop: int) -> NDArray[np.int32]:
    """Attributes of the slots [start, stop) of a set: int32.

    After any number n of slots every attribute a holds share_a * n of them within 1 - 1 / (2 A - 2), for A
    attributes: no sequence has a smaller bound (Tijdeman, The chairman assignment problem, 1980). For two attributes
    that is the rounding of the shares.

    Raises:
        SimsError: the shares are none.
    """
    return _head(_weights(shares), stop)[start:stop]


def select(attributes: NDArray[Any], shares: Mapping[int, float], n: int) -> Selection:
    """The candidates that fill the first `n` slots.

    Args:
        attributes: of the candidates in the order of their seeds, int [M]; those without a share are passed over.
        shares: share of each attribute in the set.
        n: slots.

    Raises:
        SimsError: the shares are none.
    """
    wanted = slots(shares, 0, n)
    rows, missing = np.full(n, -1, dtype=np.int64), {}
    for attribute in _shares(shares):
        places, found = np.flatnonzero(wanted == attribute), np.flatnonzero(attributes == attribute)
        rows[places[: len(found)]] = found[: len(places)]
        if len(places) > len(found):
            missing[attribute] = len(places) - len(found)
    return Selection(rows[: int(np.argmin(rows)) if missing else n], missing)


def gather(table: SampleTable, rows: NDArray[np.int64]) -> Samples:
    """Rows of a table in a given order, without repetition; only few more than these are in memory at once."""
    order = np.argsort(rows)
    found = concatenate([table.rows(start, stop)[wanted] for start, stop, wanted in _windows(rows[order])])
    return found[np.argsort(order)]


def candidates_needed(
    found: Mapping[int, int], seen: int, shares: Mapping[int, float], n: int, patience_nimg: int = PATIENCE_NIMG
) -> int:
    """How many further candidates are likely to fill a set, for planning; 0 if it is full.

    Args:
        found: candidates with each attribute so far.
        seen: candidates so far.
        shares: share of each attribute in the set.
        n: slots of the set.
        patience_nimg: candidates after which an attribute should have appeared.

    Raises:
        SimsError: the shares are none, or an attribute that is needed has not appeared for so long.
    """
    needed = np.bincount(np.searchsorted(list(_shares(shares)), slots(shares, 0, n)), minlength=len(_shares(shares)))
    further = max(n - seen, 0)  # no fewer can do, whatever the attributes are
    for attribute, count in zip(_shares(shares), needed.tolist(), strict=True):
        have = found.get(attribute, 0)
        if have >= count or not seen:
            continue
        if not have and seen >= patience_nimg:
            raise SimsError(
                f"attribute {attribute} was not seen in {seen:,} images and {count:,} are needed; give it no share, "
                f"or sample from a model that makes it"
            )
        if have:
            further = max(further, min(_draws(count - have, have / seen), GROWTH * seen))
        else:  # look at as many again, but no more than patience allows
            further = max(further, min(seen, patience_nimg - seen))
    return further


def _windows(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Ascending rows in windows: first row, last one + 1, and the rows wanted counted from the first."""
    at = 0
    while at < len(rows):
        start = int(rows[at])
        end = int(np.searchsorted(rows, start + WINDOW_ROWS))
        yield start, int(rows[end - 1]) + 1, rows[at:end] - start
        at = end


def _draws(successes: int, rate: float) -> int:
    """Draws with `rate` successes on average that bring so many, but for bad luck beyond the margin."""
    spread = MARGIN * math.sqrt(1 - rate)
    root = (spread + math.sqrt(spread**2 + 4 * successes)) / 2  # of the expected successes x: x - spread sqrt(x) = s
    return math.ceil(root**2 / rate)


def _shares(shares: Mapping[int, float]) -> dict[int, float]:
    """The shares above 0 in the order of their attributes; JSON makes strings of the attributes.

    Raises:
        SimsError: they do not add up to 1, or one is negative.
    """
    ordered = dict(sorted((int(attribute), float(share)) for attribute, share in shares.items()))
    for attribute, share in ordered.items():
        if not share >= 0:
            raise SimsError(f"attribute {attribute} has the share {share:g}; give shares from 0 to 1")
    if abs((total := math.fsum(ordered.values())) - 1) > SUM_TOLERANCE:
        raise SimsError(f"the shares add up to {total:.9g}; make them add up to 1")
    return {attribute: share for attribute, share in ordered.items() if share}


def _weights(shares: Mapping[int, float]) -> tuple[tuple[int, int], ...]:
    """Attributes with whole numbers in the proportion of their shares, as the shares are written in decimals."""
    exact = {attribute: Fraction(repr(share)) for attribute, share in _shares(shares).items()}
    scale = math.lcm(*(share.denominator for share in exact.values()))
    whole = {attribute: int(share * scale) for attribute, share in exact.items()}
    common = math.gcd(*whole.values())
    return tuple((attribute, weight // common) for attribute, weight in whole.items())


@lru_cache(maxsize=4)
def _head(weights: tuple[tuple[int, int], ...], n: int) -> NDArray[np.int32]:
    """The first `n` slots; they repeat after the sum of the weights, where every share is exact."""
    attributes = np.array([attribute for attribute, _ in weights], dtype=np.int32)
    counts = [weight for _, weight in weights]
    period = min(n, sum(counts))
    turns = attributes[np.fromiter(islice(_turns(counts), period), np.int64, period)]
    head = np.resize(turns, n)
    head.flags.writeable = False
    return head


def _turns(weights: list[int]) -> Iterator[int]:
    """Whose turn it is at every slot: of those whose deficit allows a turn, the one that has to have it first."""
    total, bound = sum(weights), max(2 * len(weights) - 2, 1)
    deficits = [0] * len(weights)  # times total * bound, so that all of it is exact
    while True:
        chosen, first = 0, math.inf
        deficits = [deficit + weight * bound for deficit, weight in zip(deficits, weights, strict=True)]
        for place, (deficit, weight) in enumerate(zip(deficits, weights, strict=True)):
            deadline = ((bound - 1) * total - deficit) / weight
            if deficit >= total and deadline < first:
                chosen, first = place, deadline
        deficits[chosen] -= total * bound
        yield chosen
