"""kill -9 of an actor, a node and the driver while a set is made: none of its images is lost, doubled or different."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sims_ray.data.table import SampleTable
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.folders import Folder
from tests.networks import SETTINGS, small_network
from tests.processes import end, environment, marked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHARDS, SHARD_NIMG, WORKERS = 40, 24, 2
N = SHARDS * SHARD_NIMG
DEADLINE_S = 400.0
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
SCRIPT = Path(__file__).with_name("cluster_synthesis.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "base.safetensors"
    save_tensors(path, small_network().state_dict(), {"role": "base", "network": SETTINGS, "nimg": 0})
    return path


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of every process of a test; none is left when it ends."""
    name = uuid.uuid4().hex
    yield name
    end(name)


def command(out: Path | str, base: Path, workers: int = WORKERS) -> list[str]:
    words = f"data synthesize {out} --base {base} --n {N} --shard-nimg {SHARD_NIMG} --workers {workers} --gpus 0"
    return [sys.executable, "-m", "sims_ray.cli", *words.split()]


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of every file, the manifest's too, of a set that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    subprocess.run(command(out, base, workers=0), env=environment("undisturbed"), check=True, timeout=DEADLINE_S)
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def shards(out: Path) -> dict[str, int]:
    """Files that are there and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("seeds-*.parquet")}


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def actors(mark: str) -> list[int]:
    """Processes that sample."""
    found = []
    for pid in marked(mark):
        try:
            if b"ray::MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def assert_exactly_once(out: Path, undisturbed: dict[str, str], before: dict[str, int]) -> None:
    """The set is the undisturbed one, and no file that was there before is a new one."""
    assert digests(out) == undisturbed
    after = shards(out)
    assert len(after) == SHARDS and {name: after[name] for name in before} == before
    ids = np.concatenate([samples.ids for samples in SampleTable(out).files()])
    assert sorted(ids) == list(range(N))


@pytest.mark.parametrize("share", SHARES)
def test_a_driver_killed_at_any_point_and_rerun_leaves_each_seed_once_and_the_undisturbed_bytes(
    share: float, base: Path, undisturbed: dict[str, str], tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "set"
    driver = subprocess.Popen(command(out, base), env=environment(mark))
    wait(lambda: len(shards(out)) >= share * SHARDS or driver.poll() is not None, "no files came")
    assert driver.poll() is None
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait(lambda: not actors(mark), "the actors outlive their driver")
    before = shards(out)
    assert len(before) < SHARDS and not (out / "manifest.json").exists()
    rerun = subprocess.run(
        command(out, base), env=environment(mark), check=True, timeout=DEADLINE_S, stderr=subprocess.PIPE, text=True
    )
    assert f"going on from {len(before) * SHARD_NIMG:,} of {N:,} images" in rerun.stderr
    assert_exactly_once(out, undisturbed, before)


@pytest.mark.parametrize("share", SHARES)
def test_a_sampling_actor_killed_at_any_point_costs_no_file_and_changes_none(
    share: float, base: Path, undisturbed: dict[str, str], tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "set"
    driver = subprocess.Popen(command(out, base), env=environment(mark))
    wait(lambda: len(shards(out)) >= share * SHARDS or driver.poll() is not None, "no files came")
    victims = actors(mark)
    assert driver.poll() is None and victims
    os.kill(victims[0], signal.SIGKILL)
    before = shards(out)
    assert driver.wait(DEADLINE_S) == 0
    assert_exactly_once(out, undisturbed, before)


@pytest.mark.parametrize("share", SHARES)
def test_a_node_lost_at_any_point_costs_no_file_and_changes_none(
    share: float, base: Path, undisturbed: dict[str, str], tmp_path: Path, mark: str
) -> None:
    out, notes = tmp_path / "set", tmp_path / "before.json"
    words = [str(out), str(base), str(N), str(SHARD_NIMG), str(round(share * SHARDS)), str(notes)]
    subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env=environment(mark),
        check=True,
        timeout=DEADLINE_S,
        cwd=SCRIPT.parents[2],
    )
    before = json.loads(notes.read_text())
    assert share * SHARDS <= len(before) < SHARDS
    assert_exactly_once(out, undisturbed, before)


def test_a_driver_killed_and_rerun_on_an_object_store_leaves_the_undisturbed_bytes_there(
    base: Path, undisturbed: dict[str, str], s3_folder: str, mark: str
) -> None:
    folder = Folder.at(s3_folder)
    driver = subprocess.Popen(command(s3_folder, base), env=environment(mark))
    wait(lambda: len(folder.files()) >= SHARDS / 2 or driver.poll() is not None, "no files came")
    assert driver.poll() is None
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait(lambda: not actors(mark), "the actors outlive their driver")
    before = folder.files()
    assert SHARDS / 2 <= len(before) < SHARDS and "manifest.json" not in before
    rerun = subprocess.run(
        command(s3_folder, base),
        env=environment(mark),
        check=True,
        timeout=DEADLINE_S,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert f"going on from {len(before) * SHARD_NIMG:,} of {N:,} images" in rerun.stderr
    shown = {name: digest for name, digest in undisturbed.items() if not name.startswith(".")}
    assert {name: folder.sha256(name) for name in folder.files()} == shown


def test_two_drivers_on_one_set_at_once_end_with_the_undisturbed_one(
    base: Path, undisturbed: dict[str, str], tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "set"
    drivers = [subprocess.Popen(command(out, base, workers=0), env=environment(mark)) for _ in range(2)]
    assert [driver.wait(DEADLINE_S) for driver in drivers] == [0, 0]
    assert digests(out) == undisturbed
    assert len(SampleTable(out)) == N
