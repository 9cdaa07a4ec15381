"""What one Ray Train worker does: build the model, go on from the newest checkpoint, train, leave snapshots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from sims_ray.data.table import SampleTable
from sims_ray.diffusion.noise import step_generator
from sims_ray.diffusion.order import Share
from sims_ray.diffusion.training import Training
from sims_ray.errors import SimsError
from sims_ray.nn.networks import build_network
from sims_ray.stages.reading import Source
from sims_ray.stages.train_job import AUTO, KIMG, TrainJob, snapshot_name
from sims_ray.stages.training_log import TrainingLog
from sims_ray.storage.checkpoints import load_model, newest_state, read_card, save_model, save_tensors, state_path
from sims_ray.storage.latents import card_latents
from sims_ray.storage.posthoc import PATTERN, power_ema, reconstruct, save_average

FAILURE = "failure.txt"


def train_loop(config: dict[str, Any]) -> None:
    """Body of one Ray Train worker.

    An error that every worker runs into, and would again, is left in a file: Ray would retry an exception.
    """
    import ray.train

    job: TrainJob = config["job"]
    try:
        _train(job, config)
    except SimsError as error:
        if ray.train.get_context().get_world_rank() == 0:
            (job.artifact.path / FAILURE).write_text(str(error))


def _train(job: TrainJob, config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    if config["threads"]:  # in a process of its own, not in the caller's
        torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    training = _build(job, config["source"], rank, world_size, device, ray.train.torch.prepare_model)
    on_gpu, forced = device.type == "cuda", config["precision"]
    training.net.run_in((job.precision if on_gpu else "float32") if forced == AUTO else forced)
    if (found := newest_state(job.artifact.path)) is not None:
        training.load_state(found[0], found[1]["nimg"])
    training.check_same_start()
    log = TrainingLog(job.artifact.path, training.nimg) if rank == 0 else None
    end_nimg = job.budgets_kimg[-1] * KIMG
    crossed, s = _crossings(training.nimg), job.settings
    while training.nimg < end_nimg:
        training.step()
        done = training.nimg >= end_nimg
        checkpoint = crossed(training.nimg, "checkpoint", s.checkpoint_kimg)
        if crossed(training.nimg, "log", s.log_kimg) or checkpoint or done:
            loss = training.pop_loss()
            _check_loss(job, training.nimg, loss)
            if log is not None:
                log.write(training.nimg, loss)
        if rank == 0:
            _save(job, training, checkpoint and not done, crossed(training.nimg, "average", s.ema_snapshot_kimg))
        if checkpoint or done:  # a barrier: no worker runs ahead of a checkpoint
            ray.train.report({"nimg": training.nimg, "loss": loss})


def _build(
    job: TrainJob,
    source: Source,
    rank: int,
    world_size: int,
    device: torch.device,
    wrap: Callable[[torch.nn.Module], torch.nn.Module],
) -> Training:
    torch.manual_seed(step_generator(job.settings.seed, 0, "weights").initial_seed())
    net = build_network(job.network) if job.init is None else load_model(job.init)[0].requires_grad_(True)
    return Training(
        net.to(device),
        job.optimization(),
        source.open(Share(source.training_set.order, job.settings.batch_size, rank, world_size)),
        device=device,
        rank=rank,
        world_size=world_size,
        wrap=wrap if world_size > 1 else lambda module: module,
    )


def _check_loss(job: TrainJob, nimg: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise SimsError(
            f"the training loss of {job.artifact.path.name} became {loss} at {nimg:,} images; the last good "
            f"checkpoint is kept: lower the learning rate (now {job.settings.lr:g}) or lengthen its ramp"
        )


def _save(job: TrainJob, training: Training, checkpoint: bool, average: bool) -> None:
    """Leave the snapshots whose budget the last step crossed, and the averages and resumable state that are due."""
    before = training.nimg - training.settings.batch_size
    crossed = [budget for budget in job.budgets_kimg if before < budget * KIMG <= training.nimg]
    stds = [std for std in training.settings.averages.values() if std is not None]
    if average or crossed:
        for std, net in zip(stds, training.averages.values(), strict=False):
            save_average(job.artifact.path, training.nimg, std, net.state_dict(), _card(job, training.nimg))
    for budget in crossed:
        path = job.artifact.path / snapshot_name(budget)
        if stds:
            paths = list(job.artifact.path.glob(PATTERN))
            tensors, _ = reconstruct(paths, job.settings.ema_std, training.nimg)
            save_tensors(path, tensors, {**_card(job, training.nimg), "ema": power_ema(job.settings.ema_std)})
        else:
            save_model(path, training.ema, _card(job, training.nimg))
    if checkpoint:
        older = sorted(job.artifact.path.glob("state-*.safetensors"))[:-1]
        card = {"role": "training state", "nimg": training.nimg, "of": job.artifact.fingerprint}
        save_tensors(state_path(job.artifact.path, training.nimg), training.state(), card)
        for path in older:
            path.unlink(missing_ok=True)


def _card(job: TrainJob, nimg: int) -> dict[str, Any]:
    settings = job.settings
    return {
        "role": job.role,
        "network": dict(job.network),
        "precision": job.precision,
        "nimg": nimg,
        "ema": {"kind": "halflife", "kimg": settings.ema_halflife_kimg, "rampup_ratio": settings.ema_rampup_ratio},
        "optimization": asdict(job.optimization()),
        "trainable": job.trainable,
        "training": job.artifact.fingerprint,
        "parents": list(job.artifact.parents),
        "data": SampleTable(job.table).fingerprint,
        **_handed_on(job),
    }


def _handed_on(job: TrainJob) -> dict[str, Any]:
    """The licence and the latents of what a model was fine-tuned from; the latents of its table otherwise."""
    card = read_card(job.init) if job.init else None
    latents = card_latents(card) if card else SampleTable(job.table).manifest["result"].get("latents")
    facts = {"licence": card.get("licence") if card else None, "latents": latents}
    return {key: value for key, value in facts.items() if value}


def _crossings(start_nimg: int) -> Callable[[int, str, float], bool]:
    """A function that says whether a multiple of `every_kimg` was crossed since its last call for `name`."""
    last: dict[str, int] = {}

    def crossed(nimg: int, name: str, every_kimg: float) -> bool:
        period = every_kimg * KIMG
        before = last.get(name, start_nimg)
        last[name] = nimg
        return nimg // period > before // period

    return crossed
