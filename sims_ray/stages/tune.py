"""The tune stage: Ray Tune over the cells of a sweep, one evaluation artifact per trial, the best ones chosen.

What a trial came to is noted in the sweep's folder, and no trial that has a note is run again.
"""

from __future__ import annotations

from collections.abc import Callable

from sims_ray.config import ComputeSettings
from sims_ray.config.search import GRID
from sims_ray.errors import SimsError
from sims_ray.stages.cells import Trial
from sims_ray.stages.evaluate import MomentsWorker, evaluate, evaluate_here
from sims_ray.stages.progress import Progress
from sims_ray.stages.sweep import BASE, Outcome, Sweep, chosen, outcome_of
from sims_ray.stages.tuner import run_trials
from sims_ray.storage.artifacts import write_json

OnTrial = Callable[[Trial, Outcome], None]


def tune(sweep: Sweep, compute: ComputeSettings, on_trial: OnTrial) -> None:
    """Measure the base, run the trials that the search asks for, choose the best cells, commit the sweep.

    `on_trial` is called in this process for every trial as soon as its outcome is there, old outcomes first.

    Raises:
        SimsError: a trial failed, there is no such search algorithm, or it needs Ray and there are no workers.
    """
    settings = sweep.settings
    for name, asked in (("search", settings.search != GRID), ("stop_early", settings.stop_early)):
        if asked and not compute.num_workers:
            raise SimsError(
                f"tune.{name}={getattr(settings, name)} runs on Ray Tune; set compute.num_workers to 1 or more"
            )
    artifact, outcomes = sweep.artifact, sweep.outcomes
    artifact.path.mkdir(parents=True, exist_ok=True)
    total, nimg = sweep.most_trials(), sweep.settings.n_images
    progress = Progress("sweep", total * nimg, len(outcomes) * nimg)

    def finished(trial: Trial) -> None:
        outcome = outcome_of(trial)
        write_json(sweep.note(trial), outcome)
        outcomes[trial.cell] = outcome
        stopped = f", stopped at {outcome['nimg']:,} images" if outcome["stopped"] else ""
        progress.add(nimg, f"{trial.name}: {outcome['metric']} {outcome['distance']:.3f}{stopped}", always=True)
        on_trial(trial, outcome)

    for trial in sweep.trials:
        if trial.cell in outcomes:
            on_trial(trial, outcomes[trial.cell])
    if BASE not in outcomes:
        evaluate([sweep.base.evaluation], compute, "base on the selection seeds")
        finished(sweep.base)
    if sweep.settings.search == GRID:
        open_trials = [trial for trial in sweep.trials if trial.cell not in outcomes]
        for trial in open_trials:
            if trial.evaluation.artifact.complete:
                finished(trial)
        open_trials = [trial for trial in open_trials if trial.cell not in outcomes]
        if compute.num_workers and open_trials:
            run_trials(sweep, open_trials, None, compute, finished)
        else:
            worker = MomentsWorker(compute)
            for trial in open_trials:
                evaluate_here(trial.evaluation, worker)
                finished(trial)
    else:
        for lattice in sweep.lattices.values():
            run_trials(sweep, sweep.trials, lattice, compute, finished)
    artifact.commit({}, chosen(sweep, outcomes))
