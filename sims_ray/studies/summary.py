"""The outcome of a run as plain values: what the report shows and the terminal prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.data.table import SampleTable
from sims_ray.studies.plan import Plan

RESULT = "result.json"


def summarise(plan: Plan, selected: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the report shows, as JSON values; `selected` is the cell that the sweep chose."""
    losses = {"base": plan.base_job.log_rows()} if plan.base_job else {}
    for n_s in plan.recipe.tune.n_s:
        losses[f"auxiliary n_s={n_s}"] = plan.finetune_job(n_s).log_rows()
    return {
        "name": plan.recipe.name,
        "metric": plan.report_evaluations(selected)["base"][0].metric,
        "n_images": plan.recipe.evaluate.n_images,
        "blocks": plan.recipe.evaluate.blocks,
        "num_real": len(SampleTable(plan.inputs.table)),
        "table": result_rows(plan, selected),
        "selected": dict(selected),
        "models": models(plan, selected),
        "trials": plan.sweep.result["trials"],
        "losses": losses,
        "settings": plan.recipe.model_dump(
            mode="json", exclude={"tracking": True, "compute": True, "data": {"reading"}}
        ),
        "versions": plan.sweep.manifest["versions"],
        "seeds": {use: [seeds.start, seeds.stop] for use, seeds in plan.seeds.items()},
    }


def models(plan: Plan, selected: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The compared models as checkpoints, paths relative to the output folder, and omega."""
    folder, found = plan.out, {}
    for name, cell in plan.compared(selected).items():
        model = plan.model(*cell)
        base, aux = (path and str(Path(path).relative_to(folder)) for path in (model.base, model.aux))
        interval = {"sigma_lo": model.sigma_lo, "sigma_hi": model.sigma_hi}
        found[name] = {"base": base, "aux": aux, "omega": model.omega, **interval}
    return found


def result_rows(plan: Plan, selected: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Base, auxiliary and SIMS on the report seeds: mean distance over the blocks, its spread, the gain."""
    cells, rows, base = plan.compared(selected), [], float("nan")
    for name, evaluations in plan.report_evaluations(selected).items():
        omega, budget, n_s = cells[name]
        blocks = [e.artifact.result["distance"] for e in evaluations]
        distance = float(np.mean(blocks))
        base = distance if name == "base" else base
        rows.append(
            {
                "model": name,
                "omega": omega,
                "budget_kimg": budget,
                "n_s": n_s,
                "distance": distance,
                "spread": float(np.std(blocks, ddof=1)) if len(blocks) > 1 else 0.0,
                "blocks": blocks,
                "n_images": len(evaluations[0].seeds),
                "evaluations_per_image": evaluations[0].artifact.result["nfe"],
                "gain": 1 - distance / base,
            }
        )
    return rows
