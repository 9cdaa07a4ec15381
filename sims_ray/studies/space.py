"""The search space of a recipe, and the models that its winners are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sims_ray.config import GuidanceSettings, Recipe, TuneSettings
from sims_ray.config.search import GRID
from sims_ray.stages.cells import Cell, Lattice
from sims_ray.storage.models import SCORE, WEIGHT, SimsModel, Space
from sims_ray.studies.passes import passes, steps_that_take

SEARCH_CONTENT = {"num_trials", "unimodal", "seed"}
STOPPING_CONTENT = {"reduction_factor"}
MORPH_STEPS = 4  # from the auxiliary to the base, and from there to the best strength
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

    The base is also sampled in as many evaluations as SIMS takes, by more solver steps and rounded up to a whole one,
    and trained on for as many real images as the auxiliary saw synthetic ones.
    """
    sims = best[SCORE]
    found = {BASE: Cell(num_steps=sims.num_steps)}
    if recipe.evaluate.matched:
        found[AS_MANY_EVALUATIONS] = Cell(num_steps=_as_many_evaluations(recipe, sims))
        found[AS_MUCH_TRAINING] = Cell(num_steps=sims.num_steps, extra_kimg=sims.budget_kimg)
    found[AUXILIARY] = Cell(-1.0, sims.budget_kimg, sims.n_s, num_steps=sims.num_steps)
    found[SIMS] = sims
    if WEIGHT in best:
        found[NEON] = best[WEIGHT]
    return found


def _as_many_evaluations(recipe: Recipe, sims: Cell) -> int:
    """Solver steps of the base that cost an image what `sims` costs it."""
    steps = sims.num_steps or recipe.sampler.num_steps
    sampler = {**recipe.sampler.model_dump(mode="json"), "num_steps": steps}
    model = SimsModel("", "", sims.omega, sims.sigma_lo, sims.sigma_hi)
    return steps_that_take(passes(sampler, model, recipe.finetune.trainable == "decoder").nfe, sampler)


def morph_strengths(best: float) -> list[float]:
    """Strengths from the auxiliary over the base and the best one to half as much again, for the page's slider."""
    before = [i / MORPH_STEPS - 1 for i in range(MORPH_STEPS)]
    return [*before, *(best * i / MORPH_STEPS for i in range(MORPH_STEPS * 3 // 2 + 1))]
