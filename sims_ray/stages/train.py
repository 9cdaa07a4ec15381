"""The training stage: base training and auxiliary fine-tuning on Ray Train, resumable from its artifact's folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError
from sims_ray.stages.cluster import as_sentence, own_interrupts, ray_folder, start_ray
from sims_ray.stages.progress import Progress
from sims_ray.stages.reading import Source, open_source
from sims_ray.stages.train_job import KIMG, TrainJob, snapshot_name
from sims_ray.stages.train_loop import FAILURE, train_loop
from sims_ray.stages.training_log import METRICS, read_metrics
from sims_ray.storage.checkpoints import newest_nimg
from sims_ray.storage.posthoc import PATTERN

POLL_S = 0.5


def train(job: TrainJob, compute: ComputeSettings, on_metrics: Callable[[dict[str, float]], None]) -> None:
    """Train, or go on training, until every budget has its snapshot; commit the artifact.

    `on_metrics` receives `nimg`, `loss` and `images_per_s` in the calling process as training goes on.

    Raises:
        SimsError: the set cannot be trained on, the loss is no longer a number, or the workers failed more often
            than allowed.
    """
    training_set = job.training_set()
    if compute.num_workers:
        start_ray(compute)
    job.artifact.path.mkdir(parents=True, exist_ok=True)
    for torn in job.artifact.path.glob(".*.tmp"):  # what a killed process was writing
        torn.unlink(missing_ok=True)
    positions = range(newest_nimg(job.artifact.path), job.stop_nimg)
    with open_source(training_set, job.reading, positions, compute) as source, _follow(job, on_metrics):
        _fit(job, compute, source)
    losses = read_metrics(job.artifact.path)
    snapshots = {f"{b:g}": snapshot_name(b) for b in job.budgets_kimg}
    averages = sorted(path.name for path in job.artifact.path.glob(PATTERN))
    job.artifact.commit(
        {name: {} for name in [*snapshots.values(), *averages, METRICS]},
        {"snapshots": snapshots, "nimg": losses[-1]["nimg"], "loss": losses[-1]["loss"]},
    )
    for state in job.artifact.path.glob("state-*.safetensors"):
        state.unlink()


def _fit(job: TrainJob, compute: ComputeSettings, source: Source) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    threads = max(1, int(compute.cpus_per_worker)) if compute.num_workers else None
    try:
        with own_interrupts(), ray_folder(job.artifact.path) as folder:
            TorchTrainer(
                train_loop,
                train_loop_config={
                    "job": job,
                    "source": source,
                    "threads": threads,
                    "precision": compute.precision,
                },
                scaling_config=ScalingConfig(
                    num_workers=compute.num_workers,
                    use_gpu=compute.gpus_per_worker > 0,
                    resources_per_worker={"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker},
                ),
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


def _check_failure(job: TrainJob) -> None:
    if (failure := job.artifact.path / FAILURE).is_file():
        sentence = failure.read_text()
        failure.unlink()
        raise SimsError(sentence)


@contextmanager
def _follow(job: TrainJob, on_metrics: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """While training runs elsewhere, pass on its log and show its progress."""
    seen = newest_nimg(job.artifact.path)
    progress = Progress(f"train {job.role}", round(job.budgets_kimg[-1] * KIMG), seen)
    stop = threading.Event()

    def poll() -> None:
        nonlocal seen
        for row in read_metrics(job.artifact.path):
            if row["nimg"] > seen:
                seen = int(row["nimg"])
                progress.update(min(seen, progress.total_nimg), f"loss {row['loss']:.2f}")
                on_metrics(row)

    def follow() -> None:
        while not stop.wait(POLL_S):
            poll()

    for row in read_metrics(job.artifact.path):
        if row["nimg"] <= seen:
            on_metrics(row)
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        poll()
