"""The search space of a recipe, and the models that its winners are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sims_ray.config import GuidanceSettings, Recipe, TuneSettings
from sims_ray.config.search import GRID
from sims_ray.stages.cells import Cell, Lattice
from sims_ray.storage.models import SCORE, WEIGHT, Space

SEARCH_CONTENT = {"num_trials", "unimodal", "seed"}
STOPPING_CONTENT = {"reduction_factor"}
BASE, AUXILIARY, SIMS, NEON = "base", "auxiliary", "SIMS", "Neon"
AS_MANY_EVALUATIONS, AS_MUCH_TRAINING = "base, matched evaluations", "base, matched training"


def guided_cell(interval: GuidanceSettings, *, omega: float, num_steps: int | None = None, **where: Any) -> Cell:
    """A cell at some strength: at 0 the base, at -1 the auxiliary, which are not guided."""
    if omega == 0:
        return Cell(num_steps=num_steps)
    if omega == -1:
        where.pop("space", None)
        return Cell(omega, num_steps=num_steps, **where)
    return Cell(omega, num_steps=num_steps, sigma_lo=interval.sigma_lo, sigma_hi=interval.sigma_hi, **where)


def sweep_lattices(recipe: Recipe) -> dict[Space, Lattice]:
    """What is searched: for SIMS, and for Neon where it is asked for, every combination of the listed values."""
    tune = recipe.tune
    strengths: dict[Space, tuple[float, ...]] = {SCORE: tune.omega}
    if tune.w:
        strengths[WEIGHT] = tune.w
    axes: dict[str, Any] = {"n_s": sorted(tune.n_s), "budget_kimg": recipe.finetune.budgets_kimg}
    if tune.num_steps:
        axes["num_steps"] = sorted(tune.num_steps)

    def lattice(space: Space) -> Lattice:
        intervals = (tune.intervals or (recipe.guidance,)) if space == SCORE else (GuidanceSettings(),)
        more = {"interval": intervals} if len(intervals) > 1 else {}

        def make(interval: GuidanceSettings = intervals[0], num_steps: int | None = None, **where: Any) -> Cell:
            steps = None if num_steps == recipe.sampler.num_steps else num_steps
            return guided_cell(interval, space=space, num_steps=steps, **where)

        return Lattice({**axes, **more, "omega": sorted(strengths[space])}, make)

    return {space: lattice(space) for space in strengths}


def search_content(settings: TuneSettings) -> dict[str, Any]:
    """The settings of the search that its outcome depends on beside the cells."""
    content: dict[str, Any] = {}
    plain = settings.model_dump(mode="json")
    if settings.search != GRID:
        content = {"search": settings.search, **{name: plain[name] for name in SEARCH_CONTENT}}
    if settings.stop_early:
        content |= {"fidelities": settings.stops, **{name: plain[name] for name in STOPPING_CONTENT}}
    return content


def compared_cells(recipe: Recipe, best: Mapping[str, Cell]) -> dict[str, Cell]:
    """The models of the final table by name: the winners, their auxiliary, and the base.

    The base is also sampled in as many evaluations as SIMS takes or one more, by more solver steps, and trained on for
    as many real images as the auxiliary saw synthetic ones.
    """
    sims = best[SCORE]
    found = {BASE: Cell(num_steps=sims.num_steps)}
    if recipe.evaluate.matched:
        steps = sims.num_steps or recipe.sampler.num_steps
        found[AS_MANY_EVALUATIONS] = Cell(num_steps=2 * steps)
        found[AS_MUCH_TRAINING] = Cell(num_steps=sims.num_steps, extra_kimg=sims.budget_kimg)
    found[AUXILIARY] = Cell(-1.0, sims.budget_kimg, sims.n_s, num_steps=sims.num_steps)
    found[SIMS] = sims
    if WEIGHT in best:
        found[NEON] = best[WEIGHT]
    return found
