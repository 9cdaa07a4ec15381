import logging
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from sims_ray.config import TrackingSettings
from sims_ray.stages.tracking import Tracker


def client_of(out: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{out / 'mlflow.db'}")


def test_a_restart_continues_the_same_run_and_logs_no_step_twice(tmp_path: Path) -> None:
    rows = [{"nimg": n, "loss": 1 / n} for n in (10, 20, 30)]
    first = Tracker(TrackingSettings(), tmp_path).run("key", "train", {"a": {"b": 1}})
    first.log(rows[:2])
    again = Tracker(TrackingSettings(), tmp_path).run("key", "train", {"a": {"b": 1}})
    again.log(rows)
    again.finish()
    assert again.run_id == first.run_id
    client = client_of(tmp_path)
    (experiment,) = [e for e in client.search_experiments() if e.name == "sims"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"a.b": "1"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(r["nimg"], r["loss"]) for r in rows]


def test_a_paused_run_looks_finished_and_is_gone_on_with(tmp_path: Path) -> None:
    first = Tracker(TrackingSettings(), tmp_path).run("key", "digits", {"a": 1})
    first.pause()
    client = client_of(tmp_path)
    assert client.get_run(first.run_id).info.status == "FINISHED"
    again = Tracker(TrackingSettings(), tmp_path).run("key", "digits", {"a": 1})
    assert again.run_id == first.run_id and not again.finished
    assert client.get_run(first.run_id).info.status == "RUNNING"
    again.log([{"nimg": 1, "loss": 2.0}])
    again.finish()
    again.pause()
    last = Tracker(TrackingSettings(), tmp_path).run("key", "digits", {"a": 1})
    assert last.finished and client.get_run(first.run_id).data.metrics == {"loss": 2.0}


def test_trials_are_nested_under_their_sweep(tmp_path: Path) -> None:
    tracker = Tracker(TrackingSettings(), tmp_path)
    sweep = tracker.run("sweep", "sweep", {})
    trial = tracker.run("trial", "omega=1", {"omega": 1.0}, parent=sweep)
    tags = client_of(tmp_path).get_run(trial.run_id).data.tags
    assert tags["mlflow.parentRunId"] == sweep.run_id and tags["mlflow.runName"] == "omega=1"


def test_files_of_a_run_are_kept_beside_the_database(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("<p>")
    run = Tracker(TrackingSettings(), tmp_path).run("key", "run", {})
    run.log_file(tmp_path / "report", "report")
    names = [entry.path for entry in client_of(tmp_path).list_artifacts(run.run_id, "report")]
    assert names == ["report/report.html"]


def test_a_server_that_is_down_warns_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(TrackingSettings(uri="http://127.0.0.1:9"), tmp_path)
    with caplog.at_level(logging.WARNING, logger="sims_ray"):
        run = tracker.run("key", "run", {})
        run.log([{"nimg": 1, "loss": 2.0}])
        run.log_file(tmp_path)
        run.finish()
        tracker.run("other", "run", {})
    assert [record.message.count("does not answer") for record in caplog.records] == [1]


def test_tracking_that_is_off_touches_nothing(tmp_path: Path) -> None:
    run = Tracker(TrackingSettings(enabled=False), tmp_path).run("key", "run", {})
    run.log([{"nimg": 1, "loss": 2.0}])
    run.finish()
    assert list(tmp_path.iterdir()) == []
