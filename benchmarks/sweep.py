"""What searches over (omega, B, n_s) find and spend, against every cell of the grid, on the digits, in one run.

    python -m benchmarks.sweep --out runs/sweep --searches 5

First `tune.search=optuna` with `tune.stop_early=true` chooses a cell of 63, once for each seed of the search; each
search measures its cells itself. Then every cell is measured in full, on the selection seeds, as the grid would, and
on the report seeds, where the best of all cells is known that way. An evaluation is one pass of a network over one
image; an image that is trained on counts as one. Run it again to go on.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
ARTIFACTS = "artifacts"  # the folder of a run that holds what was made
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


@dataclass(frozen=True)
class Search:
    """A search that is done, in a folder of its own.

    Attributes:
        run: the run it was part of.
        outcome: its trials and its choice, as `SimsRun.tune` returns them.
    """

    run: SimsRun
    outcome: Mapping[str, Any]

    @property
    def choice(self) -> Cell:
        """The cell it chose."""
        return Cell.of(self.outcome["selected"])


def search(seed: int, out: Path, overrides: Sequence[str], made: Path | None) -> Search:
    """Search with a seed; `made` is the folder of a run whose S, networks and features are taken as they are."""
    if made is not None and not out.exists():
        beside = out.with_name(f"{out.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        own = shutil.ignore_patterns("evaluate-*", "tune-*")  # each search measures for itself
        shutil.copytree(made / ARTIFACTS, beside / ARTIFACTS, ignore=own, copy_function=os.link)
        beside.rename(out)
    run = SimsRun(recipe(*SEARCH, f"tune.seed={seed}", *overrides), out)
    outcome = run.tune()
    run.pause()
    return Search(run, outcome)


def measure(run: SimsRun, evaluations: Mapping[Cell, Sequence[Evaluation]]) -> dict[Cell, list[float]]:
    """The distances of each cell."""
    evaluate([e for some in evaluations.values() for e in some], run.recipe.compute, "every cell")
    return {cell: [float(e.artifact.result["distance"]) for e in some] for cell, some in evaluations.items()}


def main() -> None:
    """Search, measure every cell, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--searches", type=int, default=5, help="searches, each with a seed of its own")
    parser.add_argument("--set", action="append", default=[], help="further settings, as in `sims tune`")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        folders = [options.out / f"search-{seed}" for seed in range(options.searches)]
        searches = [
            search(seed, folder, options.set, folders[0] if seed else None) for seed, folder in enumerate(folders)
        ]
        run, plan = searches[0].run, searches[0].run.plan
        stops = run.recipe.tune.stops  # the parts that the search left are of use
        cells = [trial.cell for trial in plan.sweep.trials if trial.cell != Cell()]
        selection = measure(run, {cell: [plan.evaluation(plan.seeds["selection"], cell, stops)] for cell in cells})
        everything = {cell: [plan.evaluation(block, cell) for block in plan.report_blocks] for cell in [Cell(), *cells]}
        report = measure(run, everything)
    finally:
        stop_ray()
    grid_choice = min(selection, key=lambda cell: selection[cell][0])
    print(align(quality_rows(report, grid_choice, searches)))
    print(align(cost_rows(plan, cells, searches)))


def quality_rows(
    report: Mapping[Cell, Sequence[float]], grid_choice: Cell, searches: Sequence[Search]
) -> list[tuple[str, ...]]:
    """The distances on report seeds of what was chosen, against the best of all cells there."""
    order = sorted((cell for cell in report if cell != Cell()), key=lambda cell: float(np.mean(report[cell])))
    best = order[0]
    unit = Spread.of(report[best]).standard_error or math.nan  # of one block
    named = {"base": Cell(), "best of all on report seeds": best, "the grid's choice": grid_choice}
    named |= {f"choice of search {seed}": one.choice for seed, one in enumerate(searches)}
    rows: list[tuple[str, ...]] = [
        ("model", "cell", "report seeds", "standard error", "above the best", "its standard error", "in errors", "rank")
    ]
    for name, cell in named.items():
        spread, apart = Spread.of(report[cell]), Spread.of(np.subtract(report[cell], report[best]).tolist())
        rank = f"{order.index(cell) + 1} of {len(order)}" if cell in order else ""
        figures = (spread.mean, spread.standard_error, apart.mean, apart.standard_error)
        shown = ("-" if figure is None else f"{figure:.3f}" for figure in figures)
        rows.append((name, cell.name, *shown, f"{apart.mean / unit:.2f}", rank))
    return rows


def cost_rows(plan: Plan, cells: Sequence[Cell], searches: Sequence[Search]) -> list[tuple[str, ...]]:
    """Network evaluations of each search, S and fine-tunings among them, and its shares of the grid's."""
    rows: list[tuple[str, ...]] = [
        ("", "trials", "stopped early", "evaluations", "of the shared grid's", "of the grid's from scratch")
    ]
    costs = [Costs.of(plan, cells, one.outcome["trials"]) for one in searches]
    for seed, (one, cost) in enumerate(zip(searches, costs, strict=True)):
        trials = one.outcome["trials"]
        stopped = sum(trial["stopped"] for trial in trials)
        shares = (f"{cost.search / cost.grid:.3f}", f"{cost.search / cost.scratch:.3f}")
        rows.append((f"search {seed}", str(len(trials)), str(stopped), f"{cost.search:,.0f}", *shares))
    whole = str(len(cells) + 1)
    rows.append(("grid, S and fine-tunings shared", whole, "0", f"{costs[0].grid:,.0f}", "1", ""))
    rows.append(("grid, each cell from scratch", whole, "0", f"{costs[0].scratch:,.0f}", "", "1"))
    rows.append(("at most", "", "", "", f"{MOST_WITH_SHARING:g}", f"{MOST_FROM_SCRATCH:g}"))
    return rows


if __name__ == "__main__":
    main()
