"""The verbs that show results."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest

from sims_ray.config import TrackingSettings
from sims_ray.stages.tracking import Tracker
from sims_ray.studies.sims import SimsRun
from tests.cli.words import sims
from tests.conftest import TinyRecipe
from tests.processes import end, environment


def test_two_finished_runs_are_compared_on_one_page(
    tiny: TinyRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SimsRun(tiny("evaluate.matched=false"), tmp_path / "a").report()
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text(json.dumps(result))
    page = tmp_path / "compared" / "compare.html"
    assert sims("report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(page.parent)) == 0
    assert capsys.readouterr().out.strip() == str(page) and page.stat().st_size > 1e5
    other = {**result, "metric": "fd_classifier@1k"}
    (tmp_path / "b" / "result.json").write_text(json.dumps(other))
    assert sims("report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")) == 1
    assert "fd_classifier@64" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_folder_that_is_no_finished_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sims("report", str(tmp_path / "a"), str(tmp_path / "b")) == 1
    assert "is not the folder of a finished run" in capsys.readouterr().err


def test_mlflow_is_opened_on_loopback_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sims("ui", str(tmp_path)) == 1
    assert "mlflow.db is not there" in capsys.readouterr().err


@pytest.mark.slow
def test_mlflow_s_pages_of_a_run_answer_on_loopback(tmp_path: Path) -> None:
    Tracker(TrackingSettings(), tmp_path).run("key", "digits", {}).finish()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mark = uuid.uuid4().hex
    words = [sys.executable, "-m", "sims_ray.cli", "ui", str(tmp_path), f"--port={port}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(words, env=environment(mark, PATH=path), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.5)
        listening = Path("/proc/net/tcp").read_text()
        assert f" 0100007F:{port:04X} " in listening and f" 00000000:{port:04X} " not in listening
    finally:
        end(mark)
