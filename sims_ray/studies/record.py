"""What MLflow shows of a run: the run itself, and nested in it one per stage, trial and reported evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from sims_ray.config import Recipe
from sims_ray.stages.cells import Trial
from sims_ray.stages.evaluate import Evaluation
from sims_ray.stages.policy import policy_params
from sims_ray.stages.preview import SHEETS, read_previews
from sims_ray.stages.synthesize import SynthesisJob
from sims_ray.stages.tracking import TrackedRun, Tracker
from sims_ray.stages.train_job import TrainJob
from sims_ray.stages.training_log import METRICS, read_metrics
from sims_ray.storage.artifacts import Artifact, fingerprint
from sims_ray.storage.beside import atomic_path
from sims_ray.studies.plan import Plan

SETTINGS, PACKAGES = "settings.yaml", "packages.txt"


class RunRecord:
    """The MLflow runs of one run of a recipe; nothing is opened before the first is asked for.

    Args:
        plan: the run.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.recipe, self.out = plan, plan.recipe, plan.out
        self._tracker = Tracker(self.recipe.tracking, self.out)

    @property
    def uri(self) -> str:
        """Where MLflow's record lies."""
        return self._tracker.uri

    @cached_property
    def root(self) -> TrackedRun:
        """The run that the others are nested in, with its resolved settings and the packages that it runs with."""
        content = self.recipe.model_dump(mode="json", exclude={"compute": True, "tracking": True, "data": {"reading"}})
        key = fingerprint("run", content, [self.plan.base_artifact.fingerprint])
        run = self._tracker.run(key, self.recipe.name, self.recipe.model_dump(mode="json"))
        if not run.finished:
            for path in write_environment(self.recipe, self.out):
                run.log_file(path)
        return run

    def stage(self, artifact: Artifact, name: str, params: Mapping[str, Any]) -> TrackedRun:
        """The run of an artifact."""
        return self._tracker.run(artifact.fingerprint, name, params, self.root)

    def synthesis(self, job: SynthesisJob) -> None:
        """A synthetic set that is there."""
        key = fingerprint("synthesize run", {"n": job.n}, [job.fingerprint])  # a larger set is another run
        run = self._tracker.run(key, "synthesize", {"n_s": job.n, **job.set.settings}, self.root)
        run.log([{"nimg": job.n, "images": job.n}])
        run.finish()

    def training(self, job: TrainJob, name: str) -> TrackedRun:
        """The run of a training, to log its steps in; one that was finished is gone on with if it is extended."""
        run = self.stage(job.artifact, name, {**job.artifact.settings, "policy": policy_params(job)})
        if not job.complete:
            run.reopen({"policy": policy_params(job)})
        return run

    def trained(self, run: TrackedRun, job: TrainJob) -> None:
        """What is still missing of a training that has ended."""
        if run.finished:
            return
        run.log(read_metrics(job.artifact.path))
        run.log(read_previews(job.artifact.path))
        for path in (job.artifact.path / METRICS, *sorted(job.artifact.path.glob(SHEETS))):
            run.log_file(path)
        run.finish()

    def trial(self, trial: Trial, outcome: Mapping[str, Any], parent: TrackedRun) -> None:
        """A trial's distances against images, and what they cost."""
        key = fingerprint("trial", {}, [self.plan.sweep.artifact.fingerprint, trial.evaluation.artifact.fingerprint])
        run = self._tracker.run(key, trial.name, trial.cell.params, parent)
        if run.finished:
            return
        metric = outcome["metric"].partition("@")[0]
        run.log([{"nimg": point["nimg"], metric: point["distance"]} for point in outcome["curve"]])
        cost = {"network_evaluations": outcome["nimg"] * outcome["nfe"], "worker_s": outcome["worker_s"]}
        run.log([{"nimg": outcome["nimg"], **cost, "stopped_early": float(outcome["stopped"])}])
        run.finish()

    def evaluation(self, evaluation: Evaluation, name: str, params: Mapping[str, Any]) -> None:
        """A reported distance, and what was measured besides."""
        run = self.stage(evaluation.artifact, name, params)
        if run.finished:
            return
        result = evaluation.artifact.result
        values = {result["metric"].partition("@")[0]: result["distance"], **result.get("measures", {})}
        run.log([{"nimg": result["nimg"], **values}])
        run.finish()

    def report(self, summary: Mapping[str, Any], folder: Path, model: Path) -> None:
        """The report's files, the selected model in the registry, the distances of the compared ones."""
        if self.root.finished:
            return
        self.root.log_file(folder, folder.name)
        self.root.register(model, f"sims-{self.recipe.name}")
        self.root.log(
            [{"nimg": row["n_images"], metric_key(row["model"]): row["distance"]} for row in summary["table"]]
        )
        self.root.finish()

    def pause(self) -> None:
        """Say that no more is to come from this process."""
        if "root" in self.__dict__:
            self.root.pause()


def write_environment(recipe: Recipe, out: Path) -> tuple[Path, Path]:
    """Write the resolved settings as a recipe, and the installed packages as `name==version` lines.

    Returns:
        The two files, `settings.yaml` and `packages.txt` in `out`.
    """
    found = {(d.name.lower(), d.version) for d in metadata.distributions() if d.name}
    packages = [f"{name}=={version}\n" for name, version in sorted(found)]
    settings = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    paths = out / SETTINGS, out / PACKAGES
    for path, text in zip(paths, (settings, "".join(packages)), strict=True):
        if not path.is_file() or path.read_text() != text:
            with atomic_path(path) as beside:
                beside.write_text(text)
    return paths


def metric_key(model: str) -> str:
    """Name of the distance of a compared model as MLflow takes it."""
    return f"{model.replace(',', '')}.distance"
