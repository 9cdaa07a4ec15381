"""Quotas by attribute: exact shares in every prefix, the same rows however the candidates were made."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sims_ray.data import quotas
from sims_ray.data.quotas import candidates_needed, gather, select, slots
from sims_ray.data.samples import Samples, write_samples
from sims_ray.data.table import SampleTable, table_result
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import Artifact

SHARES: dict[str, dict[int, float]] = {
    "70/30": {0: 0.7, 1: 0.3},
    "30/70, other names": {-3: 0.3, 12: 0.7},
    "one": {4: 1.0},
    "halves": {0: 0.5, 1: 0.5},
    "thirds": {0: 1 / 3, 1: 1 / 3, 2: 1 / 3},
    "with a share of 0": {0: 0.25, 1: 0.0, 2: 0.75},
    # Where the largest deficit always comes first, one of these falls 1.27 behind.
    "steep": {i: w / 3295 for i, w in enumerate([1663, 2, 26, 4, 1369, 196, 1, 34])},
}


def deviations(shares: dict[int, float], n: int) -> NDArray[Any]:
    """Count less share * t of each attribute after t slots: [n, A]."""
    sequence = slots(shares, 0, n)
    counts = np.cumsum(sequence[:, None] == np.array(list(shares)), axis=0)
    found: NDArray[Any] = counts - np.arange(1, n + 1)[:, None] * np.array(list(shares.values()))
    return found


@pytest.mark.parametrize("name", SHARES)
def test_every_prefix_has_the_shares_as_exactly_as_any_sequence_can(name: str) -> None:
    shares = SHARES[name]
    attributes = sum(share > 0 for share in shares.values())
    bound = 1 - 1 / (2 * attributes - 2) if attributes > 1 else 0
    assert np.abs(deviations(shares, 3500)).max() <= bound + 1e-9


def test_random_shares_stay_within_one_image_too() -> None:
    random = np.random.default_rng(0)
    for attributes in (2, 3, 5, 9):
        for share in random.dirichlet(np.full(attributes, 0.4), 10):
            assert np.abs(deviations(dict(enumerate(share.tolist())), 700)).max() < 1


def test_two_attributes_are_rounded_to_the_nearest_image() -> None:
    for n in range(1, 60):
        first = int((slots(SHARES["70/30"], 0, n) == 0).sum())
        assert abs(first - Fraction(7, 10) * n) <= Fraction(1, 2)


def test_ties_go_to_the_smaller_attribute() -> None:
    assert slots({7: 0.5, 2: 0.5}, 0, 6).tolist() == [2, 7, 2, 7, 2, 7]
    assert slots({2: 1 / 3, 0: 1 / 3, 1: 1 / 3}, 0, 6).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", SHARES)
def test_slots_are_the_same_from_wherever_they_are_asked_for(name: str) -> None:
    whole = slots(SHARES[name], 0, 500)
    assert whole.dtype == np.int32
    for start, stop in [(0, 1), (0, 499), (1, 2), (13, 77), (200, 500), (30, 30)]:
        assert np.array_equal(slots(SHARES[name], start, stop), whole[start:stop])


def test_slots_do_not_depend_on_the_order_or_the_text_of_the_shares() -> None:
    whole = slots({0: 0.7, 1: 0.3}, 0, 50)
    assert np.array_equal(slots({1: 0.3, 0: 0.7}, 0, 50), whole)
    as_json: dict[Any, float] = {"1": 0.3, "0": 0.7}
    assert np.array_equal(slots(as_json, 0, 50), whole)


def test_slots_repeat_after_the_least_whole_numbers_in_the_proportion_of_the_shares() -> None:
    assert np.array_equal(slots({0: 0.7, 1: 0.3}, 0, 1000), np.tile(slots({0: 0.7, 1: 0.3}, 0, 10), 100))


def candidates(n: int, seed: int = 0, rates: tuple[float, ...] = (0.2, 0.5, 0.3)) -> NDArray[np.int64]:
    return np.random.default_rng(seed).choice(len(rates), n, p=rates)


def test_each_slot_takes_the_next_unused_candidate_of_its_attribute() -> None:
    attributes, shares = candidates(400), {0: 0.3, 1: 0.7}
    selection = select(attributes, shares, 100)
    used: set[int] = set()
    for row, wanted in zip(selection.rows.tolist(), slots(shares, 0, 100).tolist(), strict=True):
        assert row == next(i for i in range(400) if attributes[i] == wanted and i not in used)
        used.add(row)
    assert selection.missing == {} and selection.rows.dtype == np.int64


def test_a_larger_set_and_more_candidates_keep_the_rows_that_were_chosen() -> None:
    attributes, shares = candidates(2000), {0: 0.3, 1: 0.6, 2: 0.1}
    whole = select(attributes, shares, 600)
    assert not whole.missing
    for seen in (50, 700, 1999):
        for n in (0, 1, 77, 600):
            part = select(attributes[:seen], shares, n)
            assert np.array_equal(part.rows, whole.rows[: len(part.rows)])
            assert len(part.rows) == n or part.missing


def test_what_is_missing_is_said_by_attribute_and_suffices() -> None:
    attributes, shares = np.array([1, 1, 2, 0, 1]), {0: 0.5, 1: 0.5}
    selection = select(attributes, shares, 8)
    assert selection.missing == {0: 3, 1: 1}
    assert selection.rows.tolist() == [3, 0]  # the third slot is attribute 0's
    assert not select(np.append(attributes, [0, 1, 0, 0]), shares, 8).missing
    assert select(np.append(attributes, [0, 1, 0]), shares, 8).missing == {0: 1}


def test_no_candidates_at_all_leave_everything_missing() -> None:
    selection = select(np.array([], np.int32), {0: 0.7, 1: 0.3}, 10)
    assert len(selection.rows) == 0 and selection.missing == {0: 7, 1: 3}


class Recorded(SampleTable):
    """A table that notes how many rows are read at once."""

    def rows(self, start: int, stop: int) -> Samples:
        self.most = max(getattr(self, "most", 0), stop - start)
        return super().rows(start, stop)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """6,000 rows in three files."""
    artifact = Artifact(tmp_path_factory.mktemp("table"), "import", {}, ())
    for part in range(3):
        ids = np.arange(2000 * part, 2000 * (part + 1))
        images = np.repeat((ids % 251).astype(np.uint8), 16).reshape(-1, 1, 4, 4)
        write_samples(artifact.path / f"part-{part}.parquet", Samples(ids, images, (ids % 7).astype(np.int32)), {})
    labels = np.zeros(6000, np.int32)
    artifact.commit({f"part-{i}.parquet": {"rows": 2000} for i in range(3)}, table_result((1, 4, 4), labels, 6000))
    return Recorded(artifact.path)


@pytest.mark.parametrize("n", [1, 7, 500, 4000])
def test_rows_are_gathered_in_their_order_with_little_in_memory(n: int, table: Recorded) -> None:
    rows = np.random.default_rng(n).permutation(6000)[:n]
    found = gather(table, rows)
    assert np.array_equal(found.ids, rows) and np.array_equal(found.images[:, 0, 0, 0], rows % 251)
    assert np.array_equal(found.labels, rows % 7)
    assert table.most <= quotas.WINDOW_ROWS < 6000


def found_in(attributes: NDArray[Any]) -> dict[int, int]:
    return dict(zip(*(part.tolist() for part in np.unique(attributes, return_counts=True)), strict=True))


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.95, 0.05), (0.002, 0.998), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize("n", [1, 40, 3000])
def test_rounds_end_with_a_full_set_soon_and_with_few_images_too_many(rates: tuple[float, ...], n: int) -> None:
    shares = {0: 0.7, 1: 0.3}
    attributes = candidates(2_000_000, rates=rates, seed=3)
    rounds, seen = 0, 0
    while further := candidates_needed(found_in(attributes[:seen]), seen, shares, n):
        rounds, seen = rounds + 1, seen + further
    assert not select(attributes[:seen], shares, n).missing
    least = max(np.flatnonzero(attributes == a)[max(c, 1) - 1] for a, c in ((0, round(0.7 * n)), (1, n * 3 // 10)))
    assert rounds <= 12 and (n < 1000 or (rounds <= 7 and seen <= 1.35 * least))


def test_the_first_round_makes_as_many_images_as_the_set_has() -> None:
    assert candidates_needed({}, 0, {0: 0.7, 1: 0.3}, 500) == 500


def test_a_full_set_needs_no_further_candidates() -> None:
    assert candidates_needed({0: 7, 1: 3, 5: 90}, 100, {0: 0.7, 1: 0.3}, 10) == 0
    assert candidates_needed({0: 7, 1: 2, 5: 91}, 100, {0: 0.7, 1: 0.3}, 10) > 0


def test_the_next_round_is_large_enough_97_times_of_100() -> None:
    further = candidates_needed({0: 9_000, 1: 1_000}, 10_000, {0: 0.5, 1: 0.5}, 6_000)
    draws = np.random.default_rng(0).binomial(further, 0.1, 100_000)
    assert 0.97 < (draws >= 2_000).mean() < 0.99


def test_few_sightings_do_not_lead_to_a_round_of_millions() -> None:
    assert candidates_needed({0: 999, 1: 1}, 1000, {0: 0.5, 1: 0.5}, 100_000) <= 100_000
    assert candidates_needed({0: 1999, 1: 1}, 2000, {0: 0.5, 1: 0.5}, 2_000) <= 4 * 2000


def test_an_attribute_that_never_comes_ends_the_search_with_a_sentence() -> None:
    shares = {0: 0.7, 3: 0.3}
    with pytest.raises(SimsError, match=r"attribute 3 was not seen in 100,000 images and 30 are needed; give it no sh"):
        candidates_needed({0: 100_000}, 100_000, shares, 100)
    assert candidates_needed({0: 99_000}, 99_000, shares, 100) == 1000
    with pytest.raises(SimsError, match="attribute 3 was not seen in 50 images"):
        candidates_needed({0: 50}, 50, shares, 100, patience_nimg=50)


def test_an_attribute_that_a_small_set_does_not_need_is_not_waited_for() -> None:
    assert candidates_needed({0: 100_000}, 100_000, {0: 0.9, 3: 0.1}, 3) == 0


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({}, "add up to 0; make them add up to 1"),
        ({0: 0.7, 1: 0.2}, r"add up to 0\.9; make them add up to 1"),
        ({0: 1.5, 1: -0.5}, r"attribute 1 has the share -0\.5; give shares from 0 to 1"),
        ({0: float("nan"), 1: 1.0}, "attribute 0 has the share nan"),
    ],
)
def test_shares_that_are_none_are_refused(shares: dict[int, float], sentence: str) -> None:
    with pytest.raises(SimsError, match=sentence):
        slots(shares, 0, 10)


def test_shares_may_miss_one_by_their_rounding() -> None:
    assert slots(dict.fromkeys(range(3), 0.3333333), 0, 6).tolist() == [0, 1, 2, 0, 1, 2]


def test_the_answer_cannot_spoil_the_next_one() -> None:
    answer = slots({0: 0.7, 1: 0.3}, 0, 10)
    with pytest.raises(ValueError, match="read-only"):
        answer[0] = 5
