"""Sweeps that are disturbed: kill -9 of the driver and of a trial's actor, a tracking server that goes away."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import TINY
from tests.processes import end, environment, titled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DEADLINE_S = 500.0
OMEGAS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3]
SETTINGS = (
    *TINY,
    f"tune.omega={OMEGAS}",
    "finetune.budgets_kimg=[1]",
    "tune.n_images=512",
    "tune.fidelities=[128,256,512]",
    "sampler.num_steps=12",
)
ACTOR = "ray::ImplicitFunc"


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of every process of a test; none is left when it ends."""
    name = uuid.uuid4().hex
    yield name
    end(name)


def command(out: Path, *settings: str) -> list[str]:
    sets = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return [sys.executable, "-m", "sims_ray.cli", "tune", "digits", "--out", str(out), *sets]


def notes(out: Path) -> dict[Path, int]:
    """The outcomes of the trials so far, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("artifacts/tune-*/trial-*.json")}


def wait_until(reached: Callable[[], Any], driver: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert driver.poll() is None, "the sweep ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outcome(out: Path) -> dict[float, float]:
    """Distance by strength."""
    (manifest,) = out.glob("artifacts/tune-*/manifest.json")
    trials = json.loads(manifest.read_text())["result"]["trials"]
    assert len(trials) == len(OMEGAS)
    return {trial["omega"]: trial["distance"] for trial in trials}


def check_runs(uri: str) -> None:
    """Every run is finished; a parent has a child per trial, each of which has every distance once."""
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "sims"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [run for run in runs if run.info.run_name == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(float(run.data.params["omega"]) for run in children) == OMEGAS
    for run in children:
        history = client.get_metric_history(run.info.run_id, "fd_classifier")
        assert [m.step for m in history] == [128, 256, 512]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[float, float]:
    """The outcome of a sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(command(out), env=environment("undisturbed"), check=True, timeout=DEADLINE_S)
    check_runs(f"sqlite:///{out / 'mlflow.db'}")
    return outcome(out)


def test_a_driver_killed_after_5_of_12_trials_goes_on_with_the_7_others(
    undisturbed: dict[float, float], tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "run"
    driver = subprocess.Popen(command(out), env=environment(mark))
    wait_until(lambda: len(notes(out)) >= 5, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = notes(out)
    assert 5 <= len(before) < len(OMEGAS)
    subprocess.run(command(out), env=environment(mark), check=True, timeout=DEADLINE_S)
    after = notes(out)
    assert len(after) == len(OMEGAS) and all(after[path] == time_ns for path, time_ns in before.items())
    assert outcome(out) == pytest.approx(undisturbed, rel=1e-9)
    check_runs(f"sqlite:///{out / 'mlflow.db'}")


def test_a_trial_whose_actor_is_killed_in_the_middle_is_measured_all_the_same(
    undisturbed: dict[float, float], tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "run"
    driver = subprocess.Popen(command(out), env=environment(mark))
    # A trial in the middle: it has taken a distance, and not all of them.
    wait_until(lambda: len(notes(out)) >= 2 and list(out.glob("artifacts/evaluate-*/curve.json")), driver)
    (victim, *_) = titled(mark, ACTOR)
    os.kill(victim, signal.SIGKILL)
    assert driver.wait(DEADLINE_S) == 0
    assert len(notes(out)) == len(OMEGAS)
    assert outcome(out) == pytest.approx(undisturbed, rel=1e-9)
    check_runs(f"sqlite:///{out / 'mlflow.db'}")


def start_server(folder: Path, port: int, mark: str) -> "subprocess.Popen[bytes]":
    """A tracking server on loopback that answers."""
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            f"--backend-store-uri=sqlite:///{folder / 'server.db'}",
            f"--default-artifact-root={folder / 'artifacts'}",
            "--host=127.0.0.1",
            f"--port={port}",
            "--workers=1",
        ],
        env=environment(mark),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    wait_until(answers, server)
    return server


def test_a_sweep_outlives_its_tracking_server_and_logs_what_was_missed_when_run_again(
    undisturbed: dict[float, float], tmp_path: Path, mark: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out, server_mark = tmp_path / "run", f"{mark}server"
    there = command(out, f"tracking.uri=http://127.0.0.1:{port}")
    start_server(tmp_path, port, server_mark)
    try:
        driver = subprocess.Popen(there, env=environment(mark), stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(notes(out)) >= 3, driver)  # type: ignore[arg-type]
        end(server_mark)
        _, said = driver.communicate(timeout=DEADLINE_S)
        assert driver.returncode == 0 and said.count("does not answer") == 1
        assert outcome(out) == pytest.approx(undisturbed, rel=1e-9)
        start_server(tmp_path, port, server_mark)
        before = notes(out)
        subprocess.run(there, env=environment(mark), check=True, timeout=DEADLINE_S)
        assert notes(out) == before
        check_runs(f"http://127.0.0.1:{port}")
    finally:
        end(server_mark)
