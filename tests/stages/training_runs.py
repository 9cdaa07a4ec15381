"""Base trainings of seconds, in processes of their own, with all on that is random; and whether two are the same."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from sims_ray.stages.training_log import METRICS, read_metrics
from sims_ray.storage.artifacts import MANIFEST
from sims_ray.storage.checkpoints import load_tensors
from tests.conftest import TINY
from tests.processes import end, environment

BATCH_NIMG, STOP_NIMG, CHECKPOINT_NIMG = 64, 8000, 500
SETTINGS = (  # the loss of every step is logged
    *TINY,
    "network.dropout=0.13",
    "network.conditional=true",
    "network.label_dropout=0.1",
    "train.augment=0.12",
    f"train.batch_size={BATCH_NIMG}",
    f"train.duration_kimg={STOP_NIMG / 1000:g}",
    f"train.checkpoint_kimg={CHECKPOINT_NIMG / 1000:g}",
    f"train.log_kimg={BATCH_NIMG / 1000:g}",
    "tracking.enabled=false",
    "compute.object_store_mb=200",
)
DEADLINE_S = 400.0


def command(out: Path, workers: int, *overrides: str, verb: str = "train") -> list[str]:
    """The words that train; `overrides` beside `SETTINGS`."""
    sets = [w for word in (*SETTINGS, f"compute.num_workers={workers}", *overrides) for w in ("--set", word)]
    return [sys.executable, "-m", "sims_ray.cli", verb, "digits", "--out", str(out), *sets]


def undisturbed_run(out: Path, workers: int) -> Path:
    """An output folder in which the training is complete, and nothing disturbed it."""
    mark = uuid.uuid4().hex
    try:
        subprocess.run(command(out, workers), env=environment(mark), check=True, timeout=DEADLINE_S)
    finally:
        end(mark)
    return out


def folder_of(out: Path) -> Path:
    """The folder of the one training in an output folder; it need not exist yet."""
    return next(out.glob("artifacts/train-*"), out / "artifacts/train")


def trained_nimg(out: Path) -> int:
    """Images seen at the newest line of the log."""
    return max((int(row["nimg"]) for row in read_metrics(folder_of(out))), default=0)


def await_true(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def log_lines(out: Path) -> list[tuple[int, float]]:
    """Images seen and loss of every line of the log, repeated ones too; a torn line is passed over."""
    rows = []
    for line in (folder_of(out) / METRICS).read_text().splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [(int(row["nimg"]), row["loss"]) for row in rows if "nimg" in row]


def assert_equals(out: Path, undisturbed: Path) -> None:
    """The same loss in every step, however often it was made, and the same bits of all that training leaves."""
    assert [nimg for nimg, _ in log_lines(undisturbed)] == list(range(BATCH_NIMG, STOP_NIMG + 1, BATCH_NIMG))
    assert sorted(set(log_lines(out))) == log_lines(undisturbed)
    ours, theirs = (json.loads((folder_of(path) / MANIFEST).read_text()) for path in (out, undisturbed))
    assert ours["result"] == theirs["result"] and ours["result"]["nimg"] == STOP_NIMG
    assert sorted(ours["files"]) == sorted(theirs["files"])
    for name in theirs["files"]:
        mine, other = (load_tensors(folder_of(path) / name)[0] for path in (out, undisturbed))
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in other), name
    assert ours["files"] == theirs["files"]  # their digests
