"""MLflow: one run per logical run, found again by its key after any restart; never in the way of the work.

A run's key is the fingerprint of what it produced, kept as a tag. Metrics go in against images seen.
A server that does not answer is warned about once; what was missed is logged by the next run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sims_ray.config import TrackingSettings

logger = logging.getLogger("sims_ray")

KEY_TAG = "sims_ray.key"
OUT_TAG = "sims_ray.out"  # two folders on one server keep runs of their own, whatever is in them
PAUSED_TAG = "sims_ray.paused"  # of a run that ended with its process, and that a later one goes on with
PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
PARAM_CHARS = 500
METRICS_PER_CALL = 500
MODEL = "model"  # folder of a run's artifacts
T = TypeVar("T")

# A dead server must cost seconds, not the minutes of MLflow's default retries; its bars would flood the log.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Tracker:
    """The experiment that a recipe's runs are logged to.

    Args:
        settings: where and whether to log.
        out: output folder; holds the SQLite file when no server is given.
    """

    def __init__(self, settings: TrackingSettings, out: Path) -> None:
        self.uri = settings.uri or f"sqlite:///{(out / 'mlflow.db').resolve()}"
        self._artifact_root = None if settings.uri else (out / "mlartifacts").resolve().as_uri()
        self._experiment = settings.experiment
        self._client: Any = None
        self._experiment_id = ""
        self._out = str(out.resolve())
        self._runs: dict[str, tuple[str, bool]] = {}  # key -> run id, finished
        self._down = not settings.enabled

    def run(self, key: str, name: str, params: Mapping[str, Any], parent: TrackedRun | None = None) -> TrackedRun:
        """The run with this key, made if it is new; `params` may be nested."""
        run_id, finished = self.attempt(lambda: self._open(key, name, params, parent)) or (None, False)
        return TrackedRun(self, key, run_id, finished)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Do something that needs the server; None if it is down. Warns at the first failure only."""
        if self._down:
            return None
        try:
            if self._client is None:
                self._connect()
            return action()
        except Exception as error:
            self._down = True
            reason = " ".join(str(error).split())[:200]
            logger.warning(
                "MLflow at %s does not answer (%s); going on without it, the next run will log what is missed",
                self.uri,
                reason,
            )
            return None

    @property
    def client(self) -> Any:
        """MLflow's client, connected."""
        return self._client

    def _connect(self) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        for library in ("alembic", "mlflow"):  # MLflow sets its own level when imported
            logging.getLogger(library).setLevel(logging.WARNING)
        client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(self._experiment)
        self._experiment_id = (
            found.experiment_id
            if found
            else client.create_experiment(self._experiment, artifact_location=self._artifact_root)
        )
        token = None
        while True:
            page = client.search_runs([self._experiment_id], max_results=1000, page_token=token)
            for run in page:
                if KEY_TAG in run.data.tags and run.data.tags.get(OUT_TAG) == self._out:
                    finished = run.info.status == "FINISHED" and PAUSED_TAG not in run.data.tags
                    self._runs[run.data.tags[KEY_TAG]] = (run.info.run_id, finished)
            token = page.token
            if not token:
                break
        self._client = client

    def _open(self, key: str, name: str, params: Mapping[str, Any], parent: TrackedRun | None) -> tuple[str, bool]:
        from mlflow.entities import Param

        if key not in self._runs:
            tags = {KEY_TAG: key, OUT_TAG: self._out, NAME_TAG: name}
            if parent is not None and parent.run_id is not None:
                tags[PARENT_TAG] = parent.run_id
            run = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
            self._runs[key] = (run.info.run_id, False)
        run_id, finished = self._runs[key]
        if not finished:  # a run that was killed while young may lack them; the same ones again are allowed
            if PAUSED_TAG in self._client.get_run(run_id).data.tags:
                self._client.delete_tag(run_id, PAUSED_TAG)
                self._client.update_run(run_id, status="RUNNING")
            flat = [Param(k, str(v)[:PARAM_CHARS]) for k, v in flatten(params).items()]
            self._client.log_batch(run_id, params=flat)
        return run_id, finished

    def finish(self, key: str, run_id: str) -> None:
        """Mark a run as finished."""
        self._client.set_terminated(run_id, "FINISHED")
        self._runs[key] = (run_id, True)


class TrackedRun:
    """One MLflow run, or none when tracking is off or the server is down.

    Attributes:
        run_id: MLflow's id; None without a run.
        finished: whether an earlier process logged it to its end.
    """

    def __init__(self, tracker: Tracker, key: str, run_id: str | None, finished: bool) -> None:
        self._tracker, self._key, self.run_id, self.finished = tracker, key, run_id, finished
        self._logged: dict[str, int] = {}

    def log(self, rows: Sequence[Mapping[str, float]], step_key: str = "nimg") -> None:
        """Log metrics against images seen; a row whose step is there already is not logged twice."""
        if self.run_id is not None and not self.finished and rows:
            self._tracker.attempt(lambda: self._log(rows, step_key))

    def _log(self, rows: Sequence[Mapping[str, float]], step_key: str) -> None:
        import time

        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now_ms, int(row[step_key]))
            for row in rows
            for name, value in row.items()
            if name != step_key and int(row[step_key]) > self._last_step(name)
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._tracker.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])
        for metric in metrics:
            self._logged[metric.key] = max(self._logged[metric.key], metric.step)

    def _last_step(self, name: str) -> int:
        if name not in self._logged:
            history = self._tracker.client.get_metric_history(self.run_id, name)
            self._logged[name] = max((m.step for m in history), default=-1)
        return self._logged[name]

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or all files of a folder."""
        if self.run_id is None:
            return
        client = self._tracker
        if path.is_dir():
            client.attempt(lambda: client.client.log_artifacts(self.run_id, str(path), folder))
        else:
            client.attempt(lambda: client.client.log_artifact(self.run_id, str(path), folder))

    def register(self, folder: Path, name: str) -> None:
        """Log the folder of a model and make it the newest version of `name` in the registry."""
        if self.run_id is not None:
            self._tracker.attempt(lambda: self._register(folder, name))

    def _register(self, folder: Path, name: str) -> None:
        from mlflow.exceptions import MlflowException

        client = self._tracker.client
        client.log_artifacts(self.run_id, str(folder), MODEL)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = client.search_model_versions(f"name='{name}'")
        if self.run_id not in {version.run_id for version in known}:
            source = f"{client.get_run(self.run_id).info.artifact_uri}/{MODEL}"
            client.create_model_version(name, source, run_id=self.run_id)

    def reopen(self, params: Mapping[str, Any]) -> None:
        """Go on logging to a run that was finished, as what it is of is extended; adds parameters."""
        if self.run_id is None or not self.finished:
            return
        self.finished = False
        flat = {name: str(value)[:PARAM_CHARS] for name, value in flatten(params).items()}
        self._tracker.attempt(lambda: [self._tracker.client.log_param(self.run_id, k, v) for k, v in flat.items()])

    def pause(self) -> None:
        """End the run as far as readers are concerned; a later process goes on with it."""
        if self.run_id is not None and not self.finished:
            self._tracker.attempt(self._pause)

    def _pause(self) -> None:
        self._tracker.client.set_tag(self.run_id, PAUSED_TAG, "true")
        self._tracker.client.set_terminated(self.run_id, "FINISHED")

    def finish(self) -> None:
        """Mark the run as finished."""
        if self.run_id is not None and not self.finished:
            run_id = self.run_id
            self._tracker.attempt(lambda: self._tracker.finish(self._key, run_id))
            self.finished = True


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
