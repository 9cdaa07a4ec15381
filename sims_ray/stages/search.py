"""Search algorithms over a lattice: which cell a sweep tries next.

A search algorithm of Ray Tune (Optuna's Gaussian process by default) proposes points. What it proposes twice is
answered from memory, and what cannot be the optimum, where the distance has one minimum along the strength, is
replaced by the nearest point that can.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

from sims_ray.config import TuneSettings
from sims_ray.config.search import OPTUNA
from sims_ray.errors import SimsError
from sims_ray.stages.cells import Cell, Lattice

OBJECTIVE = "relative"  # the distance over the base's at the same images, so that fidelities can be compared
TRIES = 5
Point = tuple[int, ...]


class OpenPoints:
    """Which points of a lattice are still worth a trial.

    Args:
        lattice: strength last.
        unimodal: along the strength the distance has one minimum, which known values enclose.
    """

    def __init__(self, lattice: Lattice, unimodal: bool) -> None:
        self._lattice, self._unimodal = lattice, unimodal
        self._known: dict[Cell, float] = {}
        self._running: set[Cell] = set()

    def tell(self, cell: Cell, value: float) -> None:
        """Note the value of a cell."""
        self._running.discard(cell)
        self._known[cell] = value

    def value(self, point: Point) -> float | None:
        """The known value at a point."""
        return self._known.get(self._lattice.points[point])

    def start(self, point: Point) -> Cell:
        """Note that the cell at a point is being measured."""
        cell = self._lattice.points[point]
        self._running.add(cell)
        return cell

    def free(self, cell: Cell) -> None:
        """Note that the measurement of a cell was lost."""
        self._running.discard(cell)

    def nearest(self, point: Point) -> Point | None:
        """The open point nearest to a given one, in its own line of strengths if that has one; None if none is open."""
        line = 1 + len(list(self._lattice.axes.values())[-1])  # farther than any two points of a line

        def distance(other: Point) -> int:
            *ours, strength = (abs(a - b) for a, b in zip(point, other, strict=True))
            return strength + line * sum(ours)

        return min(self.open(), key=lambda other: (distance(other), other), default=None)

    def open(self) -> list[Point]:
        """The points whose cells are neither known nor running nor beyond the enclosed minimum."""
        busy = self._known.keys() | self._running
        points = [point for point, cell in self._lattice.points.items() if cell not in busy]
        if not self._unimodal:
            return points
        bounds = {line: self._bounds(line) for line in {point[:-1] for point in points}}
        return [p for p in points if bounds[p[:-1]][0] < p[-1] < bounds[p[:-1]][1]]

    def _bounds(self, line: Point) -> tuple[float, float]:
        """The known strengths, as indices, on either side of the best known one of a line."""
        known = {p[-1]: value for p in self._lattice.points if p[:-1] == line and (value := self.value(p)) is not None}
        if not known:
            return float("-inf"), float("inf")
        best = min(known, key=lambda i: (known[i], i))
        below = [i for i in known if i < best]
        above = [i for i in known if i > best]
        return max(below, default=float("-inf")), min(above, default=float("inf"))


def ray_searcher(settings: TuneSettings, lattice: Lattice) -> Any:
    """The search algorithm that the settings name, over indices along the axes of a lattice.

    Raises:
        SimsError: Ray Tune has none of that name, or the package that it needs is not installed.
    """
    from ray.tune.search import SEARCH_ALG_IMPORT

    sizes = {name: len(values) for name, values in lattice.axes.items()}
    if settings.search == OPTUNA:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        space = {name: optuna.distributions.IntDistribution(0, size - 1) for name, size in sizes.items()}
        sampler = optuna.samplers.GPSampler(seed=settings.seed, deterministic_objective=True)
        return OptunaSearch(space=space, sampler=sampler, metric=OBJECTIVE, mode="min")
    known = sorted(set(SEARCH_ALG_IMPORT) - {None, "variant_generator", "random"})
    if settings.search not in known:
        raise SimsError(
            f"tune.search={settings.search} is no search algorithm; choose grid, optuna or one of Ray Tune's: "
            f"{', '.join(known)}"
        )
    from ray import tune as ray_tune

    try:
        searcher = SEARCH_ALG_IMPORT[settings.search]()(metric=OBJECTIVE, mode="min")
    except (ImportError, AssertionError) as error:
        raise SimsError(
            f"tune.search={settings.search} needs a package that is not installed "
            f"({' '.join(str(error).split())}); install it, or set tune.search=optuna"
        ) from None
    searcher.set_search_properties(OBJECTIVE, "min", {name: ray_tune.randint(0, n) for name, n in sizes.items()})
    return searcher


class Suggestions:
    """The cells that a search algorithm asks for, each at most once, until none is open or enough were tried.

    Args:
        inner: a searcher of Ray Tune over indices along the lattice's axes.
        lattice, known, settings: see `lattice_search`.
    """

    def __init__(self, inner: Any, lattice: Lattice, known: dict[Cell, float], settings: TuneSettings) -> None:
        self._inner, self._lattice, self._names = inner, lattice, list(lattice.axes)
        self._points = OpenPoints(lattice, settings.unimodal)
        self._left = trials_left(settings, lattice, known)
        self._running: dict[str, tuple[Cell, str | None]] = {}
        self._point_of = {cell: point for point, cell in reversed(list(lattice.points.items()))}
        for cell, value in known.items():
            if cell in self._point_of:
                self._inform(cell, value)

    def suggest(self, trial_id: str) -> Cell | None:
        """The cell of a new trial; None where there is no more to try."""
        if self._left <= 0:
            return None
        proposed, name = self._propose(trial_id)
        point = self._points.nearest(proposed)
        if point is None:
            return None
        if point != proposed and name is not None:
            self._inner.on_trial_complete(name, error=True)
            name = None
        self._left -= 1
        self._running[trial_id] = self._points.start(point), name
        return self._lattice.points[point]

    def complete(self, trial_id: str, result: Any, error: bool) -> None:
        """Note what a trial came to, or that it was lost."""
        cell, name = self._running.pop(trial_id)
        if error or not result:
            self._points.free(cell)
        elif name is None:
            self._inform(cell, float(result[OBJECTIVE]))
        else:
            self._points.tell(cell, float(result[OBJECTIVE]))
        if name is not None:
            self._inner.on_trial_complete(name, result, error)

    def _propose(self, trial_id: str) -> tuple[Point, str | None]:
        """A point that the algorithm proposes, and the name under which it waits for its value."""
        for attempt in range(TRIES):
            name = f"{trial_id}-{attempt}"
            values = self._inner.suggest(name)
            proposed = tuple(int(values[axis]) for axis in self._names)
            value = self._points.value(proposed)
            if value is None:
                return proposed, name
            self._inner.on_trial_complete(name, {OBJECTIVE: value, "training_iteration": 1})
        return proposed, None

    def _inform(self, cell: Cell, value: float) -> None:
        """Tell the algorithm the value of a cell that it did not ask for."""
        self._points.tell(cell, value)
        with suppress(NotImplementedError):  # some algorithms take none
            self._inner.add_evaluated_point(dict(zip(self._names, self._point_of[cell], strict=True)), value)


def lattice_search(lattice: Lattice, cells: list[Cell], known: dict[Cell, float], settings: TuneSettings) -> Any:
    """A Ray Tune searcher that gives trials `{"trial": index in cells}`, each cell once.

    Args:
        lattice: what is searched.
        cells: the cells by the index that a trial is told.
        known: values of cells that an earlier process measured.
        settings: of the search; `num_trials` counts the known ones, but not the base.
    """
    from ray.tune.search import Searcher

    suggestions = Suggestions(ray_searcher(settings, lattice), lattice, known, settings)

    class LatticeSearch(Searcher):  # type: ignore[misc]
        """Hands the suggestions to Ray Tune."""

        def __init__(self) -> None:
            super().__init__(metric=OBJECTIVE, mode="min")

        def suggest(self, trial_id: str) -> Any:
            """Called by Tune in the driver."""
            cell = suggestions.suggest(trial_id)
            return Searcher.FINISHED if cell is None else {"trial": cells.index(cell)}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """Called by Tune in the driver."""
            suggestions.complete(trial_id, result, error)

        def save(self, checkpoint_path: str) -> None:
            """What is known lies in the sweep's folder, where the next process finds it."""

        def restore(self, checkpoint_path: str) -> None:
            """See `save`."""

    return LatticeSearch()


def trials_left(settings: TuneSettings, lattice: Lattice, known: dict[Cell, float]) -> int:
    """Trials of a lattice that may still be made: a third of its cells unless the settings say how many."""
    wanted = settings.num_trials or -(-len(lattice.cells) // 3)
    return wanted - sum(cell in known and cell != Cell() for cell in lattice.cells)
