"""Laws of the search: each cell once, never beyond an enclosed minimum, and to the optimum in a third of the cells."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from sims_ray.config import TuneSettings
from sims_ray.errors import SimsError
from sims_ray.stages.cells import Cell, Lattice
from sims_ray.stages.search import OBJECTIVE, OpenPoints, lattice_search, ray_searcher, trials_left

OMEGAS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
BUDGETS, SIZES = (10.0, 20.0, 40.0), (1000, 4000)


def make(n_s: int, budget_kimg: float, omega: float) -> Cell:
    return Cell() if omega == 0 else Cell(omega, budget_kimg, n_s)


def lattice() -> Lattice:
    return Lattice({"n_s": SIZES, "budget_kimg": BUDGETS, "omega": OMEGAS}, make)


def settings(**changes: Any) -> TuneSettings:
    return TuneSettings(omega=OMEGAS, n_s=SIZES, search="optuna", **changes)


def distance(cell: Cell) -> float:
    """One minimum along omega, the farther out the shorter the fine-tuning, as small sets and budgets have it."""
    if cell == Cell():
        return 1.0
    assert cell.budget_kimg is not None and cell.n_s is not None
    best = 40 / cell.budget_kimg
    depth = 0.4 + 0.1 * (cell.budget_kimg == 20) + 0.05 * (cell.n_s == 4000)
    return 1 - depth + depth * ((cell.omega - best) / best) ** 2


def run(search: Any, cells: list[Cell], value: Any = distance, at_once: int = 2) -> Iterator[Cell]:
    """The cells that a search asks for, `at_once` of them running at any time."""
    running: list[tuple[str, Cell]] = []
    for number in itertools.count():
        told = search.suggest(f"trial{number}")
        if told == search.FINISHED:
            break
        running.append((f"trial{number}", cells[told["trial"]]))
        yield running[-1][1]
        if len(running) == at_once:
            name, cell = running.pop(0)
            search.on_trial_complete(name, {OBJECTIVE: value(cell), "training_iteration": 1})


def searched(**changes: Any) -> tuple[Lattice, list[Cell]]:
    grid = lattice()
    return grid, list(run(lattice_search(grid, grid.cells, {Cell(): 1.0}, settings(**changes)), grid.cells))


def test_the_base_is_one_cell_wherever_it_lies_on_the_lattice() -> None:
    grid = lattice()
    assert len(grid.points) == 2 * 3 * 10 and len(grid.cells) == 2 * 3 * 9 + 1


def test_a_search_finds_the_optimum_in_a_third_of_the_cells() -> None:
    for seed in range(3):
        grid, asked = searched(seed=seed)
        assert len(asked) <= -(-len(grid.cells) // 3)
        assert min(asked, key=distance) == min(grid.cells, key=distance)


def test_a_search_asks_for_no_cell_twice_nor_for_the_base_which_is_known() -> None:
    grid, asked = searched(num_trials=1000, unimodal=False)
    assert Cell() not in asked
    assert len(asked) == len(set(asked)) == len(grid.cells) - 1  # and comes to an end when there are no more


def test_a_search_tries_as_many_cells_as_it_is_told_to_those_of_earlier_processes_among_them() -> None:
    assert len(searched(num_trials=7)[1]) == 7
    grid, first = lattice(), searched(num_trials=5)[1]
    known = {Cell(): 1.0, **{cell: distance(cell) for cell in first}}
    assert trials_left(settings(num_trials=7), grid, known) == 2
    more = list(run(lattice_search(grid, grid.cells, known, settings(num_trials=7)), grid.cells))
    assert len(more) == 2 and not set(more) & set(first)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_out_is_never_the_minimum_of_a_line_with_one_minimum(seed: int) -> None:
    rng, grid = random.Random(seed), lattice()
    points = OpenPoints(grid, unimodal=True)
    points.tell(Cell(), distance(Cell()))
    while open_points := points.open():
        cell = points.start(rng.choice(open_points))
        points.tell(cell, distance(cell))
        for n_s, budget in itertools.product(SIZES, BUDGETS):
            line = [make(n_s, budget, omega) for omega in OMEGAS]
            best = min(line, key=distance)
            left = {grid.points[point] for point in points.open()} | set(points._known)
            assert best in left


def test_beyond_two_worse_strengths_nothing_is_open() -> None:
    grid = Lattice({"n_s": SIZES[:1], "budget_kimg": BUDGETS[:1], "omega": OMEGAS}, make)
    points = OpenPoints(grid, unimodal=True)
    for omega, value in ((0.0, 1.0), (2.0, 0.5), (4.0, 0.9)):
        points.tell(make(SIZES[0], BUDGETS[0], omega), value)
    assert [OMEGAS[point[-1]] for point in points.open()] == [0.5, 1.0, 1.5, 2.5, 3.0]


def test_a_point_that_is_taken_gives_way_to_its_neighbour_in_the_same_line() -> None:
    grid = lattice()
    points = OpenPoints(grid, unimodal=False)
    points.start((0, 1, 4))
    near = points.nearest((0, 1, 4))
    assert near is not None and near[:2] == (0, 1) and abs(near[2] - 4) == 1


def test_a_lost_measurement_is_open_again() -> None:
    grid = lattice()
    points = OpenPoints(grid, unimodal=False)
    cell = points.start((0, 0, 5))
    assert (0, 0, 5) not in points.open()
    points.free(cell)
    assert (0, 0, 5) in points.open()


def test_a_trial_that_fails_is_asked_for_again_by_who_goes_on() -> None:
    grid = lattice()
    search = lattice_search(grid, grid.cells, {Cell(): 1.0}, settings(num_trials=1000, unimodal=False))
    lost = grid.cells[search.suggest("lost")["trial"]]
    search.on_trial_complete("lost", None, error=True)
    assert lost in set(run(search, grid.cells))


def test_an_unknown_search_algorithm_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        SimsError, match=r"tune\.search=guess is no search algorithm; choose grid, optuna or .*hyperopt"
    ):
        ray_searcher(settings().model_copy(update={"search": "guess"}), lattice())


def test_a_search_algorithm_whose_package_is_missing_is_named() -> None:
    with pytest.raises(SimsError, match=r"tune\.search=zoopt needs a package that is not installed .*; install it"):
        ray_searcher(settings().model_copy(update={"search": "zoopt"}), lattice())
