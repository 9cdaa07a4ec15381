"""What a run says on the terminal: the stages and which exist, the final table, where things lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sims_ray.studies.plan import Plan


def stages_overview(plan: Plan) -> str:
    """One line per stage: what it makes, whether it is complete, and where it lies."""
    rows = [("import", plan.inputs.digits.complete if plan.inputs.digits else True, str(plan.inputs.table))]
    artifacts = [
        ("features", plan.features),
        ("train base" if plan.base_job else "base", plan.base_artifact),
    ]
    rows += [(name, artifact.complete, str(artifact.path)) for name, artifact in artifacts]
    rows.append(("synthesize", plan.synthesis_job.complete, str(plan.synthesis_job.set.folder)))
    artifacts = [(f"finetune n_s={n_s}", plan.finetune_job(n_s).artifact) for n_s in plan.recipe.tune.n_s]
    rows += [(name, artifact.complete, str(artifact.path)) for name, artifact in artifacts]
    done = sum(trial.evaluation.artifact.complete for trial in plan.trials)
    rows.append((f"sweep, {done} of {len(plan.trials)} trials", plan.sweep.complete, str(plan.sweep.path)))
    if plan.sweep.complete:
        measured = plan.report_evaluations(plan.sweep.result["selected"])
        evaluations = [e.artifact.complete for blocks in measured.values() for e in blocks]
        rows.append((f"evaluate, {sum(evaluations)} of {len(evaluations)} blocks", all(evaluations), str(plan.out)))
    else:
        rows.append(("evaluate", False, "known after the sweep"))
    return align([(name, "complete" if complete else "to do", where) for name, complete, where in rows])


def result_table(summary: Mapping[str, Any]) -> str:
    """Base, auxiliary and SIMS: distance, images, spread over the report blocks, gain over the base."""
    header = ("model", "omega", "B (kimg)", "n_s", summary["metric"], "spread", "images", "NFE/image", "gain")
    rows = [
        (
            row["model"],
            f"{row['omega']:g}",
            "-" if row["budget_kimg"] is None else f"{row['budget_kimg']:g}",
            "-" if row["n_s"] is None else str(row["n_s"]),
            f"{row['distance']:.3f}",
            f"{row['spread']:.3f}",
            f"{len(row['blocks'])} x {row['n_images']:,}",
            f"{row['evaluations_per_image']:g}",
            f"{row['gain']:+.1%}",
        )
        for row in summary["table"]
    ]
    note = (
        f"Distance: mean over {summary['blocks']} blocks of fresh seeds, lower is better; spread: standard deviation "
        "over the blocks. Neither the synthetic set nor the sweep used these seeds."
    )
    return f"{align([header, *rows])}\n{note}"


def closing_words(summary: Mapping[str, Any], out: Path, page: Path, tracking_uri: str) -> str:
    """The table, the report's path, and how to open the MLflow UI."""
    return "\n".join(
        [
            "",
            result_table(summary),
            "",
            f"report:    {page}",
            f"artifacts: {out / 'artifacts'}",
            f"MLflow UI: mlflow ui --backend-store-uri {tracking_uri}",
        ]
    )


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
