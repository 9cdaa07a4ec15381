"""What a run says on the terminal: the stages and which exist, the final table, where things lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sims_ray.stages.train_job import TrainJob, budget_name
from sims_ray.studies.plan import Plan

COMPLETE, TO_DO = "complete", "to do"


def stages_overview(plan: Plan) -> str:
    """One line per stage: what it makes, whether it is complete, and where it lies."""
    rows = [("import", _word(plan.inputs.digits.complete if plan.inputs.digits else True), str(plan.inputs.table))]
    rows.append(("features", _word(plan.features.complete), str(plan.features.path)))
    if plan.base_job:
        rows.append(_training("train base", plan.base_job))
    else:
        rows.append(("base", _word(plan.base_artifact.complete), str(plan.base_artifact.path)))
    rows.append(("synthesize", _word(plan.synthesis_job.complete), str(plan.synthesis_job.set.folder)))
    rows += [_training(f"finetune n_s={n_s}", plan.finetune_job(n_s)) for n_s in plan.recipe.tune.n_s]
    sweep = plan.sweep
    trials = f"sweep, {len(sweep.outcomes)} of {sweep.most_trials()} trials"
    rows.append((trials, _word(sweep.artifact.complete), str(sweep.artifact.path)))
    if sweep.artifact.complete:
        best = sweep.artifact.result["best"]
        for cell in plan.compared(best).values():
            if cell.extra_kimg is not None:
                rows.append(_training("train base longer", plan.longer_base_job(cell.extra_kimg)))
        measured = plan.report_evaluations(best)
        evaluations = [e.artifact.complete for blocks in measured.values() for e in blocks]
        name = f"evaluate, {sum(evaluations)} of {len(evaluations)} blocks"
        rows.append((name, _word(all(evaluations)), str(plan.out)))
    else:
        rows.append(("evaluate", TO_DO, "known after the sweep"))
    return align(rows)


def _word(complete: bool) -> str:
    return COMPLETE if complete else TO_DO


def _training(name: str, job: TrainJob) -> tuple[str, str, str]:
    """The row of a training: of one that is there in part, what is left to do."""
    missing = job.missing_kimg
    left = f": B={', '.join(map(budget_name, missing))} kimg" if job.artifact.complete else ""
    return name, f"{TO_DO}{left}" if missing else COMPLETE, str(job.artifact.path)


def result_table(summary: Mapping[str, Any]) -> str:
    """Base, auxiliary and SIMS: distance, images, spread over the report blocks, gain over the base."""
    where = ("model", "omega", "B (kimg)", "n_s")
    header = (*where, summary["metric"], "spread", "images", "NFE/image", "gain", "when selected")
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
            "-" if row["gain_selection"] is None else f"{row['gain_selection']:+.1%}",
        )
        for row in summary["table"]
    ]
    note = (
        f"Distance: mean over {summary['blocks']} blocks of fresh seeds, lower is better; spread: standard deviation "
        "over the blocks. Neither the synthetic set nor the sweep used these seeds; 'when selected' is the gain on the "
        "sweep's own, which is an optimist's. Neon's omega is its w."
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
