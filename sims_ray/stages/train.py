"""The training stage: base training and auxiliary fine-tuning on Ray Train, resumable from its artifact's folder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError
from sims_ray.stages.budgets import Run, commit, prepare_runs, settle
from sims_ray.stages.cluster import as_sentence, own_interrupts, quiet_ray, ray_folder, start_ray
from sims_ray.stages.policy import policy_lines
from sims_ray.stages.preview import read_previews, sheet_name, validate
from sims_ray.stages.progress import Progress
from sims_ray.stages.reading import Source, open_source
from sims_ray.stages.train_job import TrainJob
from sims_ray.stages.train_loop import FAILURE, train_loop
from sims_ray.stages.training_log import read_metrics, read_notes
from sims_ray.stages.unfinished import SECTIONS, check_settings, note_settings
from sims_ray.storage.training_states import TrainingStates

logger = logging.getLogger("sims_ray")

POLL_S = 0.5


def train(job: TrainJob, compute: ComputeSettings, on_metrics: Callable[[dict[str, float]], None]) -> None:
    """Train, or go on training, until every budget has its snapshot; commit the artifact.

    What the artifact holds already stays as it is. `on_metrics` receives `nimg`, `loss` and `images_per_s` in the
    calling process as training goes on, those of what was trained before first.

    Raises:
        SimsError: a training with other settings waits to be gone on with, the set cannot be trained on, the loss is
            no longer a number, or the workers failed more often than allowed.
    """
    check_settings(job)
    _check_batch(job, compute)
    training_set = job.training_set()
    if compute.num_workers:
        start_ray(compute)
    job.artifact.path.mkdir(parents=True, exist_ok=True)
    TrainingStates(job.artifact.path).sweep()
    note_settings(job)
    _log_policy(job)
    for run in prepare_runs(job):
        positions = range(run.start_nimg, run.job.stop_nimg)
        with open_source(training_set, job.reading, positions, compute) as source, _follow(run, on_metrics):
            _fit(run.job, compute, source)
        settle(job, run)
    commit(job)
    _log_policy(job)


def _log_policy(job: TrainJob) -> None:
    """The results of fine-tuning hang on how it is done, and hardly on any other setting as much."""
    for line in policy_lines(job) if job.role == "auxiliary" else ():
        logger.info("fine-tuning policy: %s", line)


def _check_batch(job: TrainJob, compute: ComputeSettings) -> None:
    try:
        compute.check_batch(f"{SECTIONS[job.role]}.batch_size", job.settings.batch_size)
    except ValueError as error:
        raise SimsError(str(error)) from None


def _fit(job: TrainJob, compute: ComputeSettings, source: Source) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    (job.artifact.path / FAILURE).unlink(missing_ok=True)  # of a process that was killed before it could tell
    quiet_ray()
    try:
        with own_interrupts(), ray_folder(job.artifact.path) as folder:
            TorchTrainer(
                train_loop,
                train_loop_config={"job": job, "source": source, "compute": compute},
                scaling_config=ScalingConfig(
                    num_workers=compute.training_workers,
                    elastic_resize_monitor_interval_s=compute.resize_s,
                    use_gpu=compute.gpus_per_worker > 0,
                    resources_per_worker={"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker},
                ),
                validation_config=_validation(job),
                run_config=RunConfig(
                    **folder,
                    failure_config=FailureConfig(max_failures=compute.max_failures),
                    logging_config=LoggingConfig(log_level="ERROR"),
                ),
            ).fit()
    except Exception as error:
        _check_failure(job)  # one worker may have stopped with a sentence, and the others because of it
        raise as_sentence(error, f"training of {job.artifact.path.name}") from error
    _check_failure(job)


def _validation(job: TrainJob) -> Any:
    """Sampling from a model on the way, for Ray Train to do in a task of its own."""
    from ray.train import ValidationConfig

    if job.preview is None:
        return None
    compute = job.preview.compute
    resources = {"num_cpus": compute.cpus_per_worker, "num_gpus": compute.gpus_per_worker}
    return ValidationConfig(partial(validate, preview=job.preview), ray_remote_kwargs=resources)


def _check_failure(job: TrainJob) -> None:
    if (failure := job.artifact.path / FAILURE).is_file():
        sentence = failure.read_text()
        failure.unlink()
        raise SimsError(sentence)


def _say_preview(run: Run, row: Mapping[str, float]) -> None:
    distances = [f"{name} = {value:.3f}" for name, value in row.items() if name != "nimg"]
    sheet = run.job.artifact.path / sheet_name(int(row["nimg"]))
    logger.info("train %s: images at %s: %s", run.job.role, f"{row['nimg']:,.0f}", ", ".join([str(sheet), *distances]))


@contextmanager
def _follow(run: Run, on_metrics: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """While training runs elsewhere, pass on its log and show its progress."""
    folder, seen = run.job.artifact.path, run.start_nimg
    noted, shown = len(read_notes(folder)), seen
    progress = Progress(f"train {run.job.role}", run.job.stop_nimg, seen)
    pass_on = on_metrics if not run.between else lambda row: None  # rows between were passed on before
    stop = threading.Event()

    def poll() -> None:
        nonlocal seen, noted, shown
        notes = read_notes(folder)
        for note in notes[noted:]:
            logger.info("train %s: %s", run.job.role, note)
        noted = len(notes)
        for row in read_previews(folder):
            if row["nimg"] > shown:
                shown = int(row["nimg"])
                _say_preview(run, row)
                pass_on(row)
        for row in read_metrics(folder):
            if row["nimg"] > seen:
                seen = int(row["nimg"])
                progress.update(seen, f"loss {row['loss']:.2f}")
                pass_on(row)

    def follow() -> None:
        while not stop.wait(POLL_S):
            poll()

    for row in read_metrics(folder):
        if row["nimg"] <= seen:
            pass_on(row)
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        poll()
