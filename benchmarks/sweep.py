"""What a search over (omega, B, n_s) finds and spends, against every cell of the grid, on the digits, in one run.

    python -m benchmarks.sweep --out runs/sweep

First `tune.search=optuna` with `tune.stop_early=true` chooses a cell of 63. Then every cell is measured in full, on
the selection seeds, as the grid would, and on the report seeds, where the best of all cells is known that way. An
evaluation is one pass of a network over one image; an image that is trained on counts as one. Run it again to go on.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sims_ray.config import Recipe, load_recipe
from sims_ray.metrics.spread import Spread
from sims_ray.stages.cells import Cell
from sims_ray.stages.cluster import stop_ray
from sims_ray.stages.evaluate import Evaluation, evaluate
from sims_ray.storage.models import SimsModel
from sims_ray.studies.console import align
from sims_ray.studies.passes import passes
from sims_ray.studies.plan import Plan
from sims_ray.studies.sims import SimsRun

KIMG = 1000
GRID = (
    "tune.omega=[0.5,1,1.5,2,2.5,3,4]",
    "tune.w=[]",
    "finetune.budgets_kimg=[10,20,40]",
    "tune.n_s=[1000,3000,6000]",
    "tune.n_images=1000",
    "tune.fidelities=[200,500,1000]",
    "tune.measures=[]",
    "evaluate.n_images=1000",
    "evaluate.measures=[]",
    "sampler.num_steps=8",
)
SEARCH = ("tune.search=optuna", "tune.stop_early=true")
MOST_FROM_SCRATCH, MOST_WITH_SHARING = 0.2, 0.5


@dataclass(frozen=True)
class Costs:
    """Network evaluations of the search and of the grid.

    Attributes:
        shared: the largest S and a fine-tuning for each n_s, made once.
        search: all that the search spends: `shared`, the base, and its trials as far as they went.
        grid: `shared`, the base and every cell in full.
        scratch: every cell in full with an S and a fine-tuning of its own, and the base.
    """

    shared: float
    search: float
    grid: float
    scratch: float

    @classmethod
    def of(cls, plan: Plan, cells: Sequence[Cell], trials: Iterable[Mapping[str, float]]) -> Costs:
        """Count them; `trials` are those that the search made, with `nimg` and `nfe`."""
        recipe, n = plan.recipe, plan.recipe.tune.n_images
        base_nfe = passes(plan.sampler, SimsModel("")).nfe

        def made(n_s: int, budget_kimg: float) -> float:
            return n_s * base_nfe + budget_kimg * KIMG

        sizes, budget = recipe.tune.n_s, max(recipe.finetune.budgets_kimg)
        shared = max(sizes) * base_nfe + len(sizes) * budget * KIMG
        sampled = {cell: n * passes(plan.sampler_of(cell), plan.model(cell)).nfe for cell in cells}
        own = sum(made(cell.n_s or 0, cell.budget_kimg or 0) for cell in cells)
        return cls(
            shared=shared,
            search=shared + sum(trial["nimg"] * trial["nfe"] for trial in trials),
            grid=shared + n * base_nfe + sum(sampled.values()),
            scratch=n * base_nfe + sum(sampled.values()) + own,
        )


def recipe(*overrides: str) -> Recipe:
    """The digits with the grid of this benchmark."""
    return load_recipe("digits", [*GRID, *overrides])


def measure(run: SimsRun, evaluations: Mapping[Cell, Sequence[Evaluation]]) -> dict[Cell, list[float]]:
    """The distances of each cell."""
    evaluate([e for some in evaluations.values() for e in some], run.recipe.compute, "every cell")
    return {cell: [float(e.artifact.result["distance"]) for e in some] for cell, some in evaluations.items()}


def main() -> None:
    """Search, measure every cell, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--set", action="append", default=[], help="further settings, as in `sims tune`")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        run = SimsRun(recipe(*SEARCH, *options.set), options.out)
        outcome = run.tune()
        run.pause()
        plan, choice = run.plan, Cell.of(outcome["selected"])
        stops = run.recipe.tune.stops  # the parts that the search left are of use
        cells = [trial.cell for trial in plan.sweep.trials if trial.cell != Cell()]
        selection = measure(run, {cell: [plan.evaluation(plan.seeds["selection"], cell, stops)] for cell in cells})
        blocks = [plan.evaluation(block, Cell()) for block in plan.report_blocks]
        everything = {cell: [plan.evaluation(block, cell) for block in plan.report_blocks] for cell in cells}
        report = measure(run, {Cell(): blocks, **everything})
    finally:
        stop_ray()
    grid_choice = min(selection, key=lambda cell: selection[cell][0])
    best = min(cells, key=lambda cell: float(np.mean(report[cell])))
    rows: list[tuple[str, ...]] = [
        ("model", "cell", "report seeds", "standard error", "above the best", "its standard error", "rank")
    ]
    order = sorted(cells, key=lambda cell: float(np.mean(report[cell])))
    named = {"base": Cell(), "best of all on report seeds": best, "the grid's choice": grid_choice}
    for name, cell in {**named, "the search's choice": choice}.items():
        spread, apart = Spread.of(report[cell]), Spread.of(np.subtract(report[cell], report[best]).tolist())
        rank = f"{order.index(cell) + 1} of {len(order)}" if cell in order else ""
        figures = (spread.mean, spread.standard_error, apart.mean, apart.standard_error)
        rows.append((name, cell.name, *("-" if figure is None else f"{figure:.3f}" for figure in figures), rank))
    print(align(rows))
    error = Spread.of(report[best]).standard_error or math.nan  # of one block
    behind = float(np.mean(report[choice]) - np.mean(report[best]))
    print(f"the search's choice is {behind / error:.2f} standard errors of the best above it (at most 1)")
    costs = Costs.of(plan, cells, outcome["trials"])
    stopped = sum(trial["stopped"] for trial in outcome["trials"])
    print(f"{len(outcome['trials'])} trials of {len(cells) + 1}, {stopped} of them stopped early")
    table = [("network evaluations", "in all", "the search's share", "at most")]
    table.append(("search, S and fine-tunings among them", f"{costs.search:,.0f}", "", ""))
    for name, spent, most in (
        ("grid, S and fine-tunings shared", costs.grid, MOST_WITH_SHARING),
        ("grid, each cell from scratch", costs.scratch, MOST_FROM_SCRATCH),
    ):
        table.append((name, f"{spent:,.0f}", f"{costs.search / spent:.3f}", f"{most:g}"))
    print(align(table))


if __name__ == "__main__":
    main()
