"""What one Ray Train worker does: build the model, go on from the newest checkpoint, train, leave snapshots."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.order import Share, share_of
from sims_ray.diffusion.training import Training
from sims_ray.errors import SimsError
from sims_ray.nn.flops import network_flops
from sims_ray.stages.preview import MODEL, Preview, show
from sims_ray.stages.reading import Source
from sims_ray.stages.snapshots import Snapshots
from sims_ray.stages.train_job import AUTO, KIMG, TrainJob
from sims_ray.stages.training_log import TrainingLog
from sims_ray.stages.training_speed import (
    choose_channels_last,
    choose_compile,
    device_peak,
    fit_memory,
    speed_notes,
)
from sims_ray.storage.beside import atomic_path
from sims_ray.storage.checkpoints import FULL
from sims_ray.storage.training_states import INTACT, TrainingStates

FAILURE = "failure.txt"


def train_loop(config: dict[str, Any]) -> None:
    """Body of one Ray Train worker.

    An error that would come again is left in a file and ends all workers; when Ray begins anew, they end at once.
    """
    job: TrainJob = config["job"]
    failure = job.artifact.path / FAILURE
    if failure.is_file():
        return
    try:
        _train(job, config["source"], config["compute"])
    except SimsError as error:
        _leave(failure, error)
        raise  # a worker that merely ended would have the others wait for it
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = SimsError(
            f"{job.artifact.path} is full ({error.strerror}); {INTACT}free space and run the same command again"
        )
        _leave(failure, full)
        raise full from None


def _leave(failure: Path, error: SimsError) -> None:
    """Leave a sentence for `train`; where there is no room for it, Ray tries again and then hands it on itself."""
    with suppress(OSError), atomic_path(failure) as beside:
        beside.write_text(str(error))


def _train(job: TrainJob, source: Source, compute: ComputeSettings) -> None:
    import ray.train
    import ray.train.torch

    if compute.num_workers:  # in a process of its own, not in the caller's
        torch.set_num_threads(max(1, int(compute.cpus_per_worker)))
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    states = TrainingStates(job.artifact.path)
    training = _build(job, source, rank, world_size, device, compute, ray.train.torch.prepare_model)
    notes = _prepare(training, job, compute, world_size, rank)
    if (found := states.newest(job.first_nimg, quiet=True)) is not None:
        training.load_state(found[0], found[1]["nimg"])
    training.check_same_start()
    log = _log(training, job, world_size, notes) if rank == 0 else None
    crossed, s = _crossings(training.nimg), job.settings
    snapshots, warned = Snapshots(job), False
    with states:
        while training.nimg < job.stop_nimg:
            training.step()
            done = training.nimg >= job.stop_nimg
            checkpoint = crossed(training.nimg, "checkpoint", s.checkpoint_kimg) or done
            if crossed(training.nimg, "log", s.log_kimg) or checkpoint:
                loss = training.pop_loss()
                _check_loss(job, training.nimg, loss)
                if log is not None:
                    log.write(training.nimg, loss)
                if not warned and world_size > 1 and ray.train.get_preemption_info() is not None:
                    checkpoint = warned = True  # a node is about to go
            if rank == 0:
                if checkpoint:
                    card = {"role": "training state", "nimg": training.nimg, "of": job.artifact.fingerprint}
                    states.save(training.nimg, training.state(), card)
                if done:  # a run whose last snapshot is there has its last state too
                    states.close()
                snapshots.save(training, crossed(training.nimg, "average", s.ema_snapshot_kimg))
            if job.preview is not None and crossed(training.nimg, "preview", job.preview.every_kimg):
                _show(job, job.preview, snapshots, training, rank, bool(compute.num_workers))
            if checkpoint:  # a barrier: no worker runs far ahead of a checkpoint
                ray.train.report({"nimg": training.nimg, "loss": loss})


def _show(job: TrainJob, preview: Preview, snapshots: Snapshots, training: Training, rank: int, in_ray: bool) -> None:
    """Have images sampled from the present average; with Ray, while training goes on. Every worker must call it."""
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        if rank:
            ray.train.report({"nimg": training.nimg})
            return
        snapshots.save_present(training, Path(folder) / MODEL)
        if not in_ray:
            show(preview, Path(folder) / MODEL, job.artifact.path, training.nimg)
            return
        task = ray.train.ValidationTaskConfig(fn_kwargs={"folder": str(job.artifact.path), "nimg": training.nimg})
        ray.train.report({"nimg": training.nimg}, ray.train.Checkpoint.from_directory(folder), validation=task)


def _build(
    job: TrainJob,
    source: Source,
    rank: int,
    world_size: int,
    device: torch.device,
    compute: ComputeSettings,
    wrap: Callable[[torch.nn.Module], torch.nn.Module],
) -> Training:
    net = job.network_at_start().to(device)
    forced = compute.precision
    net.run_in((job.precision if device.type == "cuda" else "float32") if forced == AUTO else forced)
    training = Training(
        net,
        job.optimization(),
        source.open(Share(source.training_set.order, job.settings.batch_size, rank, world_size)),
        device=device,
        rank=rank,
        world_size=world_size,
        channels_last=choose_channels_last(compute.channels_last, device.type == "cuda"),
        wrap=wrap if world_size > 1 else lambda module: module,
    )
    training.load_moments(job.moments_at_start())
    return training


def _prepare(training: Training, job: TrainJob, compute: ComputeSettings, world_size: int, rank: int) -> list[str]:
    """Compile, choose the micro-batch and warm up; returns what was chosen and why, in sentences."""
    shape = (job.network["img_channels"], *[job.network["img_resolution"]] * 2)
    on_gpu = training.device.type == "cuda"
    share_nimg = len(share_of(job.settings.batch_size, rank, world_size))
    micro_batch = fit_memory(training, shape, share_nimg, compute)
    compiled = choose_compile(compute.compile_training, on_gpu, job.stop_nimg)
    training.compile(compiled.value)
    if world_size > 1 or compiled.value != "off":
        training.warm_up(shape, micro_batch)
    return list(speed_notes(compiled, choose_channels_last(compute.channels_last, on_gpu), micro_batch, share_nimg))


def _log(training: Training, job: TrainJob, world_size: int, notes: Sequence[str]) -> TrainingLog:
    s = training.settings
    image_flops = network_flops(job.network, s.trainable_resolution).training(s.trainable)
    peak_flops = device_peak(training.device, training.net.precision) * world_size
    log = TrainingLog(job.artifact.path, training.nimg, image_flops, peak_flops)
    for note in notes:
        log.note(note)
    return log


def _check_loss(job: TrainJob, nimg: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise SimsError(
            f"the training loss of {job.artifact.path.name} became {loss} at {nimg:,} images; the last good "
            f"checkpoint is kept: lower the learning rate (now {job.settings.lr:g}) or lengthen its ramp, "
            f"and give another --out or delete {job.artifact.path}"
        )


def _crossings(start_nimg: int) -> Callable[[int, str, float], bool]:
    """A function that says whether a multiple of `every_kimg` was crossed since its last call for `name`."""
    last: dict[str, int] = {}

    def crossed(nimg: int, name: str, every_kimg: float) -> bool:
        period = every_kimg * KIMG
        before = last.get(name, start_nimg)
        last[name] = nimg
        return nimg // period > before // period

    return crossed
