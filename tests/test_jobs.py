"""The job scripts through `ray job submit`, on a cluster of their own with token authentication."""

import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.processes import end, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A head node; yields the environment that reaches it."""
    mark, dashboard = uuid.uuid4().hex, free_port()
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        env = environment(
            mark,
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_TMPDIR=folder,
            RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{dashboard}",
        )
        ports = [  # those that are usual may be another cluster's
            f"--port={free_port()}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        start = [RAY, "start", "--head", "--num-cpus=4", *ports]
        try:
            subprocess.run([*start, "--object-store-memory=200000000"], env=env, check=True, timeout=120)
            yield env
        finally:
            end(mark)


def submit(env: dict[str, str], *job: str) -> "subprocess.CompletedProcess[str]":
    """Submit a job and wait for its end; a head that has just started may have no agent for jobs yet."""
    command = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, *job]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=env, cwd=ROOT, timeout=600, capture_output=True, text=True)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done


def test_a_submitted_job_makes_the_report_on_the_cluster_it_was_submitted_to(
    head: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sets = [word for setting in (*TINY, "tracking.enabled=false") for word in ("--set", setting)]
    done = submit(head, "jobs/run_sims.py", "digits", "--out", str(out), *sets)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["model"] for row in json.loads((out / "result.json").read_text())["table"]][-1] == "SIMS"
    assert "report.html" in done.stdout


def test_a_job_with_a_wrong_setting_fails_with_its_sentence(head: dict[str, str]) -> None:
    done = submit(head, "jobs/train_base.py", "digits", "--set", "train.lrr=1")
    assert done.returncode != 0 and "train.lrr is not a setting; did you mean lr?" in done.stdout + done.stderr
