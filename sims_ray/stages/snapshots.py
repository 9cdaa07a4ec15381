"""What training leaves for others: the EMA weights at each budget, and the averages they are reconstructed from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sims_ray.data.table import SampleTable
from sims_ray.diffusion.training import Training
from sims_ray.stages.policy import effective
from sims_ray.stages.train_job import TrainJob
from sims_ray.storage.checkpoints import read_card, save_model
from sims_ray.storage.latents import card_latents
from sims_ray.storage.posthoc import power_ema, reconstruct, save_average
from sims_ray.storage.training_states import save_patiently


class Snapshots:
    """Writes a run's snapshots into its artifact's folder.

    Args:
        job: the run.
    """

    def __init__(self, job: TrainJob) -> None:
        self._job = job

    def save(self, training: Training, average: bool) -> None:
        """Leave the snapshots whose budget the last step crossed, and with `average` the weight averages."""
        reached = [b for b in self._job.budgets_kimg if self._job.snapshot_nimg(b) == training.nimg]
        stds = [std for std in training.settings.averages.values() if std is not None]
        if average or reached:
            for std, net in zip(stds, training.averages.values(), strict=False):
                card = self._card(training.nimg)
                save_average(self._job.artifact.path, training.nimg, std, net.state_dict(), card)
        for budget in reached:
            self._save_snapshot(training, budget, bool(stds))

    def save_present(self, training: Training, path: Path) -> None:
        """Write the present weight average, of several the first, as a model."""
        save_model(path, training.ema, self._card(training.nimg))

    def _save_snapshot(self, training: Training, budget_kimg: float, power_function: bool) -> None:
        job, card = self._job, self._card(training.nimg)
        tensors = training.ema.state_dict()
        if power_function:
            tensors, _ = reconstruct(job.average_paths(training.nimg), job.settings.ema_std, training.nimg)
            card["ema"] = power_ema(job.settings.ema_std)
        save_patiently(job.snapshot(budget_kimg), tensors, card)

    def _card(self, nimg: int) -> dict[str, Any]:
        job, settings = self._job, self._job.settings
        ema = {"kind": "halflife", "kimg": settings.ema_halflife_kimg, "rampup_ratio": settings.ema_rampup_ratio}
        return {
            "role": job.role,
            "network": dict(job.network),
            "precision": job.precision,
            "nimg": nimg,
            "ema": ema,
            "optimization": asdict(job.optimization()),
            "trainable": job.trainable,
            "policy": effective(job, nimg),
            "training": job.artifact.fingerprint,
            "parents": list(job.artifact.parents),
            "data": SampleTable(job.table).fingerprint,
            **self._handed_on(),
        }

    def _handed_on(self) -> dict[str, Any]:
        """The licence and the latents of what a model was fine-tuned from; the latents of its table otherwise."""
        job = self._job
        card = read_card(job.init) if job.init else None
        latents = card_latents(card) if card else SampleTable(job.table).manifest["result"].get("latents")
        facts = {"licence": card.get("licence") if card else None, "latents": latents}
        return {key: value for key, value in facts.items() if value}
