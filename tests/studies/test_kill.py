"""kill -9 of the driver in each stage, then the same command: the result is that of an undisturbed run."""

import json
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.processes import end, environment, marked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DEADLINE_S = 400.0
REPORT_SEEDS = 2_000_000_000
SETTINGS = (
    *TINY,
    "tracking.enabled=false",
    "train.duration_kimg=20",
    "finetune.budgets_kimg=[5,10]",
    "tune.n_s=[512]",
    "tune.n_images=256",
    "evaluate.n_images=256",
)


def command(out: Path) -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [sys.executable, "-m", "sims_ray.cli", "run", "digits", "--out", str(out), *sets]


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of every process of a test; none is left when it ends."""
    name = uuid.uuid4().hex
    yield name
    end(name)


def unfinished(out: Path, stage: str, file: str) -> list[Path]:
    """Files of a stage's artifacts that are not committed yet."""
    folders = [f for f in out.glob(f"artifacts/{stage}-*") if not (f / "manifest.json").exists()]
    return [path for folder in folders for path in folder.glob(file)]


def committed(out: Path, stage: str) -> int:
    return len(list(out.glob(f"artifacts/{stage}-*/manifest.json")))


IN_STAGE: dict[str, Callable[[Path], bool]] = {
    "train": lambda out: committed(out, "train") == 0 and bool(unfinished(out, "train", "state-*")),
    "synthesize": lambda out: bool(unfinished(out, "synthesize", "seeds-*.parquet")),
    "finetune": lambda out: committed(out, "train") == 1 and bool(unfinished(out, "train", "state-*")),
    "tune": lambda out: 0 < committed(out, "evaluate") < 5 and committed(out, "tune") == 0,
    "evaluate": lambda out: committed(out, "tune") == 1 and bool(unfinished(out, "evaluate", "part-*.npz")),
}


def result(out: Path) -> Any:
    summary = json.loads((out / "result.json").read_text())
    losses = {name: [(r["nimg"], r["loss"]) for r in rows] for name, rows in summary["losses"].items()}
    trials = [{**trial, "worker_s": None} for trial in summary["trials"]]  # the times alone differ
    return summary["table"], trials, {**summary["selected"], "worker_s": None}, losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(command(out), env=environment("undisturbed"), check=True, timeout=DEADLINE_S)
    return out


def before_stage(undisturbed: Path, stage: str, out: Path) -> None:
    """Copy what a run has committed when it comes to a stage; the rest is for the test to make."""
    order = ["import", "features", "train", "synthesize", "finetune", "tune", "evaluate"]
    done = order[: order.index(stage)]
    for manifest in undisturbed.glob("artifacts/*/manifest.json"):
        facts = json.loads(manifest.read_text())
        made_by = facts["stage"]
        if made_by == "train" and "n_s" in facts["settings"]:
            made_by = "finetune"
        if made_by == "evaluate":  # the sweep's evaluations come before the report's
            made_by = "tune" if facts["settings"]["seeds"][0] < REPORT_SEEDS else "evaluate"
        if made_by in done:
            shutil.copytree(manifest.parent, out / "artifacts" / manifest.parent.name)


@pytest.mark.parametrize("stage", IN_STAGE)
def test_a_driver_killed_in_any_stage_and_rerun_gives_the_undisturbed_table_digit_for_digit(
    stage: str, undisturbed: Path, tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "run"
    before_stage(undisturbed, stage, out)
    driver = subprocess.Popen(command(out), env=environment(mark))
    wait_for_stage(stage, out, driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (out / "result.json").exists()
    before = {p: p.stat().st_mtime_ns for p in out.glob("artifacts/*/manifest.json")}
    subprocess.run(command(out), env=environment(mark), check=True, timeout=DEADLINE_S)
    assert result(out) == result(undisturbed)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())


def wait_for_stage(stage: str, out: Path, driver: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not IN_STAGE[stage](out):
        assert driver.poll() is None, f"the run ended before it was seen in {stage}"
        assert time.monotonic() < deadline, f"{stage} was not reached"
        time.sleep(0.02)


def heed_interrupts() -> None:
    """A shell makes what it starts in the background ignore Ctrl-C, and the tests may run there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stage", ["train", "synthesize", "tune"])
def test_ctrl_c_ends_with_a_hint_and_leaves_no_process(
    stage: str, undisturbed: Path, tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "run"
    before_stage(undisturbed, stage, out)
    driver = subprocess.Popen(
        command(out),
        env=environment(mark),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    wait_for_stage(stage, out, driver)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=120)
    assert driver.returncode == 130 and "run the same command again" in stderr, stderr[-3000:]
    deadline = time.monotonic() + 200
    while marked(mark):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.5)
