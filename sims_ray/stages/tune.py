"""The tune stage: Ray Tune over the cells of a sweep, one evaluation artifact per trial, the best ones chosen.

What a trial came to is noted in the sweep's folder, and no trial that has a note is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sims_ray.config import ComputeSettings, TuneSettings
from sims_ray.config.search import GRID
from sims_ray.errors import SimsError
from sims_ray.stages.cells import Cell, Lattice, Trial
from sims_ray.stages.cluster import ray_folder, start_ray
from sims_ray.stages.evaluate import MomentsWorker, Point, evaluate, evaluate_here, spent
from sims_ray.stages.progress import Progress
from sims_ray.stages.search import OBJECTIVE, lattice_search, trials_left
from sims_ray.storage.artifacts import FINGERPRINT_CHARS, Artifact, write_json
from sims_ray.storage.models import SCORE, Space

Outcome = dict[str, Any]
OnTrial = Callable[[Trial, Outcome], None]
BASE = Cell()


@dataclass(frozen=True)
class Sweep:
    """What is searched, and where the outcome lands.

    Attributes:
        artifact: the sweep.
        trials: every cell that can be measured, each once, the base among them.
        lattices: the cells of SIMS and of Neon as a search algorithm sees them.
        settings: of the search.
    """

    artifact: Artifact
    trials: tuple[Trial, ...]
    lattices: Mapping[Space, Lattice]
    settings: TuneSettings

    @property
    def base(self) -> Trial:
        """The trial of the base."""
        return next(trial for trial in self.trials if trial.cell == BASE)

    @property
    def outcomes(self) -> dict[Cell, Outcome]:
        """What the trials that were run came to, also of an unfinished sweep."""
        notes = {trial.cell: self.note(trial) for trial in self.trials}
        return {cell: json.loads(path.read_text()) for cell, path in notes.items() if path.is_file()}

    def note(self, trial: Trial) -> Path:
        """The file that says what a trial came to."""
        return self.artifact.path / f"trial-{trial.evaluation.artifact.fingerprint[:FINGERPRINT_CHARS]}.json"

    def most_trials(self) -> int:
        """How many trials there will be at most, the base among them."""
        if self.settings.search == GRID:
            return len(self.trials)
        return 1 + sum(trials_left(self.settings, lattice, {}) for lattice in self.lattices.values())


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
            _run_on_tune(sweep, open_trials, None, compute, finished)
        else:
            worker = MomentsWorker(compute)
            for trial in open_trials:
                evaluate_here(trial.evaluation, worker)
                finished(trial)
    else:
        for lattice in sweep.lattices.values():
            _run_on_tune(sweep, sweep.trials, lattice, compute, finished)
    artifact.commit({}, chosen(sweep, outcomes))


def outcome_of(trial: Trial) -> Outcome:
    """What a trial came to: its last distance, the ones on the way, and what was spent on it."""
    evaluation = trial.evaluation
    curve, stopped = evaluation.curve, not evaluation.artifact.complete
    last = {"metric": evaluation.metric_at(int(curve[-1]["nimg"])), "distance": curve[-1]["distance"]}
    found = {**trial.cell.params, **last, **spent(evaluation), "curve": curve, "stopped": stopped}
    measures = {} if stopped else evaluation.artifact.result.get("measures", {})
    return {**found, "measures": measures} if measures else found


def chosen(sweep: Sweep, outcomes: Mapping[Cell, Outcome]) -> dict[str, Any]:
    """The outcome of a sweep: all trials, and of each space the best guided cell that was measured in full.

    Raises:
        SimsError: a space has none.
    """
    trials = [outcomes[trial.cell] for trial in sweep.trials if trial.cell in outcomes]
    best = {}
    for space in sweep.lattices:
        whole = [
            outcome
            for cell, outcome in outcomes.items()
            if cell.space == space and cell.omega > 0 and not outcome["stopped"]
        ]
        if not whole:
            raise SimsError(
                f"no guided trial of the {space} space was measured in full; raise tune.num_trials, or set "
                f"tune.stop_early=false"
            )
        best[space] = min(whole, key=lambda outcome: outcome["distance"])
    return {"trials": trials, "selected": best[SCORE], "best": best}


def _run_on_tune(
    sweep: Sweep,
    trials: Sequence[Trial],
    lattice: Lattice | None,
    compute: ComputeSettings,
    finished: Callable[[Trial], None],
) -> None:
    """Run all of the trials, or those that the search over a lattice asks for."""
    start_ray(compute)
    from ray import tune as ray_tune
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    settings, base = sweep.settings, {point["nimg"]: point["distance"] for point in sweep.base.evaluation.curve}
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(_run_trial, trials=list(trials), base=base, compute=compute),
        {"cpu": compute.cpus_per_worker, "gpu": compute.gpus_per_worker},
    )
    search: dict[str, Any] = {}
    space: dict[str, Any] = {"trial": ray_tune.grid_search(list(range(len(trials))))}
    if lattice is not None:
        outcomes = {cell: outcome for cell, outcome in sweep.outcomes.items() if outcome["nimg"] in base}
        known = {cell: outcome["distance"] / base[outcome["nimg"]] for cell, outcome in outcomes.items()}
        left = trials_left(settings, lattice, known)
        if left <= 0:
            return
        searcher = lattice_search(lattice, [trial.cell for trial in trials], known, settings)
        search, space = {"search_alg": searcher, "num_samples": left}, {}
    scheduler = FIFOScheduler()
    if settings.stop_early:
        scheduler = AsyncHyperBandScheduler(
            time_attr="nimg",
            max_t=settings.n_images,
            grace_period=settings.stops[0],
            reduction_factor=settings.reduction_factor,
        )
    callback = _callback(trials, finished)
    with ray_folder(sweep.artifact.path) as folder:
        tuner = ray_tune.Tuner(
            trainable,
            param_space=space,
            tune_config=ray_tune.TuneConfig(
                metric=OBJECTIVE,
                mode="min",
                scheduler=scheduler,
                max_concurrent_trials=compute.num_workers,
                reuse_actors=True,
                **search,
            ),
            run_config=ray_tune.RunConfig(
                **folder,
                failure_config=ray_tune.FailureConfig(max_failures=compute.max_failures),
                callbacks=[callback],
                verbose=0,
            ),
        )
        results = tuner.fit()
    if callback.lost is not None:
        raise callback.lost
    if failed := results.errors:
        reason = str(failed[0]).strip().splitlines()[-1]
        raise SimsError(f"{len(failed)} of {len(results)} trials failed (the first: {reason}); run again to go on")


def _run_trial(
    config: dict[str, Any], trials: Sequence[Trial], base: Mapping[float, float], compute: ComputeSettings
) -> None:
    """Body of one Ray Tune trial: its actor is the sampling actor."""
    from ray import tune as ray_tune

    def report(point: Point) -> None:
        if point["nimg"] in base:  # which may have been measured for another sweep, without what lies on the way
            ray_tune.report({**point, OBJECTIVE: point["distance"] / base[point["nimg"]]})

    evaluate_here(trials[config["trial"]].evaluation, _worker(compute), report)


@lru_cache(maxsize=1)
def _worker(compute: ComputeSettings) -> MomentsWorker:
    return MomentsWorker(compute)


def _callback(trials: Sequence[Trial], finished: Callable[[Trial], None]) -> Any:
    from ray.tune import Callback

    class Finished(Callback):  # type: ignore[misc]
        """Tells the driver about each trial that ended well; Tune would only log what goes wrong with that."""

        lost: Exception | None = None

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            """Called by Tune in the driver."""
            try:
                finished(by_index[trial.config["trial"]])
            except Exception as error:
                self.lost = self.lost or error

    by_index = dict(enumerate(trials))
    return Finished()
