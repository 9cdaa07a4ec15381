"""kill -9 of a worker, a node and the driver while two workers train, and a cluster that grows and shrinks."""

import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sims_ray.stages.training_log import read_metrics, read_notes
from sims_ray.storage.artifacts import MANIFEST
from tests.processes import end, environment, titled
from tests.stages.cluster_training import WORKER
from tests.stages.training_runs import (
    BATCH_NIMG,
    CHECKPOINT_NIMG,
    DEADLINE_S,
    STOP_NIMG,
    assert_equals,
    await_true,
    command,
    folder_of,
    log_lines,
    trained_nimg,
    undisturbed_run,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
DIGITS = 1797
SEED = 5


def moments() -> list[int]:
    """Ten steps at which something is killed, by chance: one in each tenth of the run, in an order of chance."""
    # The last seconds are left out: training may end before it is killed.
    chance, tenth = random.Random(SEED), (STOP_NIMG - 40 * BATCH_NIMG) // 10
    found = [BATCH_NIMG + number * tenth + chance.randrange(tenth) for number in range(10)]
    return chance.sample(found, len(found))


OF_WORKERS, OF_NODES, OF_DRIVERS = moments()[:4], moments()[4:7], moments()[7:]


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of every process of a test; none is left when it ends."""
    name = uuid.uuid4().hex
    yield name
    end(name)


def cluster(mark: str, *words: object) -> None:
    """Run a training on nodes that come and go."""
    line = [sys.executable, "-m", "tests.stages.cluster_training", *map(str, words)]
    subprocess.run(line, env=environment(mark), cwd=ROOT, check=True, timeout=2 * DEADLINE_S)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two workers that nothing disturbed."""
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed") / "run", 2)


def assert_went_on(out: Path, undisturbed: Path) -> None:
    """Training began more than once, and no more than the steps since the last written checkpoint were repeated."""
    assert len(read_notes(folder_of(out))) > len(read_notes(folder_of(undisturbed)))
    positions = [nimg for nimg, _ in log_lines(out)]
    repeated = [before - (after - BATCH_NIMG) for before, after in pairwise(positions)]
    assert max(repeated) < 2 * CHECKPOINT_NIMG  # the newest may still have been in writing


def await_moment(driver: "subprocess.Popen[Any]", out: Path, nimg: int) -> None:
    await_true(lambda: trained_nimg(out) >= nimg or driver.poll() is not None, f"{nimg} images were seen")
    assert driver.poll() is None and trained_nimg(out) < STOP_NIMG


@pytest.mark.parametrize(("number", "nimg"), enumerate(OF_WORKERS))
def test_a_worker_killed_at_any_step_changes_neither_a_loss_nor_a_weight(
    number: int, nimg: int, undisturbed: Path, tmp_path: Path, mark: str
) -> None:
    driver = subprocess.Popen(command(tmp_path, 2), env=environment(mark))
    await_moment(driver, tmp_path, nimg)
    workers = titled(mark, WORKER)
    assert len(workers) == 2
    os.kill(workers[number % 2], signal.SIGKILL)
    assert driver.wait(DEADLINE_S) == 0
    assert_equals(tmp_path, undisturbed)
    assert_went_on(tmp_path, undisturbed)


@pytest.mark.parametrize("nimg", OF_NODES)
def test_a_node_lost_at_any_step_changes_neither_a_loss_nor_a_weight(
    nimg: int, undisturbed: Path, tmp_path: Path, mark: str
) -> None:
    cluster(mark, "lose", tmp_path, nimg)
    assert_equals(tmp_path, undisturbed)
    assert_went_on(tmp_path, undisturbed)


def test_notice_of_a_lost_node_brings_a_checkpoint_at_once_and_changes_neither_a_loss_nor_a_weight(
    undisturbed: Path, tmp_path: Path, mark: str
) -> None:
    records, out = tmp_path / "records", tmp_path / "run"
    records.mkdir()
    cluster(mark, "notice", out, records)  # there is no other checkpoint before the end
    assert_equals(out, undisturbed)
    assert_went_on(out, undisturbed)


@pytest.mark.parametrize("nimg", OF_DRIVERS)
def test_a_driver_killed_at_any_step_and_rerun_at_once_changes_neither_a_loss_nor_a_weight(
    nimg: int, undisturbed: Path, tmp_path: Path, mark: str
) -> None:
    driver = subprocess.Popen(command(tmp_path, 2), env=environment(mark))
    await_moment(driver, tmp_path, nimg)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (folder_of(tmp_path) / MANIFEST).exists()
    subprocess.run(command(tmp_path, 2), env=environment(mark), check=True, timeout=DEADLINE_S)
    assert_equals(tmp_path, undisturbed)
    assert_went_on(tmp_path, undisturbed)


def test_from_one_node_to_three_to_two_every_image_is_seen_once_and_the_loss_stays(
    undisturbed: Path, tmp_path: Path, mark: str
) -> None:
    records, out = tmp_path / "records", tmp_path / "run"
    records.mkdir()
    cluster(mark, "resize", out, records)
    worlds, batches = last_attempts(records)
    assert [size for size, _ in groupby(worlds)] == [1, 3, 2]
    ids = np.concatenate(batches)
    assert len(ids) == STOP_NIMG
    for start in range(0, STOP_NIMG, DIGITS):
        epoch = ids[start : start + DIGITS]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(DIGITS))
    rows, expected = (read_metrics(folder_of(path)) for path in (out, undisturbed))
    assert [row["nimg"] for row in rows] == [row["nimg"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


def last_attempts(records: Path) -> tuple[list[int], list[list[int]]]:
    """World size and ids of every step of the run, in order: of repeated steps the last time counts."""
    steps: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(dict)  # ids by world size and rank
    newest: dict[int, tuple[int, int]] = {}  # time and world size
    for path in records.glob("*-*-*"):
        size, rank, _ = map(int, path.name.split("-"))
        for time_ns, nimg, ids in map(json.loads, path.read_text().splitlines()):
            assert steps[nimg].setdefault((size, rank), ids) == ids  # a step is given the same, whenever it is made
            newest[nimg] = max(newest.get(nimg, (0, 0)), (time_ns, size))
    assert sorted(steps) == list(range(0, STOP_NIMG, BATCH_NIMG))
    worlds = [newest[nimg][1] for nimg in sorted(steps)]
    parts = zip(sorted(steps), worlds, strict=True)
    return worlds, [[i for rank in range(size) for i in steps[nimg][size, rank]] for nimg, size in parts]
