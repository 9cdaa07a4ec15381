"""Ray Tune as what runs the trials of a sweep: their actors, their early ends, and trials that are lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError
from sims_ray.stages.cells import Lattice, Trial
from sims_ray.stages.cluster import ray_folder, start_ray
from sims_ray.stages.evaluate import MomentsWorker, Point, evaluate_here
from sims_ray.stages.search import OBJECTIVE, lattice_search, trials_left
from sims_ray.stages.sweep import Sweep

logger = logging.getLogger("sims_ray")


def run_trials(
    sweep: Sweep,
    trials: Sequence[Trial],
    lattice: Lattice | None,
    compute: ComputeSettings,
    finished: Callable[[Trial], None],
) -> None:
    """Run all of the trials, or those that the search over a lattice asks for.

    Tune restarts a trial whose actor dies, but not one that was only about to start there; such a one gets another
    round.

    Raises:
        SimsError: a trial failed otherwise, or too often.
    """
    start_ray(compute)
    from ray.exceptions import RayActorError

    for rounds in count(1):
        open_trials = [trial for trial in trials if trial.cell not in sweep.outcomes] if lattice is None else trials
        failed = _run_round(sweep, open_trials, lattice, compute, finished)
        exhausted = 0 <= compute.max_failures < rounds
        if not failed:
            return
        if exhausted or not all(isinstance(error, RayActorError) for error in failed):
            reason = str(failed[0]).strip().splitlines()[-1]
            raise SimsError(f"{len(failed)} trials failed (the first: {reason}); run again to go on")
        logger.warning("sweep: %d trials lost their workers; they are run again", len(failed))


def _run_round(
    sweep: Sweep,
    trials: Sequence[Trial],
    lattice: Lattice | None,
    compute: ComputeSettings,
    finished: Callable[[Trial], None],
) -> list[Exception]:
    """Run them once; returns what failed."""
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
            return []
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
    return list(results.errors)


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
