"""What goes wrong in training ends with one sentence that says what to do, and costs nothing that was written."""

import logging
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sims_ray.config import ComputeSettings, load_recipe
from sims_ray.data.samples import Samples, write_samples
from sims_ray.data.table import table_result
from sims_ray.diffusion.training import Training
from sims_ray.errors import SimsError
from sims_ray.stages.train import train
from sims_ray.stages.train_job import TrainJob
from sims_ray.stages.training_log import read_metrics
from sims_ray.storage.artifacts import MANIFEST, Store
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from sims_ray.storage.training_states import TrainingStates
from sims_ray.studies.sims import SimsRun
from tests.networks import SETTINGS as BASE
from tests.networks import small_network
from tests.processes import end, environment
from tests.stages.training_runs import (
    BATCH_NIMG,
    DEADLINE_S,
    SETTINGS,
    assert_equals,
    await_true,
    command,
    folder_of,
    log_lines,
    undisturbed_run,
)

SLOW = pytest.mark.slow, pytest.mark.timeout(1800)
ALONE = ComputeSettings(num_workers=0)
SHORT = "compute.num_workers=0", "train.duration_kimg=2"
STOPPED_NIMG = 1200  # the newest checkpoint is at 1024
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d |\[\d{4}-.* Set ray log level ")  # ours, and one of Ray's core
MARGIN_BYTES = 160 << 10  # for logs, notes and files of Ray


class Stopped(Exception):
    """The process dies here."""


def short_job(out: Path) -> TrainJob:
    """The training of two kimg, in this process; its images are there."""
    run = SimsRun(load_recipe("digits", [*SETTINGS, *SHORT]), out)
    run.import_data()
    assert run.plan.base_job is not None
    return run.plan.base_job


def quietly(job: TrainJob) -> None:
    train(job, ALONE, lambda row: None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A short training that nothing disturbed."""
    job = short_job(tmp_path_factory.mktemp("straight"))
    quietly(job)
    return job


@pytest.fixture(scope="module")
def stopped_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a short training that was stopped on its way."""
    out, step = tmp_path_factory.mktemp("stopped"), Training.step

    def dies(training: Training) -> None:
        step(training)
        if training.nimg >= STOPPED_NIMG:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", dies)
        with pytest.raises(SimsError, match="run the same command"):
            quietly(short_job(out))
    return out


@pytest.fixture
def stopped(stopped_out: Path, tmp_path: Path) -> TrainJob:
    """A copy of it."""
    shutil.copytree(stopped_out, tmp_path, dirs_exist_ok=True)
    return short_job(tmp_path)


def contents(job: TrainJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in job.artifact.path.iterdir()}


def truncated(percent: int) -> Callable[[Path], None]:
    def tear(path: Path) -> None:
        os.truncate(path, path.stat().st_size * percent // 100)

    return tear


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def without_card(path: Path) -> None:
    safetensors.torch.save_file(load_tensors(path)[0], path)


@pytest.mark.parametrize(
    "tear",
    [truncated(0), truncated(50), truncated(99), flipped, without_card],
    ids=["0 %", "50 %", "99 %", "one bit", "no card"],
)
def test_a_torn_newest_checkpoint_is_named_and_the_run_ends_as_if_nothing_had_been(
    tear: Callable[[Path], None],
    straight: TrainJob,
    stopped: TrainJob,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (_, newest), (left_nimg, before), *_ = TrainingStates(stopped.artifact.path).paths().items()
    tear(newest)
    logged = len(log_lines(tmp_path))
    with caplog.at_level(logging.WARNING, "sims_ray"):
        quietly(stopped)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(newest) in warning and "is torn" in warning and f"{before.name} is used instead" in warning
    assert log_lines(tmp_path)[logged][0] == left_nimg + BATCH_NIMG
    ours, theirs = ([(r["nimg"], r["loss"]) for r in read_metrics(j.artifact.path)] for j in (stopped, straight))
    assert ours == theirs
    assert stopped.artifact.manifest["files"] == straight.artifact.manifest["files"]
    for name in straight.artifact.manifest["files"]:
        mine, other = (load_tensors(job.artifact.path / name)[0] for job in (stopped, straight))
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_images_of_another_shape_are_refused_and_what_was_trained_stays(stopped: TrainJob, tmp_path: Path) -> None:
    before = contents(stopped)
    with pytest.raises(SimsError, match=r"holds images of \(1, 16, 16\), but .* takes \(1, 8, 8\); give") as refused:
        quietly(replace(stopped, table=larger_images(tmp_path)))
    assert len(str(refused.value).splitlines()) == 1
    assert contents(stopped) == before


def larger_images(folder: Path) -> Path:
    """A table of images of 16 x 16."""
    images = np.zeros((64, 1, 16, 16), np.uint8)
    artifact = Store(folder / "larger").artifact("import", {"source": "blank"})
    samples = Samples(np.arange(64), images, np.zeros(64, np.int32))
    artifact.path.mkdir(parents=True)
    write_samples(artifact.path / "images.parquet", samples, {})
    artifact.commit({"images.parquet": {"rows": 64}}, table_result((1, 16, 16), samples.labels, 64))
    return artifact.path


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of every process of a test; none is left when it ends."""
    name = uuid.uuid4().hex
    yield name
    end(name)


def refusal(line: list[str], mark: str) -> str:
    """The one sentence that a command ends with."""
    ended = subprocess.run(line, env=environment(mark), timeout=DEADLINE_S, stderr=subprocess.PIPE, text=True)
    return sentence(ended.returncode, ended.stderr)


def sentence(code: int | None, stderr: str) -> str:
    """The one sentence that a command ended with; before it there are the lines of its log and nothing else."""
    *others, last = stderr.strip().splitlines()
    assert code == 1 and last.startswith("error: "), stderr
    assert all(map(LOG_LINE.match, others)), stderr
    return last


def test_a_batch_that_does_not_divide_is_refused_and_what_was_trained_stays(
    stopped: TrainJob, tmp_path: Path, mark: str
) -> None:
    before = contents(stopped)
    said = refusal(command(tmp_path, 3, "train.duration_kimg=2"), mark)
    assert "train.batch_size=64 must divide by compute.num_workers=3; change either" in said
    assert contents(stopped) == before


def test_an_own_base_for_other_images_is_refused_and_what_was_trained_stays(
    stopped: TrainJob, tmp_path: Path, mark: str
) -> None:
    before, path, network = contents(stopped), tmp_path / "mine.safetensors", {**BASE, "img_resolution": 16}
    save_tensors(path, small_network(img_resolution=16).state_dict(), {"role": "base", "network": network, "nimg": 5})
    words = f"train.checkpoint={path}", "network.conditional=false"
    said = refusal(command(tmp_path, 0, *words, verb="finetune"), mark)
    assert "makes images of (1, 16, 16), but digits holds (1, 8, 8); " in said
    assert contents(stopped) == before


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=SLOW)])
def test_a_learning_rate_that_explodes_ends_with_advice_and_whole_checkpoints(
    workers: int, tmp_path: Path, mark: str
) -> None:
    often = "train.checkpoint_kimg=0.064", "train.lr_rampup_kimg=1"  # the first step has a rate of zero
    said = refusal(command(tmp_path, workers, "train.lr=1e30", *often), mark)
    assert re.search(r"loss .* became nan at \d+ images; .*last good checkpoint is kept.*lower the learning rate", said)
    assert_states_are_whole(tmp_path)


def assert_states_are_whole(out: Path) -> None:
    """No training is committed, and every checkpoint that lies there can be read."""
    paths = TrainingStates(folder_of(out)).paths().values()
    assert paths and not (folder_of(out) / MANIFEST).exists()
    for path in paths:
        load_tensors(path)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A disk of its own in memory."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk, and not everywhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow(disk: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left on a disk."""
    path = disk / "other"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return path


@pytest.fixture(scope="module", params=[0, 2])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A number of workers, and the output of a run of them that nothing disturbed."""
    return request.param, undisturbed_run(tmp_path_factory.mktemp("undisturbed") / "run", request.param)


FULL = r"is full .* bytes are free; the last checkpoint is intact: free space and run the same command again"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_disk_with_room_for_two_checkpoints_ends_with_one_sentence_and_a_larger_one_takes_the_same_run(
    undisturbed: tuple[int, Path], tmp_path: Path, mark: str
) -> None:
    workers, expected = undisturbed
    (state,) = TrainingStates(folder_of(expected)).paths().values()
    images = sum(path.stat().st_size for path in expected.glob("artifacts/import-*/*"))
    with small_disk(tmp_path / "disk", images + MARGIN_BYTES + 2 * state.stat().st_size) as disk:
        assert re.search(FULL, refusal(command(disk, workers), mark))
        assert_states_are_whole(disk)
        grow(disk, 64 << 20)
        subprocess.run(command(disk, workers), env=environment(mark), check=True, timeout=DEADLINE_S)
        assert_equals(disk, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_disk_that_others_fill_to_the_last_byte_ends_with_one_sentence_and_once_it_is_free_the_run_goes_on(
    undisturbed: tuple[int, Path], tmp_path: Path, mark: str
) -> None:
    workers, expected = undisturbed
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        driver = subprocess.Popen(command(disk, workers), env=environment(mark), stderr=subprocess.PIPE, text=True)
        await_true(lambda: TrainingStates(folder_of(disk)).paths() or driver.poll() is not None, "a checkpoint came")
        others = fill(disk)
        _, stderr = driver.communicate(timeout=2 * DEADLINE_S)  # Ray tries again a few times
        assert "free space" in sentence(driver.returncode, stderr)
        assert_states_are_whole(disk)
        others.unlink()
        subprocess.run(command(disk, workers), env=environment(mark), check=True, timeout=DEADLINE_S)
        assert_equals(disk, expected)
