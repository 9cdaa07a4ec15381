"""Spread of a distance over disjoint blocks of seeds, paired differences, and the bias of few images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.moments import Moments, merge_all
from sims_ray.metrics.neighbours import Features

MOST_PARTS = 8


@dataclass(frozen=True)
class Spread:
    """A value over blocks that share nothing.

    Attributes:
        mean: over the blocks.
        minimum: the least; what papers that report the best of three give.
        standard_deviation: between blocks (n - 1); None for one block.
        standard_error: of the mean; None for one block.
        num_blocks: how many.
    """

    mean: float
    minimum: float
    standard_deviation: float | None
    standard_error: float | None
    num_blocks: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of one value per block.

        Raises:
            ValueError: no block.
        """
        if not len(values):
            raise ValueError("no blocks to take a spread over; evaluate at least one block of seeds")
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        error = None if deviation is None else deviation / len(values) ** 0.5
        return cls(float(np.mean(values)), float(min(values)), deviation, error, len(values))


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over blocks that both saw.

    Attributes:
        mean: of the differences; below 0 where a has the smaller distance.
        low: lower end of the interval; None for one block.
        high: upper end; None for one block.
        confidence: of the interval.
        num_blocks: how many.
    """

    mean: float
    low: float | None
    high: float | None
    confidence: float
    num_blocks: int


def paired_difference(
    a_blocks: Sequence[float], b_blocks: Sequence[float], confidence: float = 0.95
) -> PairedDifference:
    """Mean of a - b over the same blocks of seeds, with Student's interval of the paired differences.

    Raises:
        ValueError: unequal numbers of blocks, none, or a confidence outside (0, 1).
    """
    if len(a_blocks) != len(b_blocks):
        raise ValueError(
            f"{len(a_blocks)} and {len(b_blocks)} blocks cannot be paired; evaluate both on the same seeds"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a share between 0 and 1, like 0.95")
    spread = Spread.of([a - b for a, b in zip(a_blocks, b_blocks, strict=True)])
    if spread.standard_error is None:
        return PairedDifference(spread.mean, None, None, confidence, 1)
    half = float(student_t.ppf((1 + confidence) / 2, spread.num_blocks - 1)) * spread.standard_error
    return PairedDifference(spread.mean, spread.mean - half, spread.mean + half, confidence, spread.num_blocks)


def small_n_bias(reference: Features, n: int, *, max_parts: int = MOST_PARTS, seed: int = 0) -> Spread:
    """What the Fréchet distance shows at n images where it should show 0: disjoint random parts of the reference.

    Each part of n features [n, F] against all others; as many parts as fit, at most `max_parts`.

    Raises:
        ValueError: the reference has fewer than 2 n vectors, or n < 2.
    """
    if n < 2 or len(reference) < 2 * n:
        raise ValueError(
            f"the bias at n = {n} takes a reference of {2 * max(n, 2)} images or more, not {len(reference)}"
        )
    num_parts = min(len(reference) // n, max_parts)
    order = np.random.default_rng(seed).permutation(len(reference))
    pieces = np.split(order, [n * (i + 1) for i in range(num_parts)])
    moments = [Moments.of(reference[piece]) for piece in pieces if len(piece)]
    return bias_of_parts(moments[:num_parts], moments[num_parts:])


def bias_of_parts(parts: Sequence[Moments], rest: Sequence[Moments] = ()) -> Spread:
    """Fréchet distance of each part of one data set to everything else in it, from moments alone.

    Args:
        parts: moments of disjoint parts of equal n.
        rest: moments of what is left of the data set.

    Raises:
        ValueError: nothing to compare with.
    """
    others = [[*parts[:i], *parts[i + 1 :], *rest] for i in range(len(parts))]
    return Spread.of([frechet_distance(part, merge_all(other)) for part, other in zip(parts, others, strict=True)])
