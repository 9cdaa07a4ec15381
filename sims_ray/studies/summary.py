"""The outcome of a run as plain values: what the report shows and the terminal prints."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.data.table import SampleTable
from sims_ray.metrics.spread import Spread, paired_difference
from sims_ray.stages.cells import Cell
from sims_ray.storage.models import SCORE
from sims_ray.studies.plan import Plan
from sims_ray.studies.space import BASE

RESULT = "result.json"


def summarise(plan: Plan, best: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything the report shows, as JSON values; `best` has the best trial of each space."""
    losses = {"base": plan.base_job.log_rows()} if plan.base_job else {}
    for n_s in plan.recipe.tune.n_s:
        losses[f"auxiliary n_s={n_s}"] = plan.finetune_job(n_s).log_rows()
    return {
        "name": plan.recipe.name,
        "metric": plan.report_evaluations(best)["base"][0].metric,
        "n_images": plan.recipe.evaluate.n_images,
        "blocks": plan.recipe.evaluate.blocks,
        "num_real": len(SampleTable(plan.inputs.table)),
        "table": result_rows(plan, best),
        "selected": dict(best[SCORE]),
        "best": {space: dict(trial) for space, trial in best.items()},
        "models": models(plan, best),
        "trials": plan.sweep.artifact.result["trials"],
        "losses": losses,
        "settings": plan.recipe.model_dump(
            mode="json", exclude={"tracking": True, "compute": True, "data": {"reading"}}
        ),
        "versions": plan.sweep.artifact.manifest["versions"],
        "seeds": {use: [seeds.start, seeds.stop] for use, seeds in plan.seeds.items()},
    }


def models(plan: Plan, best: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The compared models as checkpoints, paths relative to the output folder, and omega."""
    folder, found = plan.out, {}
    for name, cell in plan.compared(best).items():
        model = plan.model(cell)
        base, aux = (path and str(Path(path).relative_to(folder)) for path in (model.base, model.aux))
        guidance = {"omega": model.omega, "sigma_lo": model.sigma_lo, "sigma_hi": model.sigma_hi, "space": model.space}
        steps = {} if cell.num_steps is None else {"num_steps": cell.num_steps}
        found[name] = {"base": base, "aux": aux, **guidance, **steps}
    return found


def result_rows(plan: Plan, best: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each compared model on the report seeds: mean distance over the blocks, its spread, the gain over the base."""
    cells, rows = plan.compared(best), []
    blocks = {name: [e.artifact.result for e in some] for name, some in plan.report_evaluations(best).items()}
    base = [result["distance"] for result in blocks[BASE]]
    for name, results in blocks.items():
        distances = [result["distance"] for result in results]
        spread = Spread.of(distances)
        measured = results[0].get("measures", {})
        rows.append(
            {
                "model": name,
                **cells[name].params,
                "distance": spread.mean,
                "spread": spread.standard_deviation or 0.0,
                "minimum": spread.minimum,
                "standard_error": spread.standard_error,
                "difference": None if name == BASE else asdict(paired_difference(distances, base)),
                "blocks": distances,
                "measures": {key: float(np.mean([r["measures"][key] for r in results])) for key in measured},
                "n_images": results[0]["nimg"],
                "evaluations_per_image": results[0]["nfe"],
                "gain": 1 - spread.mean / float(np.mean(base)),
                "gain_selection": selection_gain(plan, cells[name]),
            }
        )
    return rows


def selection_gain(plan: Plan, cell: Cell) -> float | None:
    """A cell's gain over the base on the seeds that it was chosen on; None where it was not measured there in full."""
    outcomes = plan.sweep.outcomes
    found = outcomes.get(cell)
    if found is None or found["stopped"] or cell == Cell():
        return None
    return float(1 - found["distance"] / outcomes[Cell()]["distance"])
