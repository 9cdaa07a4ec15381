"""The tune stage: Ray Tune over (omega, B, n_s), one evaluation artifact per trial, the best one chosen.

A trial whose artifact is complete is not run again, which makes the sweep resumable and lets sweeps share trials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError
from sims_ray.stages.cluster import ray_folder, start_ray
from sims_ray.stages.evaluate import Evaluation, MomentsWorker, evaluate_here
from sims_ray.stages.progress import Progress
from sims_ray.storage.artifacts import Artifact


@dataclass(frozen=True)
class Trial:
    """One cell of the search space.

    Attributes:
        omega: guidance strength.
        budget_kimg: fine-tuning budget B; None for the base alone.
        n_s: synthetic-set size; None for the base alone.
        evaluation: what to measure, on the selection seeds.
    """

    omega: float
    budget_kimg: float | None
    n_s: int | None
    evaluation: Evaluation

    @property
    def params(self) -> dict[str, Any]:
        """The coordinates, by name."""
        return {"omega": self.omega, "budget_kimg": self.budget_kimg, "n_s": self.n_s}

    @property
    def name(self) -> str:
        """The coordinates, for people."""
        if self.n_s is None:
            return "base"
        return f"omega={self.omega:g} B={self.budget_kimg:g}kimg n_s={self.n_s}"


def tune(
    artifact: Artifact, trials: Sequence[Trial], compute: ComputeSettings, on_trial: Callable[[Trial], None]
) -> None:
    """Run the trials that have no result yet, choose the best guided one, commit the sweep.

    `on_trial` is called in this process for every trial as soon as its result is there, old results first.

    Raises:
        SimsError: a trial failed.
    """
    open_trials = []
    for trial in trials:
        if trial.evaluation.artifact.complete:
            on_trial(trial)
        else:
            open_trials.append(trial)
    total = sum(len(t.evaluation.seeds) for t in trials)
    progress = Progress("sweep", total, total - sum(len(t.evaluation.seeds) for t in open_trials))

    def finished(trial: Trial) -> None:
        distance = trial.evaluation.artifact.result["distance"]
        progress.add(
            len(trial.evaluation.seeds), f"{trial.name}: {trial.evaluation.metric} {distance:.3f}", always=True
        )
        on_trial(trial)

    if compute.num_workers and open_trials:
        _run_on_tune(artifact, open_trials, compute, finished)
    else:
        worker = MomentsWorker(compute)
        for trial in open_trials:
            evaluate_here(trial.evaluation, worker)
            finished(trial)
    cells = [{**t.params, **t.evaluation.artifact.result} for t in trials]
    guided = [cell for cell in cells if cell["omega"] > 0]
    artifact.path.mkdir(parents=True, exist_ok=True)
    artifact.commit({}, {"trials": cells, "selected": min(guided, key=lambda cell: cell["distance"])})


def _run_on_tune(
    artifact: Artifact, trials: Sequence[Trial], compute: ComputeSettings, finished: Callable[[Trial], None]
) -> None:
    start_ray(compute)
    from ray import tune as ray_tune

    cells = [{**trial.params, "trial": i} for i, trial in enumerate(trials)]
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(_run_trial, trials=list(trials), compute=compute),
        {"cpu": compute.cpus_per_worker, "gpu": compute.gpus_per_worker},
    )
    with ray_folder(artifact.path) as folder:
        tuner = ray_tune.Tuner(
            trainable,
            param_space={"cell": ray_tune.grid_search(cells)},
            tune_config=ray_tune.TuneConfig(max_concurrent_trials=compute.num_workers, reuse_actors=True),
            run_config=ray_tune.RunConfig(
                **folder,
                failure_config=ray_tune.FailureConfig(max_failures=compute.max_failures),
                callbacks=[_callback(trials, finished)],
                verbose=0,
            ),
        )
        failed = tuner.fit().errors
    if failed:
        reason = str(failed[0]).strip().splitlines()[-1]
        raise SimsError(f"{len(failed)} of {len(trials)} trials failed (the first: {reason}); run again to go on")


def _run_trial(config: dict[str, Any], trials: Sequence[Trial], compute: ComputeSettings) -> None:
    """Body of one Ray Tune trial: its actor is the sampling actor."""
    from ray import tune as ray_tune

    evaluation = trials[config["cell"]["trial"]].evaluation
    evaluate_here(evaluation, _worker(compute))
    ray_tune.report({name: evaluation.artifact.result[name] for name in ("distance", "nimg")})


@lru_cache(maxsize=1)
def _worker(compute: ComputeSettings) -> MomentsWorker:
    return MomentsWorker(compute)


def _callback(trials: Sequence[Trial], finished: Callable[[Trial], None]) -> Any:
    from ray.tune import Callback

    class Finished(Callback):  # type: ignore[misc]
        """Tells the driver about each trial that ended well."""

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            """Called by Tune in the driver."""
            finished(by_index[trial.config["cell"]["trial"]])

    by_index = dict(enumerate(trials))
    return Finished()
