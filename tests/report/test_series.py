"""Laws of the plots' lines, maps and fronts."""

import math

import pytest

from sims_ray.report.chart import log_ticks, needs_log
from sims_ray.report.costs import FRONT, cost_series, front_line
from sims_ray.report.maps import heat_maps
from sims_ray.report.panels import best_trials
from sims_ray.report.series import base_distance, curve_series, omega_series, precision_series, stopped_points
from tests.report.summaries import BASE, METRIC, full_summary, plain_summary, trial


def test_one_line_per_set_and_budget_each_through_the_base_point_in_order_of_omega() -> None:
    lines = omega_series(plain_summary()["trials"][::-1])
    assert len(lines) == 6 == len({line.label for line in lines}) == len({(li.color, li.dash) for li in lines})
    for line in lines:
        assert line.x == (-1.0, 0.0, 1.0, 2.0)
        assert line.y[1] == BASE


def test_neon_has_lines_of_its_own_that_share_base_and_auxiliary() -> None:
    lines = omega_series(full_summary()["trials"])
    assert len(lines) == 12 == len({line.label for line in lines})
    neon = [line for line in lines if line.label.startswith("Neon")]
    assert len(neon) == 6
    assert all(line.x[:2] == (-1.0, 0.0) for line in neon)


def test_stopped_trials_are_on_no_line_and_in_no_map_and_on_no_front() -> None:
    trials, best = full_summary()["trials"], best_trials(full_summary())
    assert all(3.0 not in line.x for line in omega_series(trials))
    (points,) = stopped_points(trials)
    assert set(points.x) == {3.0}
    assert all("200 images, stopped early" in note for note in points.notes)
    for one in heat_maps(trials, best, METRIC):
        assert all(math.isnan(cells[one.x.index("3")]) for cells in one.z)
        assert len(one.stopped) == 3
    flattering = [{**t, "distance": 0.1} if t["stopped"] else t for t in trials]
    assert min(cost_series(flattering, "nfe")[-1].y) > 1


def test_steps_and_intervals_make_lines_with_the_base_of_the_same_steps() -> None:
    trials = [trial(0, None, None, 9.0), trial(0, None, None, 8.0, num_steps=4), trial(1, 20.0, 10, 5.0)]
    trials += [trial(1, 20.0, 10, 4.0, num_steps=4), trial(1, 20.0, 10, 3.0, num_steps=4, sigma_lo=0.1, sigma_hi=2.0)]
    assert sorted(line.y for line in omega_series(trials)) == [(8.0, 3.0), (8.0, 4.0), (9.0, 5.0)]
    assert base_distance(trials, 4) == 8.0
    (one,) = heat_maps(trials, {}, METRIC)
    assert one.z == ((8.0, 3.0),)


def test_sweep_without_omega_zero_has_no_base_line() -> None:
    trials = plain_summary()["trials"][1:]
    assert base_distance(trials) is None
    assert all(0.0 not in line.x for line in omega_series(trials))


def test_map_has_each_distance_at_its_budget_and_strength_and_rings_the_chosen_one() -> None:
    summary = full_summary()
    maps = heat_maps(summary["trials"], best_trials(summary), METRIC)
    assert len(maps) == 4
    ringed = maps[0]
    assert ringed.chosen is not None
    i, j = ringed.chosen
    assert ringed.z[j][i] == summary["selected"]["distance"]
    assert (ringed.x[i], ringed.y[j]) == ("1", "20")


def test_front_is_the_points_that_nothing_dominates() -> None:
    points = [(1.0, 9.0), (2.0, 9.5), (2.0, 5.0), (3.0, 5.0), (4.0, 1.0), (5.0, math.nan), (4.0, 2.0)]
    (front,) = front_line(points)
    assert list(zip(front.x, front.y, strict=True)) == [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]
    assert front_line(points[:2]) == []


def test_costs_are_of_each_trial() -> None:
    lines = cost_series(full_summary()["trials"], "worker_s")
    assert [line.label for line in lines][:4] == ["base", "auxiliary", "SIMS", "Neon"]
    assert lines[-1].label == FRONT
    whole = {(t["worker_s"], t["distance"]) for t in full_summary()["trials"] if not t["stopped"]}
    assert {(x, y) for line in lines[:4] for x, y in zip(line.x, line.y, strict=True)} == whole


def test_precision_follows_the_strengths_of_the_chosen_place() -> None:
    lines = precision_series(full_summary()["trials"], best_trials(full_summary()))
    assert len(lines) == 4
    assert lines[0].texts == ("ω=\u22121", "ω=0", "ω=0.5", "ω=1", "ω=1.5", "ω=2")
    assert lines[0].y[0] == pytest.approx(0.65)
    assert lines[0].x[0] == pytest.approx(0.6 + 1 / 15)
    assert (lines[1].x, lines[1].look) == ((lines[0].x[3],), "ring")


def test_each_curve_is_of_its_trial_and_ends_where_that_was_stopped() -> None:
    trials = full_summary()["trials"]
    lines = curve_series(trials, best_trials(full_summary()))
    curves = {tuple((p["nimg"], p["distance"]) for p in t["curve"]) for t in trials}
    assert {tuple(zip(line.x, line.y, strict=True)) for line in lines[:-1]} == curves
    assert set(lines[-1].x) == {200.0}
    labels = [line.label for line in lines if line.legend]
    assert len(labels) == len(set(labels))


def test_log_axis_is_chosen_beyond_a_decade_and_its_ticks_enclose_the_values() -> None:
    assert not needs_log([5, 45, math.nan])
    assert not needs_log([-1, 45])
    assert needs_log([4, 66])
    assert log_ticks([4, 66, math.nan]) == [2, 5, 10, 20, 50, 100]
    assert log_ticks([3, 2e6]) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7]
